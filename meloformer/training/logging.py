"""What a run says: a table before the first step, a progress bar on stderr, metrics.jsonl, TensorBoard if installed.

metrics.jsonl holds one JSON object a line. Every record has `step` (updates done) and `kind`:

    {"kind": "train", "step": 20, "epoch": 0, "loss": 2.31, "lr": 0.0003, "grad_norm": 0.8, ...}
    {"kind": "validation", "step": 20, "nats_per_note": 7.1, "by_type": {"T": {..}, ..}, "by_task": {"track": 5.2, ..}}

>>> cut_back(Path("runs/base/metrics.jsonl"), step=500)   # doctest: +SKIP

What surprises: resuming rewrites the file without the records after the checkpoint, so that each step stands in
it once however often the run was killed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meloformer.errors import UserError
from meloformer.files import write_atomic

METRICS = "metrics.jsonl"


class RunLog:
    """The places that a record goes to. `step` is the one that the run continues from, with its validation yet to come
    where that is due; `unit` is what has a loss, and `tags` are TensorBoard's names of numbers where they are others
    than kind/name."""

    def __init__(
        self,
        run: Path,
        step: int,
        max_steps: int,
        unit: str = "tokens",
        tags: dict[str, str] | None = None,
        validation_due: bool = False,
    ):
        self.unit, self.tags = unit, tags or {}
        cut_back(run / METRICS, step, validation_due)
        self.file = open(run / METRICS, "a", encoding="utf-8")  # noqa: SIM115  (closed in close)
        self.board = open_tensorboard(run, step)
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            file=sys.stderr,  # stdout has the lines that stay
            # Into a file or a CI log, a line now and then is enough.
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def train(self, record: dict) -> None:
        self._write({"kind": "train", **record})
        nan = float("nan")  # null in the record where every update was skipped
        loss, grad_norm = (nan if record[name] is None else record[name] for name in ("loss", "grad_norm"))
        self.bar.set_postfix_str(
            f"loss {loss:.3f}, lr {record['lr']:.1e}, grad {grad_norm:.2f}, "
            f"{record[f'{self.unit}_per_second']:,.0f} {self.unit}/s",
            refresh=False,
        )

    def validation(self, record: dict, line: str) -> None:
        self._write({"kind": "validation", **record})
        self.say(f"step {record['step']:>6}  validation: {line}")

    def preview(self, step: int, files: list[Path], images: dict[str, np.ndarray]) -> None:
        """Say where generated pieces are; `images`, (H, W, 3) uint8 by tag, go to TensorBoard."""
        self.say(f"step {step:>6}  sample: {', '.join(map(str, files))}")
        if self.board is not None:
            for tag, image in images.items():
                self.board.add_image(tag, image, step, dataformats="HWC")

    def advance(self) -> None:
        self.bar.update()

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """The bar says what it waits for meanwhile."""
        self.bar.set_description(what)
        try:
            yield
        finally:
            self.bar.set_description(refresh=False)

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def sync(self) -> None:
        """Everything written so far is on disk: called before a checkpoint, which must not be ahead of its log."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from None

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(
            f"{self.file.name}: {error.strerror}; the checkpoints are whole: make room and go on with --resume auto"
        )

    def _write(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise self._cannot_write(error) from None
        if self.board is not None:
            for name, value in flatten(record):
                tag = f"{record['kind']}/{name}"
                self.board.add_scalar(self.tags.get(tag, tag), value, record["step"])


class SilentLog:
    """A RunLog that goes nowhere: of the run's processes one writes."""

    def close(self) -> None:
        pass

    def _ignore(self, *arguments: object) -> None:
        pass

    train = validation = preview = say = _ignore

    def advance(self) -> None:
        pass

    def busy(self, what: str) -> AbstractContextManager:
        return nullcontext()


def flatten(record: dict, prefix: str = ""):
    """(path, number) of every number in a nested record, `step` apart."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and key != "step":
            yield prefix + key, value


def open_tensorboard(run: Path, step: int):
    """A writer into the run's folder that hides what was logged after `step` before; None where not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)


def cut_back(path: Path, step: int, validation_due: bool = False) -> None:
    """Drop records after `step`, its own validation too where that is due, and a last line that a kill cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        is_due = validation_due and record["kind"] == "validation" and record["step"] == step
        if line.endswith(b"\n") and record["step"] <= step and not is_due:
            kept.append(line)
    write_atomic(path, b"".join(kept))


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns, the second aligned.

    >>> print(table([("model", "small"), ("device", "cpu")]))
      model   small
      device  cpu
    """
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
