"""FractalMIDI's costs: training step and memory by crop length, sampling by rounds, batches against leaf by leaf.

    python -m benchmarks.fractal [--parts train,checkpointing,sampling,leaf] [--crops 128,256,512,1024] [--batch_size 8]

Rolls are made, with 3 % of their cells sounding, and weights are untrained: neither changes what a step costs. Every
training figure comes from a process of its own; its peak memory is the device allocator's on CUDA, the growth of the
resident set on a CPU, parameters and optimizer included. A CPU has a reduced form: one roll a step, one roll sampled;
--cpu_time counts the process's own seconds over all its threads, for a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import whole_numbers
from meloformer.command_line import Parser
from meloformer.device import autocast, choose_precision
from meloformer.errors import UserError, exit_cleanly
from meloformer.fractal.config import FractalModel
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.sampling import sample

ROUNDS = {"fast": [4, 2, 1, 1], "standard": [8, 4, 2, 1], "high quality": [16, 8, 4, 1]}
PARTS = ("train", "checkpointing", "sampling", "leaf")
MIB = 2**20


def made_batch(rolls: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rolls of notes of four columns, about 3 % of the cells, as RollPlan's rows come."""
    rng = np.random.default_rng(seed)
    roll = np.zeros((rolls, 128, width), dtype=np.uint8)
    for i in range(rolls):
        for column in range(0, width - 3, 4):
            roll[i, rng.integers(36, 96, 4), column : column + 4] = rng.integers(40, 120)
    keys = rng.integers(2**63, size=rolls, dtype=np.uint64)
    return {"roll": roll, "valid": np.ones((rolls, width), dtype=bool), "key": keys}


