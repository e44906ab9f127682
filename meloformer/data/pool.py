"""Worker processes that survive what they are fed: results in order, limits for each task, a second chance alone.

>>> with Pool(Encoder, config, workers=8, timeout=60, memory=2048) as pool:       # doctest: +SKIP
...     for result in pool.map(sources):                # in the order of `sources`; `Failure` where a task failed
...         ...

Every worker makes `factory(argument)` once and calls it with one task after another. A task that hangs, ends its
process or needs too much memory is tried once more, in a fresh process, while no other task runs; if that fails as
well its result is a `Failure`. Memory is bounded: the tasks and results under way are at most WINDOW a worker.

The surprise: nobody watches the clock. Each worker sets itself an alarm whose default action ends the process, even
inside a C library that never returns, and the parent sees a pipe close. So an orphan ends by itself too. On Windows,
which has neither alarms nor limits on memory, a hanging file hangs the run.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, NamedTuple

from meloformer.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

BATCH = 8  # tasks handed out at once, and results handed back: a parent woken for each takes its core from a worker
BATCHES = 2  # that a worker has, so that it never waits for the parent
WINDOW = 64  # tasks a worker by which the fastest may run ahead of the slowest
STARTS = 3  # what kills a worker, such as a system short of memory, may kill the next as it starts
OUT_OF_MEMORY = 77  # exit status of a worker
BLAS_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
TIMEOUT, MEMORY, CRASHED = "timeout", "memory", "crashed"


class Failure(NamedTuple):
    """A task without a result: its reason code, and what happened in words."""

    reason: str
    detail: str


def limit_blas_threads() -> None:
    """One thread for numpy's matrix products, in processes that start from now on and in this one before numpy is read.

    A worker is one of many, and its products are small. With a thread for each core in each worker, two workers were
    1.2 times as fast as one (docs/log.md). Who wants more says so in the environment.
    """
    for variable in BLAS_THREADS:
        os.environ.setdefault(variable, "1")


def _context(modules: Sequence[str]):
    """How processes are started. Where the system can, by a fork server that has imported the modules once for all."""
    limit_blas_threads()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def _start_server() -> None:
    """Start the fork server, where it does not run, deaf to Ctrl-C, as the workers will be that it forks: that is for
    the parent to answer, and one that came while they import modules was answered with a traceback of theirs."""
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # first: on the way it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _later() -> Iterator[None]:
    """Ctrl-C is heard at the end of the block. Not by the signal's mask, which another thread need not have."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        signal.raise_signal(signal.SIGINT)


def begin_imports(*modules: str) -> None:
    """Start the fork server of the pools to come: it imports the modules while this process does other things."""
    if _context(modules).get_start_method() == "forkserver":
        with suppress(OSError):  # nowhere to write, as on a full disk: the pool will say so
            _start_server()


