"""A run that is killed at any moment, inside the writing of a checkpoint too, ends like one that was not."""

from __future__ import annotations

import functools
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import soak_resume
from benchmarks.soak_resume import WAYS, die_while_writing, differences, soak
from meloformer.training import checkpoint
from tests.training.processes import Run

ROOT = Path(__file__).resolve().parents[2]
NEVER_DONE = 100_000  # steps: however long this process has to wait for a core, that run is not at its end


@pytest.mark.parametrize(("processes", "kills"), [(1, 5), (2, 4)])
def test_killed_and_resumed_equals_never_killed(corpus_dir, tmp_path, processes, kills):
    """A short soak, another place each time the seed is changed; `python -m benchmarks.soak_resume` is the long one."""
    fallen, different = soak(tmp_path, corpus_dir, processes, kills, seed=5)
    assert all(fallen[way] >= 1 for way in WAYS), fallen
    assert not different, different


@pytest.mark.parametrize(("said", "begun"), [("  steps  12, about 4 an epoch", 0), ("resuming a/step_00000003", 3)])
def test_lost_progress_is_seen(make_config, monkeypatch, said, begun):
    """Training is deterministic: a run that began at 0 after every kill ended "equal" all the same."""
    config = make_config()
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "latest").write_text("step_00000005\n")
    run = SimpleNamespace(texts=[said], codes=[0], finish=lambda: [0], kill=lambda: None)
    monkeypatch.setattr(soak_resume, "Run", lambda *arguments: run)
    with pytest.raises(RuntimeError, match=f"latest named step 5, and the next run began at {begun}"):
        soak_resume.killed_run(config, 1, 1, np.random.default_rng(0), 0.1)


def limit_file_size(rank: int) -> None:
    """What the system says at 100 kB is "File too large", where a full disk says "No space left on device"."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


def test_a_full_disk_leaves_the_old_checkpoints_whole(make_config):
    """The write itself fails half way, as on a full disk; with room again the run goes on as if never stopped."""
    whole = make_config("whole", max_steps=6)
    assert Run(whole).finish() == [0]
    config = make_config("full", max_steps=6, resume="auto", save_interval=2)
    checkpoints = str(Path(config.training.output_dir) / "checkpoints")
    run = Run(config, 1, functools.partial(die_while_writing, 60, checkpoints))
    assert run.finish() == [-signal.SIGKILL]
    before = {path.name for path in Path(checkpoints).glob("step_*")}
    assert before
    run = Run(config, 1, limit_file_size)
    assert run.finish() == [2]
    (said,) = [line for line in run.texts[0].splitlines() if line.startswith("error:")]
    assert "could not be written" in said and "make room" in said and "--resume auto" in said
    assert before <= {path.name for path in Path(checkpoints).glob("step_*")}
    assert not [path for path in Path(checkpoints).iterdir() if path.name.endswith(".tmp")]
    for name in before:
        checkpoint.check(Path(checkpoints) / name)
    assert Run(config).finish() == [0]
    assert not differences(whole, config)


def test_a_second_process_is_kept_out_of_the_folder(make_config):
    """And let in again once the first one is killed: a lock file that outlives its process would need a human."""
    config = make_config(max_steps=NEVER_DONE, resume="auto")
    first = Run(config)
    metrics = Path(config.training.output_dir) / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert first.codes == [None], first.texts
        time.sleep(0.05)
    second = make_config(max_steps=NEVER_DONE, resume="auto")
    run = Run(second)
    assert run.finish() == [2]
    assert "is training there; wait for it, stop it, or give another --output_dir" in run.texts[0]
    assert f"process {first.processes[0].pid} on" in run.texts[0]
    first.kill()
    again = Run(second)
    while not re.search(r"^ *run +\S", again.texts[0], re.MULTILINE) and again.codes == [None]:
        time.sleep(0.05)  # until it says what it trains, which it does once it is in
    again.kill()
    assert again.codes == [-signal.SIGKILL], again.texts


def test_a_run_that_was_stopped_does_not_exit_as_a_finished_one(make_config, tmp_path):
    """`make` took a model of 400 of 1,200 steps for the finished one, and went on with it."""
    config = make_config(max_steps=NEVER_DONE)
    config.save(tmp_path / "given.yaml")
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(tmp_path / "given.yaml"), "--device", "cpu"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    run.terminate()
    out, _ = run.communicate(timeout=60)
    assert "SIGTERM: saved at step" in out
    assert run.returncode == 143
