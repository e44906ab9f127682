"""Decoding that asks the host for nothing gives the same pieces, and indeed asks for nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meloformer.errors import UserError
from meloformer.generation import Request, Sampling, engine, generate, on_device
from meloformer.generation.on_device import DeviceBatch
from meloformer.generation.request import ConstrainedState
from meloformer.hid import Family
from meloformer.model import DecodingSession
from tests.hid.streams import VOCABULARY, random_stream
from tests.model.music import tiny_model, with_deferred_bars


def both_ways(monkeypatch, model, request, **settings):
    """Samples of the host's loop and of the device's."""
    found = []
    for on in (False, True):
        monkeypatch.setattr(engine, "stays_on_device", lambda *_, on=on: on)
        found.append([(s.tokens.tolist(), s.hit_limit) for s in generate(model, request, **settings)])
    return found


@pytest.mark.parametrize("width", [16, 256])
def test_the_same_pieces_as_the_hosts_loop(monkeypatch, width):
    """At width 16 attention is found too narrow, again and again, and the steps are done anew."""
    monkeypatch.setattr(on_device, "WIDTH", width)
    monkeypatch.setattr(on_device, "SPAN", 64)
    torch.manual_seed(0)
    model = tiny_model().double()
    sampling = Sampling(top_k=20, by_family={Family.PITCH: 0.5})
    request = Request(bars=2, instruments=[128, 33])
    plain, tensors = both_ways(
        monkeypatch, model, request, num_samples=4, sampling=sampling, batch_size=3, seed=1, max_length=80
    )
    assert plain == tensors


@pytest.mark.parametrize(
    "config", [{"pattern": "full_causal"}, {"summaries": False}, {"same_bar_offsets": [0, 1]}], ids=str
)
def test_the_same_pieces_behind_a_prompt(monkeypatch, config):
    torch.manual_seed(1)
    model = tiny_model(**config).double()
    rng = np.random.default_rng(3)
    streams = [with_deferred_bars(random_stream(seed, 120), rng) for seed in range(20)]
    stream = next(stream for stream in streams if (stream == VOCABULARY.FILL).sum() > 2)
    head = stream[: np.flatnonzero(stream == VOCABULARY.FILL)[0]]
    request = Request(given=head, instruments=[33])
    plain, tensors = both_ways(monkeypatch, model, request, num_samples=2, max_length=len(head) + 60)
    assert plain == tensors


def test_greedy_in_float32_too(monkeypatch):
    torch.manual_seed(2)
    model = tiny_model()
    plain, tensors = both_ways(monkeypatch, model, Request(bars=2), sampling=Sampling(temperature=0), max_length=100)
    assert plain == tensors


def test_progress_counts_every_token_and_bar(monkeypatch):
    torch.manual_seed(0)
    model, counts = tiny_model(), []
    for on in (False, True):
        monkeypatch.setattr(engine, "stays_on_device", lambda *_, on=on: on)
        said: list[tuple[int, int]] = []
        generate(model, Request(bars=2), 3, max_length=80, progress=lambda *x, said=said: said.append(x))
        counts.append(np.sum(said, axis=0).tolist())
    assert counts[0] == counts[1]


def test_a_diverged_model_is_one_line(monkeypatch):
    model = tiny_model()
    with torch.no_grad():
        model.output_norm.weight.fill_(torch.nan)
    monkeypatch.setattr(engine, "stays_on_device", lambda *_: True)
    with pytest.raises(UserError, match="not finite"):
        generate(model, Request(bars=1), max_length=60)


class NothingFromTheHost(TorchDispatchMode):
    """Refuses tensors of the CPU: what is sent to a device at every step waits, and no graph can hold it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]:
            assert tensor.device.type == "meta", f"{func} made a tensor on the {tensor.device}"
        return out


@torch.inference_mode()
def test_no_step_waits_for_the_device():
    """On the device without memory there is nothing to read back: whatever asks for a value is an error there."""
    model, start = tiny_model().to("meta"), ConstrainedState(VOCABULARY, Request(bars=2, instruments=[0, 33]), 100)
    prompt = start.forced_prefix()
    session = DecodingSession(model, 1, 100, 21)
    session.streams[0].used = session.streams[0].length = len(prompt)
    logits = torch.empty(1, VOCABULARY.size, device="meta")
    sampling = Sampling(temperature=0.9, top_k=9, top_p=0.9, min_p=0.01, by_family={Family.TIME: 0.5})
    batch = DeviceBatch(session, start, logits, [(0, i) for i in range(3)], sampling)
    batch.step()  # what is sent to the device once has been sent
    with NothingFromTheHost():
        batch.step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        batch.is_bad.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the captured step has not run on one")
def test_cuda_the_captured_step_writes_the_same_pieces(monkeypatch):
    torch.manual_seed(0)
    model, request, settings = tiny_model().double(), Request(bars=2), {"num_samples": 3, "max_length": 100}
    plain = [s.tokens.tolist() for s in generate(model, request, **settings)]
    assert plain == [s.tokens.tolist() for s in generate(model.cuda(), request, **settings)]
