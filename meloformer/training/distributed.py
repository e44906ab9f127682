"""The processes of a run and what they say to one another: the one owner of process groups.

`joined(device)` reads torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, the rendezvous), or finds none, and gives a
`Ranks`: rank, world_size, is_main, and the few collectives that the loop needs. In a single process each returns
what it was given, so the loop has one path.

    with joined("auto") as ranks:
        targets = ranks.sum(step.num_targets)           # a whole number; `sum_arrays` for numpy arrays
        ...backward passes...
        ranks.sum_gradients(parameters)                 # once a step, after its last backward pass
        fixed = ranks.broadcast(fixed)                  # what JSON holds; `broadcast_tensors` for dicts of tensors

What surprises: gradients are summed, never averaged. The loss is divided by the global number of targets before the
backward pass, so the sum over ranks is the gradient of the whole step however its rows were shared out.

A rank that fails says so in one line, or with one traceback; the others notice, say nothing, and end with it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from meloformer.device import choose_device
from meloformer.errors import SPEAKING, UserError

BUCKET = 2**23  # elements summed in one message: 32 MiB, so that copying one overlaps with sending another
# What one rank may do while the others wait for it: write a checkpoint to a slow disk, generate a sample. A machine
# that loses its power without closing its connections is noticed after as long.
TIMEOUT = timedelta(minutes=30)
PATIENCE = 5.0  # seconds, for the others to leave

T = TypeVar("T")


class LostRank(UserError):
    """Another process of the run has gone."""


class Ranks:
    """This process among those of the run. Every rank calls the same methods in the same order."""

    def __init__(self, rank: int = 0, world_size: int = 1, device: torch.device | None = None):
        self.rank, self.world_size = rank, world_size
        self.device = device or torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, value: int) -> int:
        """Sum over ranks."""
        return int(self.sum_arrays(np.int64(value))[0])

    def sum_arrays(self, *arrays: np.ndarray) -> list[np.ndarray]:
        """Sums over ranks of several arrays in one message, added in float64, each in its own shape and type."""
        if self.world_size == 1:
            return list(arrays)
        flat = torch.from_numpy(np.concatenate([np.asarray(a, dtype=np.float64).ravel() for a in arrays]))
        _talk(dist.all_reduce, flat)
        parts = np.split(flat.numpy(), np.cumsum([np.size(a) for a in arrays])[:-1])
        return [part.reshape(np.shape(a)).astype(np.asarray(a).dtype) for part, a in zip(parts, arrays)]

    def highest(self, value: int) -> int:
        """The largest of the ranks' values."""
        if self.world_size == 1:
            return value
        found = torch.tensor(value)
        _talk(dist.all_reduce, found, dist.ReduceOp.MAX)
        return int(found)

    def sum_tensor(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, of a tensor on the run's device."""
        if self.world_size > 1:
            _talk(dist.all_reduce, tensor)
        return tensor

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks; a rank that had no rows for a parameter counts as zero."""
        if self.world_size == 1:
            return
        sent = []
        for bucket in buckets(parameters, BUCKET):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
            for p in bucket:
                p.grad = None  # its copy is on the way: a whole model's gradients need not stand in memory twice
            sent.append((_talk(dist.all_reduce, flat, async_op=True), flat, bucket))
        for work, flat, bucket in sent:
            _talk(work.wait)
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = gradient.view_as(p)

    def broadcast(self, value: T, source: int = 0) -> T:
        """`source`'s value, of what JSON holds; the others' is not looked at."""
        if self.world_size == 1:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = self.highest(len(data))
        text = torch.frombuffer(bytearray(data.ljust(size)), dtype=torch.uint8)
        _talk(dist.broadcast, text, source)
        return json.loads(text.numpy().tobytes())

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank, of what JSON holds."""
        return [self.broadcast(value, source) for source in range(self.world_size)]

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """The main rank's tensors, on the CPU: a resumed run needs its checkpoint on one machine only.

        They may be on a GPU there. Sent from it they would go through NCCL while the others wait for gloo, for ever.
        """
        if self.world_size == 1:
            return tensors
        names = {name: (list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in (tensors or {}).items()}
        got = {}
        for name, (shape, dtype) in self.broadcast(names).items():
            got[name] = tensors[name].cpu() if self.is_main else torch.empty(shape, dtype=getattr(torch, dtype))
            _talk(dist.broadcast, got[name], 0)
        return got

    def wait(self) -> None:
        """Until every rank is here."""
        self.highest(0)


def buckets(parameters: list[nn.Parameter], size: int) -> Iterator[list[nn.Parameter]]:
    """Neighbours together, `size` elements at most; a larger parameter goes alone.

    >>> [len(b) for b in buckets([torch.zeros(n) for n in (2, 3, 9, 1, 1)], 5)]
    [2, 1, 2]
    """
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if bucket and held + parameter.numel() > size:
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.numel()
    if bucket:
        yield bucket


def _talk(collective: Callable, *arguments: Any, **options: Any) -> Any:
    """Call a collective; LostRank where its connection breaks."""
    try:
        return collective(*arguments, **options)
    except RuntimeError as error:
        reason = " ".join(str(error).split()).split("] ", 1)[-1].split(". ")[0]  # without the place in gloo's source
        raise LostRank(
            f"another process of the run has ended ({reason}); its own message, or the system's log where it was "
            "killed, says why; go on with --resume auto"
        ) from None


# --- joining and failing ----------------------------------------------------------------------------------------


def rank_and_size() -> tuple[int, int]:
    """(rank, world_size) that torchrun's environment states; (0, 1) without one."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined(device_name: str) -> Iterator[Ranks]:
    """The run's processes, connected until the end of the block. gloo carries what is on the CPU, NCCL what is on GPUs.

    A UserError in any rank ends all of them: it is printed once, by the rank that failed first, and every rank exits
    with status 2.
    """
    rank, world_size = rank_and_size()
    if world_size == 1:
        if "," in device_name:
            count = len(device_name.split(","))
            raise UserError(
                f"devices is {device_name!r}, and this is one process; start {count} with torchrun "
                f"--nproc_per_node={count} train.py .., or name one GPU"
            )
        yield Ranks(device=choose_device(device_name))
        return
    store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    failures = dist.PrefixStore("failures", store)
    try:
        if device_name.startswith("cuda:"):
            raise UserError(f"device is {device_name!r}, and there are {world_size} processes; say cuda, one GPU each")
        device = choose_device(device_name, int(os.environ.get("LOCAL_RANK", rank)))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
        ranks = Ranks(rank, world_size, device)
        yield ranks
        ranks.wait()  # the main rank keeps the store, and may still be writing: leave together
        dist.destroy_process_group()
    except Exception as error:
        first = _is_first_to_fail(failures)
        if first and isinstance(error, UserError):
            print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        elif first:
            traceback.print_exc()
        _leave_together(failures, first, rank, world_size)
        sys.exit(2 if isinstance(error, UserError) else 1)


def _leave_together(failures: dist.Store, first: bool, rank: int, world_size: int) -> None:
    """Stay until the first to fail has spoken, for torchrun ends all processes when one has ended; and where this one
    keeps the store that tells who was the first, until the others have left.

    torchrun's own agent keeps it; another launcher leaves it to rank 0.
    """
    keeps_store = rank == 0 and "TORCHELASTIC_RUN_ID" not in os.environ
    with suppress(RuntimeError):  # the store went with the rank that kept it
        if first:
            failures.add("said", 1)
        if keeps_store:
            if not dist.is_initialized() or torch.cuda.is_initialized():
                return
            dist.destroy_process_group()  # breaks the connections that they wait on
        _wait(lambda: failures.add("said", 0) > 0, SPEAKING)
        failures.add("left", 1)
        if keeps_store:
            _wait(lambda: failures.add("left", 0) == world_size, PATIENCE)


def _wait(until: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        time.sleep(0.02)


def _is_first_to_fail(failures: dist.Store) -> bool:
    try:
        return failures.add("count", 1) == 1
    except RuntimeError:  # the store went with the rank that kept it, and so did what that rank had to say
        return True
