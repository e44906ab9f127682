"""A preprocessed corpus, opened: its index in memory, its shards as memory maps.

In: the folder that preprocess_data.py wrote (meta.json, index.safetensors, shard-*.safetensors). Pieces are numbered
0 .. num_pieces - 1 through all shards, in input order.

>>> corpus = Corpus("processed")                                        # doctest: +SKIP
>>> corpus.num_pieces, corpus.hash, corpus.index["num_bars"].max()      # doctest: +SKIP
(75, '5f0c...', 341)
>>> tokens = corpus.piece(0)                                            # doctest: +SKIP

The surprise: opening checks sizes only, so that a terabyte opens at once; each piece is checked against its content
hash when it is read, and `verify()` checks every byte.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from meloformer.data.arrays import FORMAT_VERSION, DataError, MappedArrays
from meloformer.data.shards import REMEDY, SegmentTable, Shard, content_hash
from meloformer.files import checksum
from meloformer.hid.vocabulary import Vocabulary

META, INDEX, REJECTED = "meta.json", "index.safetensors", "rejected.jsonl"
# One row a piece; (num_pieces,) each. num_track_bars: BAR tokens of its tracks, the conductor's not counted.
# num_chords: of its conditions, which are not among num_tokens; of any other kind a piece, a track or a bar has one.
INDEX_DTYPES = {
    "shard": np.dtype(np.int32),
    "piece_in_shard": np.dtype(np.int32),
    "num_tokens": np.dtype(np.int64),
    "num_segments": np.dtype(np.int32),
    "num_bars": np.dtype(np.int32),
    "num_tracks": np.dtype(np.int32),
    "num_notes": np.dtype(np.int32),
    "num_track_bars": np.dtype(np.int32),
    "num_chords": np.dtype(np.int32),
    "seconds": np.dtype(np.float64),
    "content_hash": np.dtype(np.uint64),
    "cluster": np.dtype(np.uint64),
}


def data_hash(vocabulary_hash: str, shard_checksums: list[str], index_checksum: str) -> str:
    """16 hex digits that name a corpus: what a checkpoint stores, and refuses to resume without."""
    text = json.dumps([FORMAT_VERSION, vocabulary_hash, shard_checksums, index_checksum])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_meta(data_dir: str | Path) -> dict:
    """meta.json of a finished corpus; DataError where there is none."""
    path = Path(data_dir) / META
    if not path.parent.is_dir():
        raise DataError(f"{path.parent}: no such folder; give the folder that preprocess_data.py wrote")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path.parent}: no {META}, so this is no finished corpus; run preprocess_data.py --output {path.parent}"
        ) from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {REMEDY}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT_VERSION:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise DataError(f"{path}: format {found!r}, this code reads {FORMAT_VERSION}; preprocess the MIDI files again")
    return meta


class Corpus:
    """`meta` (the dict of meta.json), `index` (dict of arrays, see INDEX_DTYPES), `vocabulary`, `hash`.

    A shard is mapped when its first piece is asked for. Safe to use from several threads.
    """

    def __init__(self, data_dir: str | Path):
        self.path = Path(data_dir)
        self.meta = read_meta(self.path)
        where = str(self.path / META)
        self.vocabulary = Vocabulary.from_dict(self.meta.get("vocabulary"), where)
        try:
            self._files = [entry["file"] for entry in self.meta["shards"]]
            self._checksums = [entry["sha256"] for entry in self.meta["shards"]]
            self.hash: str = self.meta["data_hash"]
            expected = self.meta["index"]["sha256"]
            sizes = [entry["bytes"] for entry in self.meta["shards"]]
        except (KeyError, TypeError) as error:
            raise DataError(f"{where}: has no {error}; {REMEDY}") from None
        self._check(self.path / INDEX, expected)  # small, and everything hangs on it
        self.index = MappedArrays(self.path / INDEX, REMEDY).arrays
        for file, size in zip(self._files, sizes):
            path = self.path / file
            if not path.is_file():
                raise DataError(f"{path}: is missing; {REMEDY}")
            if path.stat().st_size != size:
                raise DataError(f"{path}: has {path.stat().st_size} bytes, {META} says {size}; {REMEDY}")
        self._shards: list[Shard | None] = [None] * len(self._files)

    @staticmethod
    def _check(path: Path, expected: str) -> None:
        if not path.is_file():
            raise DataError(f"{path}: is missing; {REMEDY}")
        try:
            found = checksum(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); make it readable, or {REMEDY}") from None
        if found != expected:
            raise DataError(f"{path}: damaged, its sha256 is {found}, {META} says {expected}; {REMEDY}")

    def verify(self) -> None:
        """Read every byte; DataError naming the first file whose checksum is not the one in meta.json."""
        for file, expected in zip(self._files, self._checksums):
            self._check(self.path / file, expected)

    @property
    def num_pieces(self) -> int:
        return len(self.index["shard"])

    def _shard(self, number: int) -> Shard:
        shard = self._shards[number]
        if shard is None:
            shard = self._shards[number] = Shard(self.path / self._files[number], self.vocabulary.hash)
        return shard

    def _locate(self, piece: int) -> tuple[Shard, int]:
        return self._shard(int(self.index["shard"][piece])), int(self.index["piece_in_shard"][piece])

    def piece(self, piece: int) -> np.ndarray:
        """(T,) uint16 stream of one piece, read-only; DataError naming the shard if its bytes have changed."""
        shard, row = self._locate(piece)
        tokens = shard.tokens(row)
        if content_hash(tokens) != int(self.index["content_hash"][piece]):
            number = int(self.index["shard"][piece])
            self._check(shard.path, self._checksums[number])
            raise DataError(f"{shard.path}: piece {row} is not the one that {INDEX} lists; {REMEDY}")
        return tokens

    def segments(self, piece: int) -> SegmentTable:
        shard, row = self._locate(piece)
        return shard.segments(row)

    def name(self, piece: int) -> str:
        shard, row = self._locate(piece)
        return shard.names[row]

    def changes(self, piece: int) -> dict[str, int]:
        """What the token grid changed or could not hold in one piece, by the rule's name."""
        shard, row = self._locate(piece)
        return shard.changes(row)

    def conditions(self, piece: int) -> np.ndarray:
        """(n, 4) rows of one piece's conditions, sorted (hid.controls); none where preprocessing derived none."""
        shard, row = self._locate(piece)
        return shard.conditions(row)

    @property
    def has_conditions(self) -> bool:
        """Whether preprocessing derived conditions."""
        return self.meta["settings"]["conditions"]

    @property
    def tags(self) -> list[str]:
        """Names of the tags, by number."""
        return self.meta["input"]["tags"]
