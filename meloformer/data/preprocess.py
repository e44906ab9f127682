"""From a folder of MIDI files to a corpus: read, encode, find duplicates, write shards.

In: a `PreprocessConfig`; its input is a folder (searched through, .mid and .midi in any letter case) or a text file
with one path a line. Out, in the output folder: shard-*.safetensors, index.safetensors, rejected.jsonl (one line for
every file that is not in the corpus: path, reason, detail) and, last, meta.json. A folder without meta.json is
unfinished and is begun again.

>>> preprocess(PreprocessConfig(input="midi", output="processed", workers=2))       # doctest: +SKIP
75 pieces, 263,114 notes, 1,124,870 tokens in 1 shard: processed; ...

The surprise: the bytes depend on the files, their order and the settings, and on nothing else: results come back in
input order for any number of workers, and no clock, host name or worker count is written.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from meloformer.config import PreprocessConfig
from meloformer.data.clusters import bar_shingles, cluster
from meloformer.data.corpus import INDEX, INDEX_DTYPES, META, REJECTED, Corpus, data_hash, read_meta
from meloformer.data.shards import (
    FORMAT_VERSION,
    MAX_BARS,
    MAX_TRACKS,
    Piece,
    content_hash,
    shard_name,
    write_arrays,
    write_shard,
)
from meloformer.data.sources import Source, describe_input, list_input
from meloformer.errors import UserError
from meloformer.files import write_atomic
from meloformer.hid import Tokenizer, Vocabulary
from meloformer.hid.annotate import find_segments
from meloformer.hid.vocabulary import Family
from meloformer.midi import MidiError, read_score
from meloformer.midi.score import DRUMS

SETTINGS = ("shard_size", "limit", "min_notes", "min_bars", "max_bars", "resolution", "dedup")  # what the output shows
CHUNK = 8  # files handed to a worker at once
UNREADABLE, UNENCODABLE, CRASHED = "unreadable", "unencodable", "internal_error"
FEW_NOTES, FEW_BARS, MANY_BARS, MANY_TRACKS = "few_notes", "few_bars", "many_bars", "many_tracks"
DUPLICATE = "duplicate"


class Rejected(NamedTuple):
    name: str
    reason: str
    detail: str


class Encoded(NamedTuple):
    """What a worker makes of one file."""

    piece: Piece
    num_bars: int
    num_notes: int
    num_track_bars: int
    instruments: np.ndarray  # (tracks,)
    seconds: float
    counts: Counter
    content: int
    shingles: np.ndarray


# --- one file -----------------------------------------------------------------------------------------------------


class Encoder:
    """Turns a `Source` into `Encoded` or `Rejected`; never raises for what a file holds."""

    def __init__(self, config: PreprocessConfig):
        self.config = config
        self.tokenizer = Tokenizer(Vocabulary(config.resolution))

    def __call__(self, source: Source) -> Encoded | Rejected:
        try:
            return self._encode(source)
        except Exception as error:
            # A file that no rule foresaw must not end a run of days; the line names it, so that it becomes a rule.
            return Rejected(source.name, CRASHED, f"{type(error).__name__}: {error}")

    def _encode(self, source: Source) -> Encoded | Rejected:
        name, config = source.name, self.config
        step = UNREADABLE
        try:
            score = read_score(source.path)
            step = UNENCODABLE
            tokens, counts = self.tokenizer.encode_counted(score)
        except MidiError as error:
            return Rejected(name, step, str(error).removeprefix(f"{source.path}: "))
        a = self.tokenizer.annotate(tokens)
        is_bar = a.type == Family.BAR
        num_notes = int((a.type == Family.PITCH).sum())
        num_bars = int((is_bar & (a.track < 0)).sum())
        instruments = a.instrument[a.type == Family.INSTRUMENT]
        for bad, reason, detail in (
            (num_notes < config.min_notes, FEW_NOTES, f"{num_notes} notes, min_notes is {config.min_notes}"),
            (num_bars < config.min_bars, FEW_BARS, f"{num_bars} bars, min_bars is {config.min_bars}"),
            (num_bars > config.max_bars, MANY_BARS, f"{num_bars} bars, max_bars is {config.max_bars}"),
            (num_bars > MAX_BARS, MANY_BARS, f"{num_bars} bars, a shard holds {MAX_BARS}"),
            (len(instruments) > MAX_TRACKS, MANY_TRACKS, f"{len(instruments)} tracks, a shard holds {MAX_TRACKS}"),
        ):
            if bad:
                return Rejected(name, reason, detail)
        segments = find_segments(a)
        return Encoded(
            Piece(name, tokens, segments.start, segments.bar, segments.track, segments.instrument),
            num_bars,
            num_notes,
            int((is_bar & (a.track >= 0)).sum()),
            instruments,
            float(score.seconds_at(score.end_tick)),
            counts,
            content_hash(tokens),
            bar_shingles(tokens, self.tokenizer.vocabulary),
        )


_encoder: Encoder | None = None  # of a worker process


def _start_worker(config: PreprocessConfig) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    _encoder = Encoder(config)


def _encode_in_worker(source: Source) -> Encoded | Rejected:
    return _encoder(source)


def encode_all(config: PreprocessConfig, sources: list[Source]) -> Iterator[Encoded | Rejected]:
    """What became of each file, in input order; config.workers processes, or this one if that is 1."""
    workers = min(config.workers, len(sources))
    if workers <= 1:
        yield from map(Encoder(config), sources)
        return
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (config,)) as pool:
        yield from pool.imap(_encode_in_worker, sources, chunksize=CHUNK)


# --- the corpus ---------------------------------------------------------------------------------------------------


class CorpusWriter:
    """Takes results in input order; writes a shard whenever enough pieces are together, the rest in `finish`."""

    def __init__(self, output: Path, config: PreprocessConfig):
        self.output, self.config = output, config
        self.vocabulary = Vocabulary(config.resolution)
        self.shards: list[dict] = []
        self.rejected: list[Rejected] = []
        self.totals: Counter = Counter()
        self.instruments: Counter = Counter()
        self.counts: Counter = Counter()
        self.lengths: Counter = Counter()
        self.seconds = 0.0
        self._pending: list[Encoded] = []
        self._index: list[np.ndarray] = []
        self._seen: dict[int, str] = {}
        self._shingles: list[np.ndarray] = []

    def add(self, result: Encoded | Rejected) -> None:
        if isinstance(result, Encoded) and self.config.dedup:
            earlier = self._seen.setdefault(result.content, result.piece.name)
            if earlier is not result.piece.name:
                result = Rejected(result.piece.name, DUPLICATE, f"same content as {earlier}")
        if isinstance(result, Rejected):
            self.rejected.append(result)
            return
        self._pending.append(result)
        self._shingles.append(result.shingles)
        piece = result.piece
        self.totals.update(
            pieces=1,
            notes=result.num_notes,
            tokens=len(piece.tokens),
            bars=result.num_bars,
            segments=len(piece.segment_bar),
            tracks=len(result.instruments),
        )
        self.instruments.update(result.instruments.tolist())
        self.counts.update(result.counts)
        self.seconds += result.seconds
        self.lengths[int(len(piece.tokens) - 1).bit_length()] += 1
        if len(self._pending) == self.config.shard_size:
            self._flush()

    def _flush(self) -> None:
        number, pieces = len(self.shards), [result.piece for result in self._pending]
        path = self.output / shard_name(number)
        sha256 = write_shard(path, pieces, self.vocabulary.hash)
        self.shards.append(
            {
                "file": path.name,
                "sha256": sha256,
                "bytes": path.stat().st_size,
                "pieces": len(pieces),
                "tokens": sum(len(piece.tokens) for piece in pieces),
                "segments": sum(len(piece.segment_bar) for piece in pieces),
                "notes": sum(result.num_notes for result in self._pending),
            }
        )
        rows = np.zeros(len(pieces), dtype=list(INDEX_DTYPES.items()))
        rows["shard"], rows["piece_in_shard"] = number, np.arange(len(pieces))
        rows["num_tokens"] = [len(piece.tokens) for piece in pieces]
        rows["num_segments"] = [len(piece.segment_bar) for piece in pieces]
        rows["num_bars"] = [result.num_bars for result in self._pending]
        rows["num_tracks"] = [len(result.instruments) for result in self._pending]
        rows["num_notes"] = [result.num_notes for result in self._pending]
        rows["num_track_bars"] = [result.num_track_bars for result in self._pending]
        rows["content_hash"] = [result.content for result in self._pending]
        self._index.append(rows)
        self._pending = []

    def finish(self, source: dict) -> dict:
        """Write the last shard, the index, rejected.jsonl and meta.json; returns what meta.json holds."""
        if self._pending:
            self._flush()
        index = np.concatenate(self._index)
        index["cluster"] = cluster(index["content_hash"], self._shingles)
        arrays = {name: np.ascontiguousarray(index[name]) for name in INDEX_DTYPES}
        index_sha256 = write_arrays(self.output / INDEX, arrays, {"format": FORMAT_VERSION})
        lines = [json.dumps({"path": r.name, "reason": r.reason, "detail": r.detail}) + "\n" for r in self.rejected]
        write_atomic(self.output / REJECTED, "".join(lines).encode())
        longest = max(self.lengths)
        meta = {
            "format": FORMAT_VERSION,
            "data_hash": data_hash(self.vocabulary.hash, [shard["sha256"] for shard in self.shards], index_sha256),
            "vocabulary": self.vocabulary.to_dict(),
            "settings": settings_of(self.config),
            "input": source,
            "totals": {
                **self.totals,
                "hours": round(self.seconds / 3600, 3),
                "clusters": len(np.unique(index["cluster"])),
            },
            "rejected": dict(sorted(Counter(r.reason for r in self.rejected).items())),
            "instruments": {("drums" if i == DRUMS else str(i)): n for i, n in sorted(self.instruments.items())},
            # What the token grid changed or could not hold, by the rule's name; see hid.quantize and midi.read.
            "changed": dict(sorted(self.counts.items())),
            # Pieces by length in tokens: up to 1, 2, 4, 8, ... tokens.
            "length_histogram": {str(1 << i): self.lengths[i] for i in range(min(self.lengths), longest + 1)},
            "shards": self.shards,
            "index": {"file": INDEX, "sha256": index_sha256},
        }
        write_atomic(self.output / META, (json.dumps(meta, indent=1) + "\n").encode())
        return meta


def settings_of(config: PreprocessConfig) -> dict:
    return {name: getattr(config, name) for name in SETTINGS}


def remove_leftovers(output: Path) -> None:
    """What an unfinished run left in a folder; nothing that this program does not write."""
    for pattern in ("shard-[0-9]*.safetensors", INDEX, REJECTED):
        for path in (*output.glob(pattern), *output.glob(f".{pattern}.tmp")):
            path.unlink()


def is_complete(output: Path, config: PreprocessConfig, source: dict) -> bool:
    """True if the folder already holds what this run would write; UserError if it holds another corpus."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; --output takes a folder")
    if not (output / META).exists():
        return False
    meta = read_meta(output)
    settings = settings_of(config)
    old = meta.get("settings", {})
    changed = [
        f"{name} was {old.get(name)}, now {settings[name]}" for name in settings if old.get(name) != settings[name]
    ]
    if meta.get("input") != source:
        changed.append("other input files")
    if changed:
        raise UserError(
            f"{output}: holds a corpus made otherwise ({'; '.join(changed)}); remove it or give another --output"
        )
    Corpus(output)  # DataError if a file of it is missing or cut short
    return True


