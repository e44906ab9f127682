"""Attention over real packed rows: block-sparse against the fastest causal kernel at hand, forward and backward.

    python -m benchmarks.attention --data_dir processed/ [--lengths 2048,8192,24576] [--model_size base]

For rows of single pieces and packed ones, each line: blocks visited relative to the baseline's, milliseconds and peak
MiB of attention forward and backward for sparse (flex) and for causal inside each piece (fused), the time to build the
table, and sparse as a multiple of the baseline. `--block_size 128x64` tries another; repeated, several. On a CPU, in a
reduced form: rows of --cpu_tokens tokens, flex forward only in float32, dense beside a direct call with the mask, and
gathered, which is what a CPU trains with, forward and backward beside dense and the baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import in_short, whole_numbers
from benchmarks.blocks import baseline_blocks
from benchmarks.rows import packed_rows
from meloformer.command_line import Parser
from meloformer.config import MODEL_SIZES, ModelConfig
from meloformer.errors import UserError, exit_cleanly
from meloformer.hid.rows import stack_rows
from meloformer.model.attention import BlockVisibility, GatheredVisibility, PieceVisibility, Visibility, attend
from meloformer.model.block_table import order_of
from meloformer.model.masks import AttentionRule, Fields, dense_mask, joint_fields

CPU = torch.device("cpu")
SDPA_KERNELS = {"flash sdpa": SDPBackend.FLASH_ATTENTION, "cuDNN sdpa": SDPBackend.CUDNN_ATTENTION}


def measure(work: Callable[[], None], device: torch.device, repeats: int = 10) -> tuple[float, float]:
    """Milliseconds (median; on a CPU the least processor time) and peak MiB beyond what was there, of `work`."""
    if device.type != "cuda":
        work()
        times = []
        for _ in range(repeats // 2):
            start = time.process_time()  # of all threads: other work may share the cores
            work()
            times.append(time.process_time() - start)
        return 1e3 * min(times), float("nan")
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    before, times = torch.cuda.memory_allocated(), []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return float(np.median(times)), (torch.cuda.max_memory_allocated() - before) / 2**20


def forward_backward(call: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor], train: bool) -> Callable:
    def work() -> None:
        if not train:
            with torch.no_grad():
                call(*qkv)
            return
        out = call(*qkv)
        torch.autograd.grad(out, qkv, torch.ones_like(out))

    return work


def baselines(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, Callable]:
    """Kernels that compute causal attention inside each piece of this batch; the fastest is the baseline."""
    document = batch["document"]
    pieces = PieceVisibility(document, device)
    found: dict[str, Callable] = {"pieces": lambda q, k, v: attend(q, k, v, pieces)}
    if device.type == "cuda" and (document.max(axis=1) == 0).all():  # one piece a row: padding stands behind it
        for name, backend in SDPA_KERNELS.items():

            def call(q: Tensor, k: Tensor, v: Tensor, backend=backend) -> Tensor:
                with sdpa_kernel(backend):
                    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

            found[name] = call
    return found


def random_qkv(batch_size: int, length: int, size: str, device: torch.device, train: bool) -> list[Tensor]:
    heads = MODEL_SIZES[size]["n_head"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (batch_size, length, heads, MODEL_SIZES[size]["d_model"] // heads)
    return [torch.randn(shape, device=device, dtype=dtype, requires_grad=train) for _ in range(3)]


def dense_beside_direct(rule: AttentionRule, joint: Fields, qkv: list[Tensor], m: int, device: torch.device) -> None:
    """The dense backend against scaled_dot_product_attention with the boolean mask, per layer of a model of twelve."""
    mask = dense_mask(rule, joint, m)[:, m:]
    keys = [F.pad(x, (0, 0, 0, 0, m, 0)) for x in qkv[1:]]

    def dense() -> None:
        visibility = Visibility(mask, qkv[0].dtype)
        for _ in range(12):
            attend(qkv[0], *keys, visibility)

    def direct() -> None:
        q, k, v = (x.transpose(1, 2) for x in (qkv[0], *keys))
        for _ in range(12):
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])

    with torch.no_grad():
        (ours, _), (theirs, _) = measure(dense, device), measure(direct, device)
    print(f"    dense: {ours / 12:.2f} ms; masked sdpa called directly {theirs / 12:.2f} ms; speed {theirs / ours:.2f}")


def gathered_beside_dense(rule: AttentionRule, batch: dict, size: str) -> None:
    """Forward and backward, one layer, float32 and bfloat16: gathered beside the dense mask and the baseline."""
    joint, pieces = joint_fields(batch), PieceVisibility(batch["document"])
    rows, length = joint.document.shape
    n = batch["tokens"].shape[1]
    order = np.stack([order_of(joint.at(b), length - n) for b in range(rows)])
    start = time.process_time()
    gathered = GatheredVisibility(dense_mask(rule, joint, length - n), order)
    plan = 1e3 * (time.process_time() - start)
    pairs = sum(bias.numel() for bias in gathered.bias) / (rows * length**2)
    for dtype in (torch.float32, torch.bfloat16):
        dense, times = Visibility(dense_mask(rule, joint, length - n), dtype), {}
        for name, visibility, tokens in (
            ("causal", pieces, n),
            ("dense", dense, length),
            ("gathered", gathered, length),
        ):
            qkv = [x.to(dtype).detach().requires_grad_() for x in random_qkv(rows, tokens, size, CPU, True)]
            call = forward_backward(lambda q, k, v, x=visibility: attend(q, k, v, x), qkv, True)
            times[name] = measure(call, CPU)[0]
        print(
            f"    forward and backward, {str(dtype)[6:]}: gathered {times['gathered']:.0f} ms "
            f"({pairs:.2f} of all pairs, plan {plan:.0f} ms); speed {times['dense'] / times['gathered']:.2f} of dense, "
            f"{times['causal'] / times['gathered']:.2f} of fused causal"
        )


def one_case(batch: dict, rows: list, device: torch.device, size: str, block_sizes: list[tuple[int, int]]) -> int:
    """Prints one case; how many block sizes failed."""
    train = device.type == "cuda"
    rule, n = AttentionRule(ModelConfig(size="small")), batch["tokens"].shape[1]
    joint = joint_fields(batch)
    m, length = joint.document.shape[1] - n, joint.document.shape[1]
    qkv, results = random_qkv(len(rows), n, size, device, train), {}
    for name, call in baselines(batch, device).items():
        try:
            results[PieceVisibility.kernel(qkv[0]) if name == "pieces" else name] = measure(
                forward_backward(call, qkv, train), device
            )
        except RuntimeError as error:
            print(f"    {name}: not on this device ({str(error).splitlines()[0][:80]})")
    if not results:
        raise UserError("no kernel of the baseline runs on this device, so there is nothing to compare with")
    name, (base_ms, base_mib) = min(results.items(), key=lambda item: item[1][0])
    print(f"    baseline {name}: {base_ms:.2f} ms" + (f", {base_mib:.0f} MiB" if train else ""))

    if not train:
        dense_beside_direct(rule, joint, qkv, m, device)
        gathered_beside_dense(rule, batch, size)
    qkv, base = random_qkv(len(rows), length, size, device, train), sum(map(baseline_blocks, rows))
    failed = 0
    for block_size in block_sizes:
        shape = f"{block_size[0]:>3} x {block_size[1]:<3}"
        order = np.stack([order_of(joint.at(b), m, block=block_size[0]) for b in range(len(rows))])
        fields = Fields(*(field.gather(1, torch.from_numpy(order)) for field in joint))
        try:
            build, _ = measure(lambda f=fields, b=block_size: BlockVisibility(rule, f, m, device, b), device)
            visibility = BlockVisibility(rule, fields, m, device, block_size)
            ms, mib = measure(forward_backward(lambda q, k, v, x=visibility: attend(q, k, v, x), qkv, train), device)
        except Exception as error:  # what compilers and kernels raise has no common name; it costs this size alone
            print(f"    sparse {shape}: {in_short(error)}", flush=True)
            failed += 1
            continue
        visited = int((visibility.counts > 0).sum()) * block_size[0] * block_size[1] / 128**2 / base
        memory = f", {mib:.0f} MiB ({mib / base_mib:.2f} of the baseline's)" if train else ""
        print(
            f"    sparse {shape}: {ms:.2f} ms{memory}; blocks {visited:.3f}; "
            f"speed {base_ms / ms:.2f} of the baseline's; table {build:.1f} ms",
            flush=True,
        )
    return failed


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that preprocess_data.py wrote")
    parser.add_argument("--lengths", default="2048,8192,24576", type=whole_numbers, help="tokens in a row, on CUDA")
    parser.add_argument("--cpu_tokens", type=int, default=2048, help="tokens in a row, on a CPU")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--model_size", choices=list(MODEL_SIZES), default="base")
    parser.add_argument("--block_size", action="append", help="queries x keys, such as 64x64; may be repeated")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    block_sizes = [tuple(map(int, s.split("x"))) for s in arguments.block_size or ("64x64", "128x64", "128x128")]
    lengths = arguments.lengths if on_gpu else [arguments.cpu_tokens]
    about = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    work = "forward and backward, bf16" if on_gpu else "a reduced form: flex forward only"
    print(f"{about}; torch {torch.__version__}; {arguments.model_size} heads; {work}")
    failed = 0
    for length in lengths:
        for single in (True, False):
            rows = packed_rows(arguments.data_dir, length, arguments.batch_size, single_piece=single)
            if len(rows) < arguments.batch_size:
                print(f"{length} tokens: too few rows of one piece")
                continue
            print(f"{length} tokens x {len(rows)}, {'one piece a row' if single else 'packed'}")
            failed += one_case(stack_rows(rows), rows, device, arguments.model_size, block_sizes)
    if failed:
        raise UserError(f"{failed} block sizes failed: see above")


if __name__ == "__main__":
    exit_cleanly(main)
