"""Crops of piano rolls: what the lists of MIDI files hold, and which crop is which row of an epoch.

    corpus = RollCorpus(config.data)                              # .hash, .num_pieces, .refused
    plan = RollPlan(corpus, config.data, seed=0, epoch=0, split="train")
    row, documents = plan.row(0)

In: two text files, a path of a MIDI file on each line, from the list's folder or from here. Out: rows for
meloformer.data.loader.batches, each a dict of "roll" (128, crop_length) uint8, "valid" (crop_length,) bool and "key"
() uint64, from which the model draws the row's masks.

Training rows are `augment_factor` crops of each piece, at a uniform place, moved by a uniform number of semitones (what
leaves the 128 pitches is lost), in a shuffled order, all anew each epoch. Validation rows tile every piece from its
first column, so that each column counts once. A crop is padded at its end with silence that is not `valid`.

The surprise: pieces are drawn, not columns, so a long piece is seen no more often than a short one; and a plan is a
pure function of (rolls, data settings, seed, epoch), so resuming replays nothing.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from meloformer.data.draws import key, uniform
from meloformer.errors import UserError
from meloformer.fractal.roll import NUM_PITCHES, RollLoss, read_roll
from meloformer.midi import MidiError
from meloformer.wording import counted

if TYPE_CHECKING:
    from meloformer.fractal.config import FractalData

Split = Literal["train", "validation"]
LIST_FLAGS = {"train": "train_data", "validation": "val_data"}


def num_cells(batch: dict[str, np.ndarray]) -> int:
    """Cells of a batch of rows that are no padding: what its loss is a sum over."""
    return int(batch["valid"].sum()) * NUM_PITCHES


class Crop(NamedTuple):
    """Where a row comes from: columns [first, last) of a piece, moved by `shift` semitones."""

    name: str
    first: int
    last: int
    shift: int

    def __str__(self) -> str:
        moved = f" moved by {self.shift:+d} semitones" if self.shift else ""
        return f"{self.name} columns {self.first}-{self.last}{moved}"


class RollCorpus:
    """The pieces of both lists, training first. `hash` (str) is of their rolls, not of names or places.

    `pieces`: {split: piece numbers}; `widths` (pieces,) columns; `velocities` (128,) how often each stands in the
    training rolls; `loss`: what all files lost on the way into rolls;
    `refused`: a line for each file that holds no music a roll can show. UserError where a list or a file of it is
    missing, or nothing is left.
    """

    def __init__(self, data: FractalData):
        self.paths: list[Path] = []
        self.refused: list[str] = []
        self.pieces: dict[str, np.ndarray] = {}
        self._rolls: list[np.ndarray] | None = [] if data.cache_in_memory else None
        self.velocities = np.zeros(NUM_PITCHES, dtype=np.int64)
        widths: list[int] = []
        loss = np.zeros(len(RollLoss._fields), dtype=np.int64)
        digest = hashlib.sha256()
        for split, flag in LIST_FLAGS.items():
            path = getattr(data, flag)
            listed = [] if path is None else read_list(path, flag)
            before = len(self.paths)
            shown = tqdm(listed, desc=f"rolls of {flag}", unit="file", disable=not sys.stderr.isatty(), leave=False)
            for file in shown:
                try:
                    roll, lost, _ = read_roll(file)
                    if not roll.any():
                        raise MidiError(f"{file}: no pitched notes")
                except MidiError as error:
                    self.refused.append(str(error))
                    continue
                self.paths.append(file)
                widths.append(roll.shape[1])
                loss += lost
                if split == "train":
                    self.velocities += np.bincount(roll.reshape(-1), minlength=NUM_PITCHES)
                digest.update(roll.shape[1].to_bytes(8, "little") + roll.tobytes())
                if self._rolls is not None:
                    self._rolls.append(roll)
            self.pieces[split] = np.arange(before, len(self.paths))
            digest.update(f"{split} {len(self.paths) - before}".encode())
            if listed and len(self.paths) == before:
                raise UserError(
                    f"--{flag} {path}: none of its {counted(len(listed), 'file')} can be used; {self.refused[-1]}"
                )
        self.widths = np.array(widths, dtype=np.int64)
        self.loss = RollLoss(*loss.tolist())
        self.hash = digest.hexdigest()[:16]

    @property
    def num_pieces(self) -> int:
        return len(self.paths)

    def name(self, piece: int) -> str:
        return self.paths[piece].name

    def roll(self, piece: int) -> np.ndarray:
        """(128, widths[piece]) uint8; not to be written into. UserError where the file has changed meanwhile."""
        if self._rolls is not None:
            return self._rolls[piece]
        roll = read_roll(self.paths[piece])[0]
        if roll.shape[1] != self.widths[piece]:
            raise UserError(f"{self.paths[piece]}: has changed since the run began; start again with --resume auto")
        return roll


class RollPlan:
    """`num_rows` rows of one epoch. `augment=False` gives the training split as the validation split is given."""

    def __init__(
        self,
        corpus: RollCorpus,
        data: FractalData,
        seed: int = 0,
        epoch: int = 0,
        split: Split = "train",
        augment: bool | None = None,
    ):
        self.corpus, self.data, self.split = corpus, data, split
        self.augmented = split == "train" if augment is None else augment
        # Without augmentation no draw depends on seed or epoch: validation is the same music under the same masks.
        self.seed, self.epoch = (seed, epoch) if self.augmented else (0, 0)
        pieces = corpus.pieces[split]
        widths, length = corpus.widths[pieces], data.crop_length
        if self.augmented:
            piece, copy = np.repeat(pieces, data.augment_factor), np.tile(np.arange(data.augment_factor), len(pieces))
            order = self._key("shuffle", piece, copy).argsort(kind="stable")
            piece, copy = piece[order], copy[order]
            places = np.maximum(corpus.widths[piece] - length, 0) + 1
            first = (self._uniform("crop", piece, copy) * places).astype(np.int64)
            lowest, highest = data.pitch_shift_min, data.pitch_shift_max
            shift = lowest + (self._uniform("pitch shift", piece, copy) * (highest - lowest + 1)).astype(np.int64)
        else:
            tiles = -(-widths // length)
            piece = np.repeat(pieces, tiles)
            first = length * (np.arange(len(piece)) - np.repeat(np.cumsum(tiles) - tiles, tiles))
            shift = np.zeros_like(first)
        self._rows = np.stack([piece, first, shift], axis=1).astype(np.int64)

    def _key(self, purpose: str, *counters: np.ndarray | int) -> np.ndarray:
        return key(self.seed, self.epoch, purpose, *counters)

    def _uniform(self, purpose: str, *counters: np.ndarray) -> np.ndarray:
        return uniform(self.seed, self.epoch, purpose, *counters)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def row(self, row: int) -> tuple[dict[str, np.ndarray], list[Crop]]:
        """One row, and where it comes from."""
        piece, first, shift = self._rows[row].tolist()
        crop = self.corpus.roll(piece)[:, first : first + self.data.crop_length]
        width = crop.shape[1]
        arrays = self.empty_row()
        arrays["roll"][max(shift, 0) : NUM_PITCHES + min(shift, 0), :width] = crop[
            max(-shift, 0) : NUM_PITCHES - max(shift, 0)
        ]
        arrays["valid"][:width] = True
        arrays["key"] = self._key("masks", row)
        return arrays, [Crop(self.corpus.name(piece), first, first + width, shift)]

    def num_targets(self, batch: dict[str, np.ndarray]) -> int:
        """Cells of a batch that carry loss."""
        return num_cells(batch)

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row of padding."""
        return {
            "roll": np.zeros((NUM_PITCHES, self.data.crop_length), dtype=np.uint8),
            "valid": np.zeros(self.data.crop_length, dtype=bool),
            "key": np.zeros((), dtype=np.uint64),
        }


def read_list(path: str | Path, flag: str) -> list[Path]:
    """Paths of a list's files, each of them there; UserError, one line, otherwise."""
    given = f"--{flag} {path}"
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{given}: {error.strerror}; give a text file with the path of a MIDI file on each line"
        ) from None
    if b"\0" in text:
        raise UserError(f"{given}: is no text file; give one with the path of a MIDI file on each line")
    lines = [(number, os.fsdecode(line.strip())) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{given}: is empty; write the path of a MIDI file on each line")
    found = []
    for number, line in lines:
        candidates = [Path(path).parent / line, Path(line)]
        files = [candidate for candidate in candidates if candidate.is_file()]
        if not files:
            raise UserError(
                f"{given}: line {number}: {line}: no such file, neither from the list's folder nor from here"
            )
        found.append(files[0])
    return found
