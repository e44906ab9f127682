"""Runs in processes of their own, one or several ranks, that a test may kill.

They are forked from a server that has imported torch once, so that each starts in a tenth of a second. It is a server
of its own: the interpreter's one is often running by then, started by a preprocessing whose workers want no torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo  # the optimizer imports it at its first step: here once for all processes

from meloformer.config import Config
from meloformer.errors import exit_cleanly
from meloformer.training.loop import train

CONTEXT = multiprocessing.get_context("forkserver")
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload([__name__, "torch.utils.tensorboard"])


class Run:
    """`world_size` processes that train together. `texts` is what each has said, `codes` how each ended."""

    def __init__(self, config: Config, world_size: int = 1, before: Callable[[int], None] | None = None):
        self.outputs = [Path(f"{config.training.output_dir}.rank{rank}.txt") for rank in range(world_size)]
        for output in self.outputs:  # of a run before, whose words this one's may be taken for
            output.unlink(missing_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = [
            CONTEXT.Process(target=run_rank, args=(config, rank, world_size, port, self.outputs[rank], before))
            for rank in range(world_size)
        ]
        with mock.patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            for process in self.processes:
                process.start()

    def finish(self, timeout: float = 120) -> list[int]:
        """Exit codes of all ranks; -9 of one that was killed."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        hanging = [process for process in self.processes if process.exitcode is None]
        self.kill()
        assert not hanging, f"still running: {self.texts}"
        return self.codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def codes(self) -> list[int]:
        return [process.exitcode for process in self.processes]

    @property
    def texts(self) -> list[str]:
        return [output.read_text() if output.exists() else "" for output in self.outputs]


def run_rank(
    config: Config, rank: int, world_size: int, port: int, output: Path, before: Callable[[int], None] | None
) -> None:
    """One process: `train`, with what it says in a file. `before(rank)` may change the code it is about to run."""
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    torch.set_num_threads(1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if world_size > 1:
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in given.items()}, MASTER_ADDR="127.0.0.1")
    if before is not None:
        before(rank)
    exit_cleanly(lambda: train(config))


def records(config: Config, kind: str = "train") -> list[dict]:
    """Whole lines of a run's metrics.jsonl, without what depends on the clock; a run that still writes, or was killed
    while it did, may have half a line at the end."""
    lines = (Path(config.training.output_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name != "tokens_per_second"} for record in found]
