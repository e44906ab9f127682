"""The backends compute one thing: flex, in its physical order, gathered and fused agree with dense; flex compiles once.

All compiled tests share one shape, for a compilation takes many seconds on a CPU.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from meloformer.config import ModelConfig
from meloformer.errors import UserError
from meloformer.fractal import levels
from meloformer.model import attention
from meloformer.model.attention import BLOCK_SIZE, CUDA_OPTIONS
from tests.hid.streams import random_stream
from tests.model.music import another_tail, batch_of, rich_stream, tiny_model, with_deferred_bars

ROWS, N, M = 2, 250, 30
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def rows(seed):
    """A batch of the one shape: two or three pieces in a row, deferred bars among them; padding alone for seed 0."""
    first = [rich_stream(seed, 110), with_deferred_bars(rich_stream(seed + 1, 80), np.random.default_rng(seed))]
    return batch_of(first, [random_stream(seed, 200)] if seed else [], max_seq_len=N, max_segments=M)


def count_graphs(work):
    """How many graphs were compiled while `work` ran ten times."""
    torch._dynamo.reset()
    counters.clear()
    for seed in range(10):
        work(rows(seed))
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("config", [{}, {"pattern": "full_causal"}], ids=str)
def test_flex_agrees_with_dense_in_stream_order(config):
    dense, flex = tiny_model(**config), tiny_model(backend="flex", **config)
    for seed in (0, 3):
        with torch.no_grad():
            expected, got = dense(dense.prepare(rows(seed))), flex(flex.prepare(rows(seed)))
            losses = [model.training_loss(rows(seed)) for model in (dense, flex)]
            nats = [model.token_nats(model.prepare(rows(seed))) for model in (dense, flex)]
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(nats[1], nats[0], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(nats[0].sum(), losses[0][0], rtol=1e-5, atol=0)
        assert ((nats[0] > 0).cpu().numpy() == (rows(seed)["targets"] >= 0)).all()
        assert losses[0][1] == losses[1][1] > 0
        torch.testing.assert_close(losses[0][0], losses[1][0], rtol=1e-5, atol=0)
        torch.testing.assert_close(losses[0][2], losses[1][2], rtol=1e-5, atol=1e-4)


def test_one_graph_serves_ten_batches_without_gradients():
    """A recompilation a batch, and past a limit an N x N fall back, is what made the known implementation slow."""
    model = tiny_model(backend="flex")
    with torch.no_grad():
        assert count_graphs(lambda batch: model(model.prepare(batch))) == 1


def test_compiled_layers_are_one_graph_too():
    """The tables come as part of the inputs: what is new in each batch must not be what a graph is made for.

    One layer, for each takes a quarter of a minute to compile; with three the count is the same.
    """
    model, plain = tiny_model(backend="flex", n_layer=1), tiny_model(n_layer=1)
    model.compile_layers()
    with torch.no_grad():
        assert count_graphs(lambda batch: model(model.prepare(batch))) == 1
        batch = rows(11)
        torch.testing.assert_close(model(model.prepare(batch)), plain(plain.prepare(batch)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("changes", [{"backend": "gathered"}, {"backend": "fused", "pattern": "full_causal"}], ids=str)
def test_layers_of_no_one_shape_are_not_compiled(changes):
    """Pieces of other lengths and chunks of other keys in every batch: past a limit torch gives up, without a word."""
    with pytest.raises(UserError, match="would compile every batch anew; leave it out"):
        tiny_model(**changes).compile_layers()


@pytest.mark.parametrize("backend", ["flex", "gathered"])
def test_no_future_leaks_through_a_backend_with_an_order_of_its_own(backend):
    """Another tail moves tokens to other places in memory, so earlier logits may differ by rounding, and no more."""
    model, rng, moved = tiny_model(backend=backend), np.random.default_rng(0), 0
    for seed in range(1, 7):
        tokens = rich_stream(seed, 120)
        for i in rng.integers(3, len(tokens) - 1, 3).tolist():
            changed = another_tail(tokens, i, rng, len(tokens))
            batch = batch_of([tokens], [changed], max_seq_len=N, max_segments=M)
            with torch.no_grad():
                before, after = model(model.prepare(batch))
            torch.testing.assert_close(before[:i], after[:i], atol=2e-6, rtol=0)
            moved += bool((before[i : len(tokens)] - after[i : len(tokens)]).abs().max() > 1e-3)
    assert moved > 8


def test_flex_does_not_train_on_a_cpu():
    model = tiny_model(backend="flex").train()
    with pytest.raises(UserError, match="no backward pass on a CPU; train with --backend dense"):
        model.training_loss(rows(1))


@pytest.mark.parametrize("backend, config", [("fused", {"pattern": "full_causal"}), ("gathered", {})], ids=str)
@pytest.mark.parametrize("seed", [0, 3])
def test_backends_of_the_cpu_agree_with_dense_in_logits_and_gradients(backend, config, seed):
    """Rows off the edge of a chunk, a row of nothing but padding, repeats that fill up the last chunk."""
    models = [tiny_model(backend=name, **config).train() for name in ("dense", backend)]
    batch = rows(seed)
    inputs = [model.prepare(batch) for model in models]
    torch.testing.assert_close(models[1](inputs[1]), models[0](inputs[0]), atol=2e-6, rtol=1e-5)
    for model, x in zip(models, inputs):
        model.training_loss(x)[0].backward()
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(models[1].get_parameter(name).grad, parameter.grad, atol=1e-4, rtol=1e-4)


def test_a_backend_is_chosen_by_device_and_refused_where_it_cannot_work():
    assert tiny_model(backend="auto").backend() == "gathered"
    assert tiny_model(backend="auto", pattern="full_causal").backend() == "fused"
    assert tiny_model(backend="flex").backend() == "flex"
    with pytest.raises(UserError, match="fused computes --pattern full_causal alone"):
        ModelConfig(size="small", backend="fused").validate()


def test_gathered_computes_far_fewer_pairs_than_dense_and_has_few_shapes():
    """What it is for; and a shape that is new in every batch has the CPU's kernels made anew in every batch."""
    model = tiny_model(backend="gathered")
    tokens = [rich_stream(seed, 900) for seed in range(2, 12)]
    shapes = set()
    for stream in tokens:
        visibility = model.prepare(batch_of([stream] * 3, max_seq_len=3 * len(stream), max_segments=400)).mask
        shapes |= {tuple(bias.shape) for bias in visibility.bias}
        pairs = sum(bias.numel() for bias in visibility.bias)
        assert pairs < 0.6 * (3 * len(stream) + 400) ** 2
    assert {shape[0] for shape in shapes} <= {1, 2, 4, 8, 16}
    assert {shape[2] for shape in shapes} <= {64, 128, 192, 256, *range(384, 1025, 128)}


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)], ids=["A100", "H100", "B200"])
def test_a_backward_kernel_is_left_for_our_blocks(capability, monkeypatch):
    """Training on an H100 would have failed at its first step: of inductor's tiles for the backward pass there, one
    choice of 64 x 128, none divides a block of 64 x 64, and what does not divide it is dropped. No GPU was needed to
    see it: the choice depends on the device's number alone."""
    heuristics = pytest.importorskip("torch._inductor.template_heuristics.triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    blocks = [BLOCK_SIZE, (64, 32), (128, 64), (128, 128)]
    for queries, keys in blocks:
        with torch._inductor.config.patch(CUDA_OPTIONS):
            tiles = heuristics.CUDAConfigHeuristic().get_flex_attn_bwd_configs(64, torch.bfloat16)
        sides = [((t.block_m1, t.block_m2), (t.block_n1, t.block_n2)) for t in tiles]
        assert any(not any(queries % m for m in of_q) and not any(keys % n for n in of_k) for of_q, of_k in sides)


def test_cudnn_is_left_out_on_a_gpu(monkeypatch):
    """torch's first choice for bfloat16 on an H100 or H200: wrong there at some lengths, and slow at every new one."""
    of, asked = torch.backends.cuda, []
    with attention.kernels(torch.device("cuda")):
        assert (of.cudnn_sdp_enabled(), of.mem_efficient_sdp_enabled(), of.math_sdp_enabled()) == (False, True, True)
    assert of.cudnn_sdp_enabled()  # elsewhere as before
    for module in (attention, levels):
        monkeypatch.setattr(module, "kernels", lambda device: asked.append(device.type) or nullcontext())
    q = torch.ones(1, 192, 2, 64)
    attention.attend(q, q, q, attention.Visibility(torch.ones(1, 192, 192, dtype=torch.bool), q.dtype))
    levels.Block(16, 2, 32, 0.0)(torch.ones(1, 3, 16), None, False)
    assert asked == ["cpu", "cpu"]


@CUDA
def test_cuda_flex_agrees_with_dense_in_gradients():
    gradients = []
    for backend in ("dense", "flex"):
        model = tiny_model(backend=backend).train().cuda()
        nats, count, _ = model.training_loss(rows(0))
        (nats / count).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-4, rtol=1e-3, msg=name)


