"""Writes a corpus from results in input order, in memory that does not grow with it, and goes on after a kill.

>>> with CorpusWriter(Path("processed"), settings, describe, first_source=0) as writer:       # doctest: +SKIP
...     for number, result in enumerate(results):
...         writer.add(number, result)
...     meta = writer.finish()

Settings are those that the output shows (`settings_of`). Every `shard_size` pieces a shard is closed and the journal
gets an entry; `finish` writes the index with its clusters and, last, meta.json. The surprise: of all pieces so far
16 bytes each are held, content hash and place of the name, to know the same piece when it comes again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from meloformer.config import PreprocessConfig
from meloformer.data.arrays import FORMAT_VERSION, ArrayWriter
from meloformer.data.clusters import cluster, distinct
from meloformer.data.corpus import INDEX, INDEX_DTYPES, META, REJECTED, data_hash
from meloformer.data.encoder import Encoded, Rejected
from meloformer.data.journal import Journal
from meloformer.data.shards import ShardWriter, shard_name
from meloformer.files import write_atomic
from meloformer.hid import Vocabulary
from meloformer.hid.controls import ONSET
from meloformer.midi.score import DRUMS

SETTINGS = (
    "shard_size",
    "limit",
    "min_notes",
    "min_bars",
    "max_bars",
    "resolution",
    "sustain_pedal",
    "conditions",
    "dedup",
    "part",
)
DUPLICATE = "duplicate"
SAME = "same content as "  # and the name of the piece that is kept: the detail of a duplicate
_FEW = 4096


def settings_of(config: PreprocessConfig) -> dict:
    return {name: getattr(config, name) for name in SETTINGS}


class Seen:
    """The content hashes of all pieces and where their names end: 16 bytes a piece, and a dict of the latest few."""

    def __init__(self):
        self._hashes, self._ends = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._latest: dict[int, int] = {}

    def find(self, content: int) -> int | None:
        if content in self._latest:
            return self._latest[content]
        i = int(np.searchsorted(self._hashes, np.uint64(content)))
        return int(self._ends[i]) if i < len(self._hashes) and int(self._hashes[i]) == content else None

    def add(self, contents: np.ndarray, ends: np.ndarray) -> None:
        """The first of equal hashes is kept."""
        hashes, ends = np.concatenate((self._hashes, contents)), np.concatenate((self._ends, ends))
        self._hashes, first = np.unique(hashes, return_index=True)
        self._ends = ends[first]

    def add_one(self, content: int, end: int) -> None:
        self._latest[content] = end
        if len(self._latest) == _FEW:
            latest = self._latest
            self._latest = {}
            self.add(np.fromiter(latest, np.uint64, len(latest)), np.fromiter(latest.values(), np.int64, len(latest)))


class CorpusWriter:
    def __init__(self, output: Path, settings: dict, source: dict, first_source: int = 0):
        self.output, self.settings, self.source = output, settings, source
        self.vocabulary = Vocabulary(settings["resolution"])
        self.journal = Journal(output, {"settings": settings, "input": source}, first_source)
        self.state = self.journal.state
        self._seen = Seen()
        for entry in self.journal.entries():
            self._seen.add(entry.arrays["content_hash"], entry.arrays["name_end"])
        self._rejected = open(output / REJECTED, "ab")  # noqa: SIM115 closed in close
        self._names = open(self.journal.path / "names", "ab")  # noqa: SIM115 closed in close
        self._shard: ShardWriter | None = None
        self._entry: ArrayWriter | None = None

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(self, *_) -> None:
        self._rejected.close()
        self._names.close()
        for writer in (self._shard, self._entry):
            if writer is not None:
                writer.discard()
        self.journal.close()

    @property
    def num_rejected(self) -> int:
        return self.state.reasons.total()

    def add(self, number: int, result: Encoded | Rejected) -> None:
        """What became of file `number` of the input."""
        state = self.state
        state.next_source = number + 1
        state.totals["files"] += 1
        earlier = None
        if isinstance(result, Encoded):
            earlier = self._seen.find(result.content)
            if earlier is not None and self.settings["dedup"]:
                result = Rejected(result.piece.name, DUPLICATE, SAME + self._name_before(earlier))
        if isinstance(result, Rejected):
            line = {"path": result.name, "reason": result.reason, "detail": result.detail}
            state.rejected_bytes += self._rejected.write((json.dumps(line) + "\n").encode())
            state.reasons[result.reason] += 1
            return
        self._add_piece(number, result, with_shingles=earlier is None)
        if earlier is None:
            self._seen.add_one(result.content, state.names_bytes)
        if self._entry.length("source") == self.settings["shard_size"]:
            self._flush()

    def kept(self, content: int) -> str | None:
        """Name of the piece that has this content already."""
        end = self._seen.find(content)
        return None if end is None else self._name_before(end)

    def _name_before(self, end: int) -> str:
        # A name is followed by its length in four bytes, so that it is found from its end.
        self._names.flush()
        with open(self._names.name, "rb") as names:
            names.seek(end - 4)
            size = int.from_bytes(names.read(4), "little")
            names.seek(end - 4 - size)
            return names.read(size).decode()

    def _add_piece(self, number: int, result: Encoded, with_shingles: bool) -> None:
        state, piece = self.state, result.piece
        if self._shard is None:
            self._shard = ShardWriter(self.output / shard_name(len(state.shards)), self.vocabulary.hash)
            self._entry = self.journal.new_entry()
        self._shard.add(piece)
        name = piece.name.encode()
        state.names_bytes += self._names.write(name + len(name).to_bytes(4, "little"))
        counts = {
            "num_tokens": len(piece.tokens),
            "num_segments": len(piece.segment_bar),
            "num_bars": result.num_bars,
            "num_tracks": len(result.instruments),
            "num_notes": result.num_notes,
        }
        row = {
            **counts,
            "shard": len(state.shards),
            "piece_in_shard": self._entry.length("source"),
            "num_track_bars": result.num_track_bars,
            "num_chords": int(np.count_nonzero(piece.conditions[:, ONSET] >= 0)),
            "seconds": result.seconds,
            "content_hash": result.content,
            "source": number,
            "name_end": state.names_bytes,
        }
        for column, value in row.items():
            self._entry.append_one(column, value)
        if with_shingles:
            self._entry.append("shingles", result.shingles)
        self._entry.append_one("shingle_offsets", self._entry.length("shingles"))
        state.totals["pieces"] += 1
        for column, value in counts.items():
            state.totals[column.removeprefix("num_")] += value
        for instrument in result.instruments.tolist():
            state.instruments[str(instrument)] += 1
        for rule, count in piece.changes.items():
            state.changed[rule] += count
        state.seconds += result.seconds
        state.lengths[str((len(piece.tokens) - 1).bit_length())] += 1

    def _flush(self) -> None:
        pieces, tokens = self._entry.length("source"), self._shard.num_tokens
        path = self.output / shard_name(len(self.state.shards))
        sha256, size = self._shard.close()
        self.state.shards.append(
            {"file": path.name, "sha256": sha256, "bytes": size, "pieces": pieces, "tokens": tokens}
        )
        self._rejected.flush()
        self._names.flush()
        self.journal.finish_entry(self._entry)
        self._shard = self._entry = None

    # --- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> dict:
        """Write the last shard, the index and meta.json; returns what meta.json holds."""
        with ThreadPoolExecutor(1) as other:  # the last shard is written while its pieces are compared
            names = ("content_hash", "shingle_offsets", "shingles") if self._entry is not None else ()
            last = {name: self._entry.values(name) for name in names}
            clusters = other.submit(self._clusters, self.journal.num_entries, last)
            if self._shard is not None:
                self._flush()
            clusters = clusters.result()
        state = self.state
        self._rejected.flush()
        index_sha256 = self._write_index(clusters)
        num_clusters = len(distinct(clusters))
        sizes = sorted(map(int, state.lengths))
        totals = {
            name: state.totals[name] for name in ("files", "pieces", "notes", "tokens", "bars", "segments", "tracks")
        }
        meta = {
            "format": FORMAT_VERSION,
            "data_hash": data_hash(self.vocabulary.hash, [shard["sha256"] for shard in state.shards], index_sha256),
            "vocabulary": self.vocabulary.to_dict(),
            "settings": self.settings,
            "input": self.source,
            "totals": {**totals, "hours": round(state.seconds / 3600, 3), "clusters": num_clusters},
            "rejected": dict(sorted(state.reasons.items())),
            "instruments": {
                ("drums" if i == DRUMS else str(i)): state.instruments[str(i)]
                for i in sorted(map(int, state.instruments))
            },
            # What the token grid changed or could not hold, by the rule's name; see hid.quantize and midi.read.
            "changed": dict(sorted(state.changed.items())),
            # Pieces by length in tokens: up to 1, 2, 4, 8, ... tokens.
            "length_histogram": {str(1 << i): state.lengths[str(i)] for i in range(sizes[0], sizes[-1] + 1)}
            if sizes
            else {},
            "shards": state.shards,
            "index": {"file": INDEX, "sha256": index_sha256},
        }
        write_atomic(self.output / META, (json.dumps(meta, indent=1) + "\n").encode())
        if self.settings["part"] is None:
            self.journal.remove()
        return meta

    def _clusters(self, finished: int, last: dict[str, np.ndarray]) -> np.ndarray:
        """(pieces,) uint64 cluster ids; `last` are columns of the entry that follows on so many finished ones."""

        def columns() -> Iterator[Mapping[str, np.ndarray]]:  # one entry at a time: together they are large
            yield from (self.journal.entry(number).arrays for number in range(finished))
            if last:
                yield last

        work = self.journal.work()
        contents = np.concatenate([np.zeros(0, np.uint64), *(entry["content_hash"] for entry in columns())])
        clusters = cluster(contents, _shingles(columns()), work)
        work.rmdir()
        return clusters

    def _write_index(self, clusters: np.ndarray) -> str:
        writer = ArrayWriter(self.output / INDEX, INDEX_DTYPES)
        for name in INDEX_DTYPES:
            for entry in self.journal.entries():
                if name != "cluster":
                    writer.append(name, entry.arrays[name])
        writer.append("cluster", clusters)
        return writer.close({"format": FORMAT_VERSION})[0]

    def first_rejected(self) -> tuple[str, str]:
        """Name and detail."""
        self._rejected.flush()
        with open(self.output / REJECTED, "rb") as file:
            line = json.loads(file.readline())
        return line["path"], line["detail"]

    def remove(self) -> None:
        """Take back what was begun."""
        self.journal.remove()
        (self.output / REJECTED).unlink(missing_ok=True)


def _shingles(entries: Iterable[Mapping[str, np.ndarray]]) -> Iterator[np.ndarray]:
    """Those of each piece."""
    for entry in entries:
        offsets, shingles = entry["shingle_offsets"], entry["shingles"]
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            yield shingles[first:last]
