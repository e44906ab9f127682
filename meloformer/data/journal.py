"""What an unfinished corpus knows of itself, so that a killed run goes on where its last finished shard ended.

In the output folder, `journal/`: `started.json` (settings and input of the run), `names` (of the pieces so far, one
after another), and for every finished shard an `entry-*.safetensors`: its pieces' rows of the index and their bar
shingles, and all running totals up to there; of the shards its own alone, for all of them in every entry would take
gigabytes at ten thousand shards. An entry is written after its shard, so a shard without one is done
again.

>>> with Journal(Path("processed"), started, first_source=0) as journal:       # doctest: +SKIP
...     state = journal.state                                  # of the last entry, or a fresh State

The surprise: the journal of a part stays when the part is finished, for the merge reads its shingles.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from meloformer.data.arrays import FORMAT_VERSION, ArrayWriter, MappedArrays
from meloformer.data.corpus import INDEX, INDEX_DTYPES, META, REJECTED
from meloformer.errors import UserError
from meloformer.files import sync_directory, write_atomic

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not noticed
    fcntl = None

JOURNAL = "journal"
REMEDY = "remove the output folder and preprocess the MIDI files again"
ENTRY_DTYPES = {name: dtype for name, dtype in INDEX_DTYPES.items() if name != "cluster"} | {
    "source": np.dtype(np.int64),  # number of the piece's file in the whole input
    "name_end": np.dtype(np.int64),  # where its name ends in `names`
    "shingles": np.dtype(np.uint64),
    "shingle_offsets": np.dtype(np.int64),  # (pieces + 1,)
}


def entry_path(output: Path, number: int) -> Path:
    return output / JOURNAL / f"entry-{number:05d}.safetensors"


@dataclass
class State:
    """Running totals after some number of input files."""

    next_source: int
    rejected_bytes: int = 0  # length of rejected.jsonl
    names_bytes: int = 0
    seconds: float = 0.0
    shards: list[dict] = field(default_factory=list)
    totals: Counter = field(default_factory=Counter)
    instruments: Counter = field(default_factory=Counter)
    changed: Counter = field(default_factory=Counter)
    lengths: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)

    @classmethod
    def from_dict(cls, values: dict) -> State:
        counters = {f.name for f in dataclasses.fields(cls) if f.default_factory is Counter}
        return cls(**{name: Counter(value) if name in counters else value for name, value in values.items()})


class Journal:
    """Holds the output folder for one run. `state` is that of the last entry.

    `started` says what is being made; UserError if the folder holds the beginnings of something else.
    """

    def __init__(self, output: Path, started: dict, first_source: int):
        self.output, self.path = output, output / JOURNAL
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")  # noqa: SIM115 held until close
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._lock.close()
                raise UserError(
                    f"{output}: another run is writing here; wait for it or give another --output"
                ) from None
        try:
            self._open(started, first_source)
        except BaseException:
            self._lock.close()
            raise

    def _open(self, started: dict, first_source: int) -> None:
        self.num_entries = 0
        self.state = State(first_source)
        path = self.path / "started.json"
        text = json.dumps({"format": FORMAT_VERSION, **started}, indent=1, sort_keys=True)
        if path.exists():
            refuse_another(self.output, started, json.loads(path.read_text(encoding="utf-8")), "an unfinished corpus")
            while entry_path(self.output, self.num_entries).exists():
                self.num_entries += 1
        else:
            write_atomic(path, text.encode())
        if self.num_entries:
            states = [entry.metadata["state"] for entry in self.entries()]
            shards = {shard["file"]: shard for state in states for shard in state["shards"]}
            self.state = State.from_dict(states[-1] | {"shards": list(shards.values())})
        remove_leftovers(self.output, {shard["file"] for shard in self.state.shards})
        for path, size in (
            (self.output / REJECTED, self.state.rejected_bytes),
            (self.path / "names", self.state.names_bytes),
        ):
            with open(path, "ab") as file:
                file.truncate(size)

    def entry(self, number: int) -> MappedArrays:
        return MappedArrays(entry_path(self.output, number), REMEDY)

    def entries(self) -> Iterator[MappedArrays]:
        return map(self.entry, range(self.num_entries))

    def new_entry(self) -> ArrayWriter:
        writer = ArrayWriter(entry_path(self.output, self.num_entries), ENTRY_DTYPES)
        writer.append("shingle_offsets", [0])
        return writer

    def finish_entry(self, writer: ArrayWriter) -> None:
        state = vars(self.state) | {"shards": self.state.shards[-1:]}
        writer.close({"format": FORMAT_VERSION, "state": state})
        self.num_entries += 1

    def work(self) -> Path:
        """An empty folder for files that nobody needs later."""
        path = self.path / "work"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        return path

    def remove(self) -> None:
        self.close()
        shutil.rmtree(self.path)
        sync_directory(self.output)

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def refuse_another(output: Path, wanted: dict, found: dict, what: str) -> None:
    """UserError unless the settings and the input of what a folder holds are those of this run."""
    new, old = wanted["settings"], found.get("settings", {})
    changed = [f"{name} was {old.get(name)}, now {new[name]}" for name in new if old.get(name) != new[name]]
    if found.get("format") != FORMAT_VERSION:
        changed.append(f"format was {found.get('format')}, now {FORMAT_VERSION}")
    if found.get("input") != wanted["input"]:
        changed.append("other input files")
    if changed:
        raise UserError(
            f"{output}: holds {what} made otherwise ({'; '.join(changed)}); remove it or give another --output"
        )


def remove_leftovers(output: Path, keep: set[str]) -> None:
    """What a killed run left in a folder, beside the files to keep; nothing that this program does not write."""
    for path in (*output.glob("shard-[0-9]*.safetensors"), output / INDEX):
        if path.name not in keep:
            path.unlink(missing_ok=True)
    for name in ("shard-[0-9]*.safetensors", INDEX, META):
        for path in output.glob(f".{name}*.tmp"):
            path.unlink()
