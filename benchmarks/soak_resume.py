"""Kill a run with SIGKILL again and again, resume it each time, and compare it with a run that was never killed.

    python -m benchmarks.soak_resume --kills 100 --processes 2

A third of the kills come at a random moment, a third at a random file operation inside the writing of a checkpoint, and
a third are a SIGTERM in the very step of a validation, whose checkpoint the next run may write again. Each time the
next run has to go on from the step that `latest` named: training is deterministic, so one that began at 0 again would
end like the unbroken one too. What is compared, bit for bit: every line of metrics.jsonl (losses, gradient norms,
validations), the last weights, and the optimizer's moments. Exit status 1 where anything differs. The model is tiny and
on the CPU, with dropout, several epochs, a validation and a checkpoint every few steps.

What surprises: a kill inside the writing is placed by an audit hook of the interpreter, which sees each file that is
opened, renamed or removed; so no place is forgotten, and none is named here.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch

from meloformer.command_line import Parser
from meloformer.config import Config
from meloformer.errors import exit_cleanly
from meloformer.training import checkpoint, loop
from tests.training.processes import Run, records
from tests.training.small import small_config, write_corpus

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree"}
WAYS = ("at a moment", "at a validation", "while writing")  # in turn: the last may meet a step saved again
MAX_STEPS, VAL_INTERVAL = 12, 5
MOST_OPERATIONS = 60  # in three or four savings; a number beyond the run's last is no kill, and does no harm


def die_while_writing(operation: int, folder: str, rank: int) -> None:
    """SIGKILL the main rank at its file operation number `operation` under `folder`; for Run's `before`."""
    if rank != 0:
        return
    count = [0]

    def watch(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and folder in str(arguments[0]):
            count[0] += 1
            if count[0] == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def stop_in_step(step: int, rank: int) -> None:
    """SIGTERM to the main rank in its update number `step`; for Run's `before`."""
    real = loop.learning_rate

    def watched(done: int, *arguments: float) -> float:
        if rank == 0 and done + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(done, *arguments)

    loop.learning_rate = watched


def committed_step(config: Config) -> int:
    """The step that `latest` names, whether or not its folder is there; 0 without one."""
    latest = Path(config.training.output_dir) / "checkpoints" / "latest"
    return checkpoint.step_of(Path(latest.read_text().strip())) if latest.exists() else 0


def begun_at(said: str) -> int | None:
    """The step that a run says it goes on from, 0 for a new one; None where it was killed before it said anything, or
    had nothing left to do."""
    resumed = re.search(r"^resuming .*step_(\d+)", said, re.MULTILINE)
    if resumed:
        return int(resumed.group(1))
    return 0 if re.search(r"^ *steps +\d", said, re.MULTILINE) else None


def killed_run(config: Config, processes: int, kills: int, rng: np.random.Generator, seconds: float) -> Counter:
    """Bring a run to its end through `kills` kills; how they fell: WAYS, or "too late"."""
    fallen: Counter = Counter()
    checkpoints = str(Path(config.training.output_dir) / "checkpoints")

    def ended(run: Run, step: int) -> bool:
        """Whether it was finished; an error where it did not go on from `step`, or later if that was not committed."""
        begun = begun_at(run.texts[0])
        if begun is not None and begun < step:
            raise RuntimeError(f"latest named step {step}, and the next run began at {begun}: {run.texts[0]}")
        return all(code == 0 for code in run.codes) and "SIGTERM: saved" not in run.texts[0]

    while (done := sum(fallen[way] for way in WAYS)) < kills:
        how, step = WAYS[done % len(WAYS)], committed_step(config)
        if how == "at a moment":
            run = Run(config, processes)
            time.sleep(rng.uniform(0.05, 0.8 * seconds))
            run.kill()
        else:
            place = functools.partial(die_while_writing, int(rng.integers(1, MOST_OPERATIONS)), checkpoints)
            if how == "at a validation":
                place = functools.partial(stop_in_step, min((step // VAL_INTERVAL + 1) * VAL_INTERVAL, MAX_STEPS))
            run = Run(config, processes, place)
            run.finish()
        finished = ended(run, step)
        fallen["too late" if finished else how] += 1
        if finished:  # begin again, so that each kill meets a run with something left to do
            forget(config)
            seconds *= 0.8  # the unbroken run was a slow one
    step = committed_step(config)
    run = Run(config, processes)
    codes = run.finish()
    if not ended(run, step):
        raise RuntimeError(f"the run could not be brought to its end: {codes}")
    return fallen


def forget(config: Config) -> None:
    folder = Path(config.training.output_dir)
    folder.rename(folder.with_name(f"{folder.name}.{time.monotonic_ns()}"))


def differences(one: Config, other: Config) -> list[str]:
    """What two runs do not have in common, in words; empty for equal ones."""
    found = []
    for kind in ("train", "validation"):
        pairs = zip_longest(records(one, kind), records(other, kind), fillvalue={})
        unlike = [(a, b) for a, b in pairs if a != b]
        if unlike:
            a, b = unlike[0]
            what = {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b) if a.get(name) != b.get(name)}
            found.append(f"{kind}, {len(unlike)} lines, the first at step {a.get('step')} in {what}")
    folders = [checkpoint.find(config.training.output_dir) for config in (one, other)]
    for name in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        a, b = (checkpoint.read_tensors(folder / name) for folder in folders)
        if a.keys() != b.keys() or any(not torch.equal(a[key], b[key]) for key in a):
            found.append(name)
    return found


def soak(folder: Path, corpus: Path, processes: int, kills: int, seed: int) -> tuple[Counter, list[str]]:
    """(how the kills fell, what differs) of one unbroken and one killed run in `folder`."""
    given = {
        "max_steps": MAX_STEPS,
        "save_interval": 2,
        "val_interval": VAL_INTERVAL,
        "batch_size": 2 // processes,
        "resume": "auto",
    }
    straight, killed = (small_config(corpus, folder / name, **given) for name in ("straight", "killed"))
    run = Run(straight, processes)
    started = time.monotonic()  # it runs now, and what it was forked from has imported torch
    codes = run.finish()
    if codes != [0] * processes:
        raise RuntimeError(f"the unbroken run failed: {codes}")
    rng = np.random.default_rng(seed)
    fallen = killed_run(killed, processes, kills, rng, time.monotonic() - started)
    return fallen, differences(straight, killed)


def main() -> None:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder)
        started = time.monotonic()
        fallen, different = soak(folder, corpus, arguments.processes, arguments.kills, arguments.seed)
        seconds = time.monotonic() - started
    how = ", ".join(f"{count} {name}" for name, count in sorted(fallen.items()))
    result = f"DIFFERENT: {', '.join(different)}" if different else "equal"
    print(f"{arguments.processes} processes, {how}, in {seconds:.0f} s: {result}")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    exit_cleanly(main)