def with_and_without_gradients(model, batch):
    model.train().training_loss(batch)[0].backward()
    with torch.no_grad():
        model.eval().training_loss(batch)


@CUDA
def test_cuda_two_graphs_serve_ten_batches_with_gradients_and_ten_without():
    model = tiny_model(backend="flex").cuda()
    assert count_graphs(lambda batch: with_and_without_gradients(model, batch)) == 2


@CUDA
def test_cuda_compiled_layers_are_two_graphs():
    """What the layers keep on the host and send at their first call would be a graph more."""
    model = tiny_model(backend="flex", n_layer=1).cuda()
    model.compile_layers()
    assert count_graphs(lambda batch: with_and_without_gradients(model, batch)) == 2


@CUDA
def test_cuda_fused_agrees_with_dense_in_bf16():
    outputs = []
    for backend in ("dense", "fused"):
        model = tiny_model(pattern="full_causal", backend=backend, d_model=128).cuda()
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            outputs.append(model(model.prepare(rows(0))).float())
    torch.testing.assert_close(*outputs, atol=3e-2, rtol=3e-2)


@CUDA
def test_cuda_the_table_of_the_gpu_is_that_of_the_cpu():
    model = tiny_model(backend="flex")
    counts = [model.to(device).prepare(rows(3)).mask.counts.cpu() for device in ("cpu", "cuda")]
    assert torch.equal(*counts)
