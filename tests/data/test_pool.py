"""The pool: results in order, and a task that hangs, dies or eats memory costs itself alone."""

import multiprocessing
import os
import signal
import struct
import threading
import time
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from meloformer.data import pool
from meloformer.data.pool import CRASHED, MEMORY, TIMEOUT, WINDOW, Failure, Pool
from meloformer.errors import UserError


class Odd:
    """A worker's callable whose tasks say what goes wrong; `folder` counts the attempts."""

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if (self.folder / "broken").exists():
            os._exit(3)

    def __call__(self, task: str) -> str:
        what, _, which = task.partition(" ")
        if what != "good":
            with open(self.folder / task, "a") as file:
                file.write("x")
        if what == "hang":
            time.sleep(100)
        elif what == "stuck":  # inside a system call with every signal blocked that can be
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            time.sleep(100)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "leave":
            os._exit(5)
        elif what == "eat":
            return str(np.ones(1 << 28).sum())  # two gigabytes
        elif what == "once" and (self.folder / task).read_text() == "x":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif what == "slow":
            time.sleep(0.05)
        return which


def results(tmp_path, tasks, workers=2, timeout=60.0) -> list:
    with Pool(Odd, str(tmp_path), workers, timeout, 256) as pool:
        return list(pool.map(iter(tasks)))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_whatever_takes_how_long(tmp_path, workers):
    tasks = [f"{'slow' if i % 37 == 0 else 'good'} {i}" for i in range(200)]
    assert results(tmp_path, tasks, workers) == [str(i) for i in range(200)]
    assert results(tmp_path, [], workers) == []


# A limit of time holds for every task, and one in a process that waits for a core takes long: none where nothing hangs.
@pytest.mark.parametrize(
    ("timeout", "wrong"),
    [
        (
            60.0,
            {
                "die 3": Failure(CRASHED, "ended its process with signal 9"),
                "leave 4": Failure(CRASHED, "ended its process with status 5"),
                "eat 5": Failure(MEMORY, "needs more than 256 MB, file_memory"),
            },
        ),
        (2.0, dict.fromkeys(["hang 1", "stuck 2"], Failure(TIMEOUT, "takes longer than 2 s, file_timeout"))),
    ],
)
def test_what_goes_wrong_costs_one_task_and_is_tried_twice(tmp_path, timeout, wrong):
    tasks = [f"good {i}" for i in range(60)]
    for i, task in enumerate(wrong):
        tasks.insert(7 + 9 * i, task)
    found = results(tmp_path, tasks, timeout=timeout)
    assert [r for r in found if not isinstance(r, Failure)] == [str(i) for i in range(60)]
    for task, failure in wrong.items():
        assert found[tasks.index(task)] == failure
        assert (tmp_path / task).read_text() == "xx"


def test_the_second_chance_is_a_real_one(tmp_path):
    tasks = [f"once {i}" if i in (0, 11, 12, 29) else f"good {i}" for i in range(30)]
    assert results(tmp_path, tasks) == [str(i) for i in range(30)]


def test_a_worker_that_somebody_kills_is_replaced(tmp_path):
    with Pool(Odd, str(tmp_path), 2, 10, 256) as pool:
        threading.Timer(0.2, lambda: os.kill(pool._workers[0].process.pid, signal.SIGKILL)).start()
        assert list(pool.map(f"slow {i}" for i in range(30))) == [str(i) for i in range(30)]


def test_ctrl_c_waits_until_a_worker_has_started(tmp_path, monkeypatch):
    """One that was half started complained, with a traceback, that it was told nothing."""
    connect, launch, launched = forkserver.connect_to_new_process, popen_forkserver.Popen._launch, []

    def interrupted(fds):
        found = connect(fds)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(forkserver, "connect_to_new_process", interrupted)
    monkeypatch.setattr(popen_forkserver.Popen, "_launch", lambda *given: launch(*given) or launched.append(given))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Pool(Odd, str(tmp_path), 2, 10, 256)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(launched) == 1


def test_a_worker_that_dies_while_it_hands_over_its_results_has_ended(tmp_path):
    """A system short of memory kills it half-way through a message, which is no end of file and was an OSError."""
    ours, theirs = multiprocessing.Pipe()
    os.write(theirs.fileno(), struct.pack("!i", 100) + b"half")
    theirs.close()
    assert pool._Worker.receive(SimpleNamespace(connection=ours)) is None
    ours.close()


def test_the_fast_do_not_run_ahead_of_the_slow_without_bound(tmp_path):
    """Results that wait for a hanging file once filled the memory."""
    taken = 0

    def tasks():
        nonlocal taken
        for task in ["hang x", *("good y" for _ in range(5 * WINDOW))]:
            taken += 1
            yield task

    with Pool(Odd, str(tmp_path), 2, 1.0, 256) as pool:
        found = pool.map(tasks())
        assert next(found).reason == TIMEOUT
        assert taken <= 2 * WINDOW
        assert len(list(found)) == 5 * WINDOW


def test_workers_that_cannot_start_are_one_line_and_no_endless_loop(tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(UserError, match=r"a worker process cannot start \(exit status 3\)"):
        results(tmp_path, ["good 1"])


def test_a_worker_leaves_the_other_cores_to_the_others(monkeypatch):
    """With a thread for each core in each worker, numpy's matrix products made two workers 1.2 times one."""
    for variable in pool.BLAS_THREADS:
        monkeypatch.delenv(variable, raising=False)
    pool._context([__name__])
    assert {os.environ[variable] for variable in pool.BLAS_THREADS} == {"1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    pool._context([__name__])
    assert os.environ["OMP_NUM_THREADS"] == "3"