def preprocess(config: PreprocessConfig) -> None:
    """Do what the module's docstring says; UserError if there is nothing to read or the output cannot be written."""
    config.validate()
    sources = list_input(config.input)[: config.limit]
    source = describe_input(sources)
    output = Path(config.output)
    if is_complete(output, config, source):
        meta = read_meta(output)
        print(f"{output} is complete already. {summary(meta, output)}")
        return
    existed = output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output)
        writer = CorpusWriter(output, config)
        _run(config, sources, writer)
        if not writer.totals["pieces"]:
            remove_leftovers(output)
            if not existed:
                output.rmdir()
            first = writer.rejected[0]
            raise UserError(
                f"{config.input}: none of {len(sources)} files can be used ({_reasons(writer.rejected)}); "
                f"the first, {first.name}: {first.detail}"
            )
        meta = writer.finish(source)
    except OSError as error:
        raise UserError(
            f"{error.filename or output}: cannot be written ({error.strerror}); make room or give another --output"
        ) from None
    print(summary(meta, output))


def _run(config: PreprocessConfig, sources: list[Source], writer: CorpusWriter) -> None:
    with tqdm(total=len(sources), unit="file", smoothing=0, file=sys.stderr) as bar:
        for result in encode_all(config, sources):
            writer.add(result)
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            notes = f"{writer.totals['notes'] / seconds:,.0f}"
            bar.set_postfix({"notes/s": notes, "rejected": len(writer.rejected)}, refresh=False)
            bar.update()


def _reasons(rejected: list[Rejected]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(Counter(r.reason for r in rejected).items()))


def summary(meta: dict, output: Path) -> str:
    """One line: what is there, and what to run next."""
    totals, rejected, shards = meta["totals"], meta["rejected"], len(meta["shards"])
    text = f"{totals['pieces']:,} pieces, {totals['notes']:,} notes, {totals['tokens']:,} tokens"
    text += f" in {shards} shard{'s' if shards != 1 else ''}: {output}"
    if rejected:
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.items())
        left_out = f"{sum(rejected.values())} of {meta['input']['files']} files left out ({reasons})"
        text += f"; {left_out}, listed in {REJECTED}"
    return f"{text}. Next: python train.py --data_dir {output}"
