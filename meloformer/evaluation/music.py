"""Music to measure, from wherever it lies: `load_music(where, split, limit)` gives a list of `Bars`.

`where` is a folder of MIDI files (searched through), a folder that preprocess_data.py wrote, or a training run. Of a
run its own data and its own split are taken: `split` "train" or "validation". A corpus has no split of its own, so all
of it is taken.

>>> load_music("runs/base", "validation", 200)   # doctest: +SKIP

The surprise: files that cannot be read are left out and named, for one bad file among a thousand should not end an
evaluation; a folder with none that can be read does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from meloformer.config import DataConfig
from meloformer.data import Corpus
from meloformer.data.corpus import META
from meloformer.data.draws import mix
from meloformer.data.packing import Split, split_pieces
from meloformer.data.sources import Input, Source
from meloformer.errors import UserError
from meloformer.evaluation.bars import Bars, bars_of, bars_of_stream
from meloformer.hid.vocabulary import DEFAULT_RESOLUTION
from meloformer.midi import MidiError, read_score
from meloformer.pretrained import WEIGHTS, find_pretrained
from meloformer.training.checkpoint import read_state

MIN_NOTES = 16  # as in preprocessing: less is no piece


def load_music(where: str, split: Split, limit: int | None = None) -> list[Bars]:
    """At most `limit` pieces, chosen by their content, in a fixed order; UserError where there are none."""
    pieces = list(music(where, split, limit))
    if not pieces:
        raise UserError(f"{where}: holds no piece with at least {MIN_NOTES} notes that can be read")
    return pieces


def music(where: str, split: Split, limit: int | None = None) -> Iterator[Bars]:
    """The same one after another, for music that is more than memory holds."""
    folder = Path(where)
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder; give a folder of MIDI files, of shards, or of a training run")
    if (folder / META).is_file():
        corpus = Corpus(folder)
        return _of_corpus(corpus, np.arange(corpus.num_pieces), limit)
    if (folder / "checkpoints").is_dir() or (folder / WEIGHTS).is_file():
        state = read_state(find_pretrained(folder))
        data = DataConfig.from_dict(state["config"]["data"], f"{folder}: data")
        corpus = Corpus(data.data_dir)
        return _of_corpus(corpus, split_pieces(corpus, data)[0][split], limit)
    return _of_files(where, limit)


def _of_corpus(corpus: Corpus, numbers: np.ndarray, limit: int | None) -> Iterator[Bars]:
    if corpus.vocabulary.resolution != DEFAULT_RESOLUTION:
        raise UserError(
            f"{corpus.path}: its grid has {corpus.vocabulary.resolution} ticks a quarter note, music is measured on "
            f"{DEFAULT_RESOLUTION}; give the MIDI files instead"
        )
    if limit is not None and len(numbers) > limit:
        numbers = np.sort(numbers[mix(corpus.index["content_hash"][numbers]).argsort(kind="stable")[:limit]])
    for number in numbers.tolist():
        yield bars_of_stream(corpus.piece(number), corpus.vocabulary, corpus.name(number))


def _of_files(where: str, limit: int | None) -> Iterator[Bars]:
    sources = list(Input(where))
    if limit is not None and len(sources) > limit:
        sources = sorted(sorted(sources, key=_content)[:limit])
    for source in sources:
        try:
            bars = bars_of(read_score(source.path), source.name)
        except MidiError as error:
            print(f"left out: {error}")
            continue
        if len(bars.bar) < MIN_NOTES:
            print(f"left out: {source.path}: {len(bars.bar)} notes, {MIN_NOTES} are a piece")
            continue
        yield bars


def _content(source: Source) -> bytes:
    """What a file is chosen by; one that cannot be read is among the first, and `read_score` says so."""
    try:
        return hashlib.sha256(Path(source.path).read_bytes()).digest()
    except OSError:
        return b""
