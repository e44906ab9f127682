"""Whole training steps: bar-sparse against full causal of the same size, same rows, same code, one process.

    python -m benchmarks.train_step --data_dir processed/ [--sizes base,large] [--lengths 2048,24576] [--batch_size 4]

Each line: tokens/s, peak memory, share of the device's bf16 matrix rate (measured here, on an 8192^3 product; a model's
work counted as 6 x tokens x the parameters that they pass, attention left out), and how much of a step goes by while
the host prepares the batch. Equal parameters are not equal work: notes do not pass the summaries' feed-forward, and
full causal has a wider one instead. `--models` adds shared_ff, with one feed-forward for both, to tell the two apart.
`--gradient_checkpointing` keeps only what enters each layer, for long rows. On a CPU, in a reduced form: --cpu_tokens
tokens, one row, a model of two layers, dense backend.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks import in_short, whole_numbers
from benchmarks.rows import packed_rows
from meloformer.command_line import Parser
from meloformer.config import MODEL_SIZES, ModelConfig
from meloformer.device import autocast, choose_precision
from meloformer.errors import UserError, exit_cleanly
from meloformer.hid import Vocabulary
from meloformer.hid.rows import stack_rows
from meloformer.model import MeloFormer
from meloformer.model.attention import PieceVisibility

MODELS = {
    "full_causal": {"pattern": "full_causal"},
    "bar_sparse": {},
    "shared_ff": {"summary_ff": "shared"},
}


def work(model: MeloFormer, batch: dict) -> float:
    """FLOP of a training step's matrix products, attention aside: 6 for every parameter that a token passes."""
    counts = {"notes": 0, "summaries": 0}
    separate = model.config.summary_ff == "separate"
    for name, parameter in model.named_parameters():
        in_layer, of_summaries = name.startswith("layers."), "summary_feed_forward" in name
        if not of_summaries:
            counts["notes"] += parameter.numel()
        if in_layer and (of_summaries or not separate or "feed_forward" not in name):
            counts["summaries"] += parameter.numel()
    notes, summaries = (int((batch[name] >= 0).sum()) for name in ("document", "segment_document"))
    return 6.0 * (counts["notes"] * notes + counts["summaries"] * summaries * model.rule.summaries)


def matrix_rate(device: torch.device, precision: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        wait(device)
        start = time.perf_counter()
        a @ b
        wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def one_model(
    config: ModelConfig, batches: list[dict], device: torch.device, rate: float, steps: int, checkpointing: bool
) -> dict:
    """Seconds a step, peak GiB, tokens/s of real tokens."""
    torch.manual_seed(0)
    precision = choose_precision("auto", device)
    model = MeloFormer(config, Vocabulary()).to(device).train()
    model.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(batch: dict) -> float:
        start = time.perf_counter()
        inputs = model.prepare(batch)
        prepared = time.perf_counter() - start
        with autocast(device, precision):
            nats, count, _ = model.training_loss(inputs)
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return prepared

    for batch in batches[:3]:
        step(batch)
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    prepared = sum(step(batches[i % len(batches)]) for i in range(steps))
    wait(device)
    seconds = (time.perf_counter() - start) / steps
    tokens = float(np.mean([(batch["document"] >= 0).sum() for batch in batches]))
    return {
        "seconds": seconds,
        "tokens/s": tokens / seconds,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan"),
        "of matrix rate": float(np.mean([work(model, batch) for batch in batches])) / seconds / rate,
        "host prepares": prepared / steps / seconds,
        "backend": model.backend(),
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that preprocess_data.py wrote")
    parser.add_argument("--sizes", default="base", help="model sizes, with commas")
    parser.add_argument("--models", default="full_causal,bar_sparse", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--lengths", default="2048,24576", type=whole_numbers, help="tokens in a row, on CUDA")
    parser.add_argument("--cpu_tokens", type=int, default=1024, help="tokens in a row, on a CPU")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step, on CUDA")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep what enters each layer alone")
    arguments = parser.parse_args()
    arguments.models = arguments.models.split(",")
    arguments.sizes = arguments.sizes.split(",")
    for flag, known in (("models", MODELS), ("sizes", MODEL_SIZES)):
        given = getattr(arguments, flag)
        if not set(given) <= set(known):
            raise UserError(f"--{flag} is {','.join(given)}, must be among {', '.join(known)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size if on_gpu else 1
    reduced = {} if on_gpu else {"n_layer": 2}
    about = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads: a reduced form"
    rate = matrix_rate(device, choose_precision("auto", device))
    print(f"{about}; torch {torch.__version__}; matrix rate {rate / 1e12:.1f} TFLOP/s")
    failed = 0
    for length in arguments.lengths if on_gpu else [arguments.cpu_tokens]:
        for single in (True, False):
            rows = packed_rows(arguments.data_dir, length, 4 * batch_size, single_piece=single)
            batches = [stack_rows(rows[i : i + batch_size]) for i in range(0, len(rows) - batch_size + 1, batch_size)]
            if not batches:
                print(f"{length} tokens: too few rows of one piece")
                continue
            for size in arguments.sizes:
                print(f"{size}, {length} tokens x {batch_size}, {'one piece a row' if single else 'packed'}")
                results = {}
                for name in arguments.models:
                    config = ModelConfig(size=size, **MODELS[name], **reduced)
                    try:
                        r = one_model(config, batches, device, rate, arguments.steps, arguments.gradient_checkpointing)
                    except Exception as error:  # of a compiler, a kernel or the memory: it costs this model alone
                        print(f"    {name:12} {in_short(error)}", flush=True)
                        failed += 1
                        continue
                    results[name] = r
                    kernel = r["backend"]
                    if kernel == "fused":
                        kernel += f" ({PieceVisibility.kernel(torch.empty(0, device=device, dtype=torch.bfloat16))})"
                    memory = f"{r['peak GiB']:6.1f} GiB " if on_gpu else ""
                    print(
                        f"    {name:12} {1e3 * r['seconds']:8.1f} ms {r['tokens/s']:9.0f} tokens/s "
                        f"{memory}{r['of matrix rate']:5.2f} of matrix rate, "
                        f"host prepares {r['host prepares']:.2f}; {kernel}",
                        flush=True,
                    )
                causal = results.pop("full_causal", None)
                for name, r in results.items() if causal else ():
                    memory = f", memory {r['peak GiB'] / causal['peak GiB']:.2f}" if on_gpu else ""
                    speed = r["tokens/s"] / causal["tokens/s"]
                    print(f"    {name}: speed {speed:.2f}{memory} of full causal's, at equal parameters", flush=True)
    if failed:
        raise UserError(f"{failed} models failed: see above")


if __name__ == "__main__":
    exit_cleanly(main)
