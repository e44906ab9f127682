"""What is owed on one GPU, in one lease: tests, attention, training steps, decoding, FractalMIDI, a limit for each.

    python -m benchmarks.on_gpu --data_dir processed/ --output gpu/ [--minutes 25] [--parts tests,attention] [--small]

Every part is a process of its own, so that one which fails, hangs or runs out of memory costs itself alone. What it
prints is added to `<output>/on_gpu.txt` as it comes, and when it has ended a line to `<output>/on_gpu.jsonl`: device,
versions, command, exit code, seconds. On the screen: how each part went, and its lines with ratios. A part that would
go beyond --minutes is cut short, or skipped. `--small` tries it all out, on a CPU too. Exit code 1 if a part failed.

The surprise: parts stand in the order of what is owed most, for a lease may end at any moment; a lease in pieces is
served by --minutes 9 and --parts. Several GPUs (NCCL), --compile and FractalMIDI's checkpointing are not in it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from meloformer.command_line import Parser
from meloformer.data import Corpus
from meloformer.errors import exit_cleanly
from meloformer.files import make_folder

LONG = 24576
KEPT = ("speed", "blocks", "baseline", "sparse", "causal", "passed", "failed", "skipped", "tokens", "Error", "columns")
KEPT += ("  mar", "  ar")  # lines of FractalMIDI's tables
Part = tuple[int, list[str]]  # seconds, and what follows `python -m`


def parts(data_dir: str, small: bool) -> dict[str, Part]:
    """name -> limit in seconds and the module with its arguments, the most important first."""
    data = ["--data_dir", data_dir]
    if small:
        cpu = ["--cpu_tokens", "512"]
        return {
            "tests": (300, ["pytest", "tests/model/test_backends.py", "-k", "cuda", "-q", "-rs"]),
            "attention": (120, ["benchmarks.attention", *data, *cpu, "--lengths", "512", "--block_size", "64x64"]),
            "train_step": (120, ["benchmarks.train_step", *data, *cpu, "--lengths", "512", "--steps", "2"]),
            "generate": (120, ["benchmarks.generate", "--size", "small", "--contexts", "300", "--rounds", "1"]),
            "fractal": (120, ["benchmarks.fractal", "--small", "--crops", "128", "--parts", "train"]),
        }
    attention, step = ["benchmarks.attention", *data], ["benchmarks.train_step", *data, "--steps", "6"]
    sizes = [word for size in ("64x32", "128x64", "128x128") for word in ("--block_size", size)]
    long, checkpointing = ["--lengths", str(LONG)], "--gradient_checkpointing"
    return {
        "tests": (230, ["pytest", "tests/model", "tests/generation/test_on_device.py", "-k", "cuda", "-q", "-rs"]),
        "attention_64x64": (240, [*attention, "--lengths", f"{LONG},2048", "--block_size", "64x64"]),
        "train_base": (210, [*step, *long, checkpointing, "--sizes", "base", "--batch_size", "4"]),
        "train_short": (120, [*step, "--lengths", "2048", "--sizes", "base", "--batch_size", "16"]),
        "generate": (150, ["benchmarks.generate", "--device", "cuda", "--size", "base"]),
        "attention_other_blocks": (180, [*attention, *long, *sizes]),
        "train_large": (160, [*step, *long, checkpointing, "--sizes", "large", "--batch_size", "2"]),
        "fractal": (120, ["benchmarks.fractal", "--precision", "bf16", "--parts", "train,sampling"]),
        "attention_8192": (90, [*attention, "--lengths", "8192", "--block_size", "64x64"]),
    }


def run(command: list[str], limit: float, log: Path) -> tuple[int | str, float]:
    """Exit code, or "time" where `limit` seconds were not enough, and seconds; what it prints is added to `log`."""
    start, environment = time.perf_counter(), {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"$ python -m {' '.join(command)}\n")
        out.flush()
        # A session of its own: what it has started must end with it, or it would keep the device's memory.
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = "time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, time.perf_counter() - start


def about() -> dict[str, str]:
    """Device and versions."""
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "memory": f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB" if cuda else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder that preprocess_data.py wrote")
    parser.add_argument("--output", required=True, help="folder for what comes out")
    parser.add_argument("--minutes", type=float, default=25, help="of the whole (25)")
    parser.add_argument("--parts", help="some of them, with commas")
    parser.add_argument("--small", action="store_true", help="try the script out, on a CPU too")
    arguments = parser.parse_args()
    if not (arguments.small or torch.cuda.is_available()):
        parser.error("no CUDA device is here; --small tries the script out without one")
    Corpus(arguments.data_dir)  # a wrong word here would cost every part its start
    chosen = parts(arguments.data_dir, arguments.small)
    if arguments.parts:
        unknown = set(arguments.parts.split(",")) - set(chosen)
        if unknown:
            parser.error(f"--parts has {', '.join(sorted(unknown))}; there are {', '.join(chosen)}")
        chosen = {name: chosen[name] for name in arguments.parts.split(",")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by way of `finally` in `run`: no part outlives this script
    output, start, failed = Path(arguments.output), time.perf_counter(), False
    make_folder(output)
    log, table = output / "on_gpu.txt", output / "on_gpu.jsonl"
    here = about()
    print(" · ".join(text for text in here.values() if text), flush=True)
    for name, (limit, command) in chosen.items():
        left = 60 * arguments.minutes - (time.perf_counter() - start)
        code, seconds = "skipped", 0.0
        before = log.stat().st_size if log.exists() else 0
        if left > 20:
            code, seconds = run(command, min(limit, left), log)
        failed |= code != 0
        result = {"part": name, "command": " ".join(command), "exit": code, "seconds": round(seconds, 1), **here}
        with open(table, "a", encoding="utf-8") as out:
            out.write(json.dumps(result) + "\n")
        print(f"{name:24} {'well' if code == 0 else f'exit {code}':10} {seconds:6.0f} s", flush=True)
        if code != "skipped":
            lines = log.read_bytes()[before:].decode("utf-8", errors="replace").splitlines()[1:]
            shown = [line for line in lines if any(word in line for word in KEPT)] if code == 0 else lines[-6:]
            print("\n".join(f"    {line.strip()[:150]}" for line in shown[-14:]), flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    exit_cleanly(main)
