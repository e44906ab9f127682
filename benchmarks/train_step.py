"""Whole training steps: bar-sparse against full causal of the same size, same rows, same code, one process.

    python -m benchmarks.train_step --data_dir processed/ [--sizes base,large] [--lengths 2048,24576] [--batch_size 4]

Each line: tokens/s, peak memory, share of the device's bf16 matrix rate (measured here, on an 8192^3 product; model
work counted as 6 x parameters x tokens, attention left out), and how much of a step goes by while the host prepares the
batch. `--gradient_checkpointing` keeps only what enters each layer, for long rows. On a CPU, in a reduced form:
--cpu_tokens tokens, one row, a model of two layers, dense backend.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

from benchmarks.rows import packed_rows
from meloformer.config import MODEL_SIZES, ModelConfig
from meloformer.device import autocast, choose_precision
from meloformer.hid import Vocabulary
from meloformer.hid.rows import stack_rows
from meloformer.model import MeloFormer
from meloformer.model.attention import PieceVisibility


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
        "of matrix rate": 6 * model.num_parameters() * tokens / seconds / rate,
        "host prepares": prepared / steps / seconds,
        "backend": model.backend(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that preprocess_data.py wrote")
    parser.add_argument("--sizes", default="base", help="model sizes, with commas")
    parser.add_argument("--lengths", default="2048,24576", help="tokens in a row, on CUDA")
    parser.add_argument("--cpu_tokens", type=int, default=1024, help="tokens in a row, on a CPU")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step, on CUDA")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--gradient_checkpointing", action="store_true", help="keep what enters each layer alone")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    batch_size = arguments.batch_size if on_gpu else 1
    reduced = {} if on_gpu else {"n_layer": 2}
    about = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads: a reduced form"
    rate = matrix_rate(device, choose_precision("auto", device))
    print(f"{about}; torch {torch.__version__}; matrix rate {rate / 1e12:.1f} TFLOP/s")
    for length in map(int, arguments.lengths.split(",")) if on_gpu else [arguments.cpu_tokens]:
        for single in (True, False):
            rows = packed_rows(arguments.data_dir, length, 4 * batch_size, single_piece=single)
            batches = [stack_rows(rows[i : i + batch_size]) for i in range(0, len(rows) - batch_size + 1, batch_size)]
            if not batches:
                print(f"{length} tokens: too few rows of one piece")
                continue
            for size in arguments.sizes.split(","):
                if size not in MODEL_SIZES:
                    parser.error(f"size is {size!r}, must be among {', '.join(MODEL_SIZES)}")
                print(f"{size}, {length} tokens x {batch_size}, {'one piece a row' if single else 'packed'}")
                results = {}
                for pattern in ("full_causal", "bar_sparse"):
                    config = ModelConfig(size=size, pattern=pattern, **reduced)
                    results[pattern] = r = one_model(
                        config, batches, device, rate, arguments.steps, arguments.gradient_checkpointing
                    )
                    kernel = r["backend"]
                    if kernel == "fused":
                        kernel += f" ({PieceVisibility.kernel(torch.empty(0, device=device, dtype=torch.bfloat16))})"
                    memory = f"{r['peak GiB']:6.1f} GiB " if on_gpu else ""
                    print(
                        f"    {pattern:12} {1e3 * r['seconds']:8.1f} ms {r['tokens/s']:9.0f} tokens/s "
                        f"{memory}{r['of matrix rate']:5.2f} of matrix rate, "
                        f"host prepares {r['host prepares']:.2f}; {kernel}",
                        flush=True,
                    )
                sparse, causal = results["bar_sparse"], results["full_causal"]
                memory = f", memory {sparse['peak GiB'] / causal['peak GiB']:.2f}" if on_gpu else ""
                print(f"    sparse: speed {sparse['tokens/s'] / causal['tokens/s']:.2f}{memory} of full causal's")


if __name__ == "__main__":
    main()