def build(kinds: list[str], device: torch.device, small: bool) -> FractalMIDI:
    """The default sizes, or with `small` a model that a test can afford."""
    torch.manual_seed(0)
    sizes = {"embed_dim_list": [32, 16, 16, 16], "num_blocks_list": [1] * 4, "num_heads_list": [2] * 4} if small else {}
    return FractalMIDI(FractalModel(generator_types=kinds, **sizes)).to(device)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def resident() -> float:
    """Bytes in the resident set now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def training_step(task: dict) -> dict:
    """Seconds a step, the mean, for masks differ in how much they hide, and peak bytes of one configuration."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = time.process_time if task["cpu_time"] else time.perf_counter
    precision = choose_precision(task["precision"], device)
    model = build([task["kind"]] * 4, device, task["small"]).train()
    model.gradient_checkpointing = task["checkpointing"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    batches = [made_batch(task["batch_size"], task["crop"], seed) for seed in range(task["steps"])]
    before, seconds = resident(), 0.0
    for i in range(task["steps"] + 1):
        wait(device)
        started = clock()
        inputs = model.prepare(batches[i - 1])
        with autocast(device, precision):
            nats, count, _ = model.training_loss(inputs)
        (nats / count).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait(device)
        if i:  # the first one warms
            seconds += (clock() - started) / task["steps"]
    if device.type == "cuda":
        return {"seconds": seconds, "bytes": torch.cuda.max_memory_allocated()}
    return {"seconds": seconds, "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def in_its_own_process(task: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.fractal", "--one", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # a CUDA error ends in advice: what went wrong stands before it
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"refused": next((line for line in reversed(lines) if "Error" in line), lines[-1])}
    return json.loads(done.stdout)


def train_table(options: argparse.Namespace, task: dict) -> bool:
    """Whether every configuration could be measured."""
    every = True
    print("training step:     crop   rolls   seconds   columns/s   peak MiB", flush=True)
    for kind in options.kinds.split(","):
        for crop in options.crops:
            found = in_its_own_process({**task, "kind": kind, "crop": crop})
            if "refused" in found:
                print(f"  {kind:15} {crop:6} {task['batch_size']:7}   {found['refused']}", flush=True)
                every = False
                continue
            speed = crop * task["batch_size"] / found["seconds"]
            print(
                f"  {kind:15} {crop:6} {task['batch_size']:7} {found['seconds']:9.3f} {speed:11.0f} "
                f"{found['bytes'] / MIB:10.0f}",
                flush=True,
            )
    return every


def checkpointing_table(options: argparse.Namespace, task: dict) -> bool:
    """Whether every configuration could be measured."""
    crop, every = options.checkpointing_crop, True
    for kind in options.kinds.split(","):
        both = [in_its_own_process({**task, "kind": kind, "crop": crop, "checkpointing": on}) for on in (False, True)]
        if any("refused" in found for found in both):
            print(f"activation checkpointing, {kind}, crop {crop}: {both}")
            every = False
            continue
        off, on = both
        print(
            f"activation checkpointing, {kind}, crop {crop}, {task['batch_size']} rolls: {off['bytes'] / MIB:.0f} -> "
            f"{on['bytes'] / MIB:.0f} MiB ({1 - on['bytes'] / off['bytes']:.0%} less, 40 % wanted), "
            f"{on['seconds'] / off['seconds']:.2f} of the time",
            flush=True,
        )
    return every


def timed(draw, model: FractalMIDI, width: int, rounds: list[int], number: int, clock) -> float:
    known, keep = np.zeros((number, 128, width), np.uint8), np.zeros((number, width), bool)
    wait(model.device)
    started = clock()
    draw(model, known, keep, rounds)
    wait(model.device)
    return clock() - started


def sampling_table(options: argparse.Namespace, device: torch.device, number: int, clock) -> None:
    print(f"sampling {number} rolls of {options.width} columns:   rounds          seconds   columns/s", flush=True)
    for kind in options.kinds.split(","):
        model = build([kind] * 4, device, options.small).eval()
        timed(sample, model, 16, [1] * 4, 1, clock)  # warm
        lists = ROUNDS if kind == "mar" else {"any": ROUNDS["standard"]}  # an ar level has no rounds
        for name, rounds in lists.items():
            seconds = timed(sample, model, options.width, rounds, number, clock)
            shown = " ".join(map(str, rounds)) if kind == "mar" else "-"
            print(
                f"  {kind:5} {name:24} {shown:14} {seconds:9.2f} {number * options.width / seconds:11.0f}", flush=True
            )


def leaf_ratio(options: argparse.Namespace, device: torch.device, clock) -> None:
    """The same roll sampled twice: all patches of a round in one batch below, and every patch and cell alone.

    Both run a level once a round and problem, as the algorithm has it: equal arithmetic, cut into other pieces.
    """
    rounds = ROUNDS["standard"]
    model = build(["mar"] * 4, device, options.small).eval()
    timed(sample, model, 16, [1] * 4, 1, clock)
    width = options.leaf_width
    batched = timed(sample, model, width, rounds, 1, clock)
    slow = timed(partial(sample, leaf_by_leaf=True), model, width, rounds, 1, clock)
    print(
        f"mar, {width} columns, 8 4 2 1: leaf by leaf {slow:.1f} s, in batches {batched:.2f} s: "
        f"{slow / batched:.1f} times faster (20 wanted at 256)",
        flush=True,
    )


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--kinds", default="mar,ar", help="generators")
    parser.add_argument("--crops", default="128,256,512,1024", type=whole_numbers, help="columns of a training roll")
    parser.add_argument("--checkpointing_crop", type=int, default=512)
    parser.add_argument("--batch_size", type=int, help="rolls of a step (default: 8 on CUDA, 1 on a CPU)")
    parser.add_argument("--samples", type=int, help="rolls sampled at once (default: 8 on CUDA, 1 on a CPU)")
    parser.add_argument("--width", type=int, default=256, help="columns of a sampled roll")
    parser.add_argument("--leaf_width", type=int, default=256, help="columns sampled both ways")
    parser.add_argument("--steps", type=int, default=5, help="training steps that are timed")
    parser.add_argument("--precision", default="32", choices=["32", "bf16", "auto"])
    parser.add_argument("--threads", type=int, help="of torch (default: torch's own)")
    parser.add_argument("--cpu_time", action="store_true", help="the process's own seconds")
    parser.add_argument("--small", action="store_true", help="a model of a few thousand parameters, to try this out")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        task = json.loads(options.one)
        if task["threads"]:
            torch.set_num_threads(task["threads"])
        print(json.dumps(training_step(task)))
        return
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}, received {options.parts}")
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    clock = time.process_time if options.cpu_time else time.perf_counter
    batch_size = options.batch_size or (8 if on_gpu else 1)
    about = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    model = build(["mar"] * 4, torch.device("cpu"), options.small)
    print(
        f"{about}; torch {torch.__version__}; {model.num_parameters() / 1e6:.1f}M parameters, {options.precision}; "
        f"{'process' if options.cpu_time else 'wall'} seconds"
    )
    task = {
        "batch_size": batch_size,
        "checkpointing": False,
        "cpu_time": options.cpu_time,
        "precision": options.precision,
        "small": options.small,
        "steps": options.steps,
        "threads": options.threads,
    }
    every = True
    if "train" in parts:
        every &= train_table(options, task)
    if "checkpointing" in parts:
        every &= checkpointing_table(options, task)
    if "sampling" in parts:
        sampling_table(options, device, options.samples or (8 if on_gpu else 1), clock)
    if "leaf" in parts:
        leaf_ratio(options, device, clock)
    if not every:
        raise UserError("some configurations were refused: see the table")


if __name__ == "__main__":
    exit_cleanly(main)
