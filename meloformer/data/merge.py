"""Join the parts of a corpus that preprocess_data.py --part i/n wrote.

`python -m meloformer.data.merge PART... --output DIR`. In: the n folders in any order. Out: the corpus that one run
over the whole input would have written, to the byte. Nothing is encoded again: streams are copied, duplicates are found
by the stored content hashes, near-duplicates by the bar shingles in each part's journal.

>>> merge([Path("part1"), Path("part2")], Path("processed"))       # doctest: +SKIP

A merge that was killed goes on from its last finished shard, as preprocessing does. The surprise: a piece that one
part kept may be a duplicate in the whole, and then it gets its line in rejected.jsonl between the lines of its own
part, so the shards are cut anew; and what was the same as that piece is the same as one of an earlier part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from meloformer.command_line import Parser
from meloformer.data.arrays import DataError, MappedArrays
from meloformer.data.corpus import REJECTED, Corpus
from meloformer.data.encoder import Encoded, Rejected
from meloformer.data.journal import entry_path
from meloformer.data.preprocess import is_complete, summary, writing
from meloformer.data.shards import Piece
from meloformer.data.writer import DUPLICATE, SAME, CorpusWriter
from meloformer.errors import UserError, exit_cleanly
from meloformer.hid.vocabulary import Family

REMEDY = "run preprocess_data.py for this part again"


def merge(folders: list[Path], output: Path) -> None:
    """Do what the module's docstring says; UserError where the folders are not all the parts of one corpus."""
    parts = _in_order(folders)
    meta = parts[0].meta
    settings = {**meta["settings"], "part": None}
    if is_complete(output, settings, meta["input"]):
        raise UserError(f"{output}: holds this corpus already; give another --output")
    with writing(output), CorpusWriter(output, settings, meta["input"]) as writer:
        files, first = sum(part.meta["totals"]["files"] for part in parts), writer.state.next_source
        results = islice((result for part in parts for result in _results(part, writer)), first, None)
        with tqdm(total=files, initial=first, unit="file", smoothing=0, file=sys.stderr) as bar:
            for number, result in enumerate(results, first):
                writer.add(number, result)
                bar.update()
        if writer.state.next_source != meta["input"]["files"] or not writer.state.totals["pieces"]:
            pieces, wanted = writer.state.totals["pieces"], meta["input"]["files"]
            writer.remove()
            raise UserError(f"the parts hold {pieces} pieces and {files} of {wanted} files; {REMEDY}")
        print(summary(writer.finish(), output))


def _in_order(folders: list[Path]) -> list[Corpus]:
    by_number: dict[int, Corpus] = {}
    first: Corpus | None = None
    for folder in folders:
        corpus = Corpus(folder)
        part = corpus.meta["settings"]["part"]
        if part is None:
            raise UserError(f"{folder}: is no part, preprocess_data.py made it without --part; give the parts alone")
        i, n = map(int, part.split("/"))
        if i in by_number:
            raise UserError(f"{folder}: is part {part}, and so is {by_number[i].path}; give each part once")
        by_number[i] = corpus
        first = first or corpus
        for name, mine, others in (
            ("input files", corpus.meta["input"], first.meta["input"]),
            ("number of parts", n, int(first.meta["settings"]["part"].split("/")[1])),
            ("settings", {**corpus.meta["settings"], "part": 0}, {**first.meta["settings"], "part": 0}),
        ):
            if mine != others:
                raise UserError(f"{folder}: other {name} than {first.path} ({mine}, not {others}); {REMEDY}")
    missing = sorted(set(range(1, n + 1)) - set(by_number))
    if missing:
        raise UserError(f"part {missing[0]} of {n} is missing; give all {n} folders")
    return [by_number[i] for i in range(1, n + 1)]


def _results(part: Corpus, writer: CorpusWriter) -> Iterator[Encoded | Rejected]:
    """What became of each of the part's files, in their order; to be read as they are added to `writer`."""
    earlier: dict[str, str] = {}  # of the part's pieces those that an earlier part has, and what they are called there
    with open(part.path / REJECTED, encoding="utf-8") as lines:
        rejected = (_rejected(line, earlier) for line in map(json.loads, lines))
        i, n = map(int, part.meta["settings"]["part"].split("/"))
        number = part.meta["input"]["files"] * (i - 1) // n
        for piece, (source, shingles) in enumerate(_stored(part)):
            for _ in range(number, source):
                yield _next(rejected, part)
            encoded = _encoded(part, piece, shingles)
            name = writer.kept(encoded.content)
            if name not in (None, encoded.piece.name):
                earlier[encoded.piece.name] = name
            yield encoded
            number = source + 1
        yield from rejected


def _rejected(line: dict, earlier: dict[str, str]) -> Rejected:
    detail = line["detail"]
    if line["reason"] == DUPLICATE:
        kept = detail.removeprefix(SAME)
        detail = SAME + earlier.get(kept, kept)
    return Rejected(line["path"], line["reason"], detail)


def _next(rejected: Iterator[Rejected], part: Corpus) -> Rejected:
    for line in rejected:
        return line
    raise DataError(f"{part.path / REJECTED}: cut short; {REMEDY}")


def _stored(part: Corpus) -> Iterator[tuple[int, np.ndarray]]:
    """For each piece of a part the number of its file and its shingles."""
    for shard in range(len(part.meta["shards"])):
        arrays = MappedArrays(entry_path(part.path, shard), REMEDY).arrays
        offsets = arrays["shingle_offsets"].tolist()
        for source, first, last in zip(arrays["source"].tolist(), offsets[:-1], offsets[1:]):
            yield source, arrays["shingles"][first:last]


def _encoded(part: Corpus, piece: int, shingles: np.ndarray) -> Encoded:
    row = {name: column[piece].item() for name, column in part.index.items()}
    tokens = part.piece(piece)
    families, values = part.vocabulary.family_of[tokens], part.vocabulary.value_of[tokens]
    return Encoded(
        Piece(part.name(piece), tokens, *part.segments(piece), part.changes(piece), part.conditions(piece)),
        row["num_bars"],
        row["num_notes"],
        row["num_track_bars"],
        values[families == Family.INSTRUMENT],
        row["seconds"],
        row["content_hash"],
        shingles,
    )


def main() -> None:
    parser = Parser(prog="python -m meloformer.data.merge", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="PART", help="folders that preprocess_data.py --part i/n wrote")
    parser.add_argument("--output", required=True, help="folder for the whole corpus")
    given = parser.parse_args()
    merge([Path(part) for part in given.parts], Path(given.output))


if __name__ == "__main__":
    exit_cleanly(main)