def _limit_memory(megabytes: int) -> None:
    """Allow this process so much beside what it has; a larger allocation fails."""
    statm = Path("/proc/self/statm")
    if resource is None or not statm.exists():
        return
    used = int(statm.read_text().split()[5]) * resource.getpagesize()  # data and stack: what RLIMIT_DATA counts
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _set_alarm(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _serve(connection: Connection, done: Any, factory: Callable, argument: Any, timeout: float, memory: int) -> None:
    """A worker: batches of (number, task) come in, of (number, result) go out, until the pipe closes.

    `done` is memory shared with the parent: how many tasks of the batch at hand have a result.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; here for want of a fork server
    call = factory(argument)
    _limit_memory(memory)
    try:
        connection.send(None)
        while True:
            results = []
            for number, task in connection.recv():
                _set_alarm(timeout)
                results.append((number, call(task)))
                _set_alarm(0)
                done.value += 1
            done.value = 0  # before the parent can give out what comes next
            connection.send(results)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is done, or gone
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


class _Worker:
    def __init__(self, context, arguments: tuple):
        self.connection, theirs = context.Pipe()
        self._done = context.RawValue("l", 0)
        self.process = context.Process(target=_serve, args=(theirs, self._done, *arguments), daemon=True)
        with _later():  # a process that is half started complains, with a traceback, that it was told nothing
            self.process.start()
        theirs.close()  # so that the pipe closes when the process ends
        self.waiting: deque[list[tuple[int, Any]]] = deque()  # batches not answered; the first is being worked on

    def await_start(self) -> None:
        try:
            self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise UserError(
                f"a worker process cannot start (exit status {self.process.exitcode}); "
                "its message is above; more --file_memory or fewer --workers may help"
            ) from None

    def give(self, batch: list[tuple[int, Any]]) -> None:
        self.waiting.append(batch)
        with suppress(BrokenPipeError, ConnectionResetError):  # it died meanwhile; reading from it will tell
            self.connection.send(batch)

    def receive(self) -> list[tuple[int, Any]] | None:
        """(number, result) of the tasks of a batch, or None if the process has ended."""
        try:
            results = self.connection.recv()
        except (EOFError, OSError):  # OSError: it ended half-way through what it had to say
            return None
        self.waiting.popleft()
        return results

    def split(self) -> tuple[list[tuple[int, Any]], list[tuple[int, Any]]]:
        """Of a process that has ended: the task that it was at, if any, and the others that have no result here."""
        tasks = [task for batch in self.waiting for task in batch]
        at = self._done.value
        return tasks[at : at + 1], tasks[:at] + tasks[at + 1 :]

    def end(self) -> int | None:
        """Stop, and the exit status: negative for a signal."""
        self.connection.close()
        self.process.join(0.2)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        return self.process.exitcode


class Pool:
    """See the module's docstring. timeout in seconds and memory in megabytes, both for one task."""

    def __init__(self, factory: Callable, argument: Any, workers: int, timeout: float, memory: int):
        self._context = _context([factory.__module__])
        if self._context.get_start_method() == "forkserver":
            _start_server()
        self._arguments = (factory, argument, timeout, memory)
        self._timeout, self._memory = timeout, memory
        self._workers = [self._start() for _ in range(workers)]
        self._selector = DefaultSelector()  # kept: to register every worker for every answer takes longer than to wait
        for worker in self._workers:
            worker.await_start()
            self._selector.register(worker.connection, EVENT_READ, worker)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.process.kill()  # whatever it does now is not wanted
        for worker in self._workers:
            worker.end()
        self._selector.close()

    def _start(self) -> _Worker:
        return _Worker(self._context, self._arguments)

    def map(self, tasks: Iterator[Any]) -> Iterator[Any]:
        """The result of every task, in order; `Failure` where there is none."""
        numbered = enumerate(tasks)
        again: deque[tuple[int, Any]] = deque()  # given to a worker that ended before it came to them
        suspects: deque[tuple[int, Any]] = deque()  # what a worker was at when it ended
        done: dict[int, Any] = {}
        first = given = 0  # the next to yield, and the next of `tasks`
        while True:
            for worker in self._workers:
                while not suspects and len(worker.waiting) < BATCHES:
                    room = max(min(BATCH, WINDOW * len(self._workers) - (given - first)), 0)
                    batch = [again.popleft() for _ in range(min(BATCH, len(again)))] or list(islice(numbered, room))
                    if not batch:
                        break
                    given = max(given, batch[-1][0] + 1)
                    worker.give(batch)
            busy = any(worker.waiting for worker in self._workers)
            if not busy and not suspects:
                return
            if not busy:
                number, task = suspects.popleft()
                done[number] = self._alone(task)
            for event, _ in self._selector.select() if busy else ():
                worker: _Worker = event.data
                results = worker.receive()
                if results is not None:
                    done.update(results)
                    continue
                suspect, others = worker.split()
                suspects.extend(suspect)
                again.extend(others)
                self._replace(worker)
            while first in done:
                yield done.pop(first)
                first += 1

    def _replace(self, worker: _Worker) -> None:
        """Another in the place of one that has ended."""
        self._selector.unregister(worker.connection)
        worker.end()
        replacement = self._workers[self._workers.index(worker)] = self._started()
        self._selector.register(replacement.connection, EVENT_READ, replacement)

    def _started(self) -> _Worker:
        for attempt in range(1, STARTS + 1):
            worker = self._start()
            try:
                worker.await_start()
                break
            except UserError:
                if worker.process.exitcode >= 0 or attempt == STARTS:  # it ended by itself, and would again
                    raise
        return worker

    def _alone(self, task: Any) -> Any:
        worker = self._started()
        worker.give([(0, task)])
        results = worker.receive()
        status = worker.end()
        return results[0][1] if results is not None else self._failure(status)

    def _failure(self, status: int) -> Failure:
        if status == OUT_OF_MEMORY:
            return Failure(MEMORY, f"needs more than {self._memory} MB, file_memory")
        if hasattr(signal, "SIGALRM") and status == -signal.SIGALRM:
            return Failure(TIMEOUT, f"takes longer than {self._timeout:g} s, file_timeout")
        return Failure(CRASHED, f"ended its process with {f'signal {-status}' if status < 0 else f'status {status}'}")
