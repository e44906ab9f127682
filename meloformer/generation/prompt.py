"""Music that is given: a MIDI file as a model reads it, bar by bar and track by track.

>>> prompt = Prompt("song.mid", model.vocabulary)                                    # doctest: +SKIP
>>> tokens, tracks = prompt.stream(8, 24, masked=frozenset({(0, 20)}))               # doctest: +SKIP

In: a file. Out: the head of a stream for any window of its bars, some (track, bar) cells masked; and the way back, from
notes of the token grid to notes of the file. `generation.tasks` makes requests of it.

The surprise: a piece's key, chords, densities and roles are derived from the whole file, as they are in training, so
they also say something about bars that the model is not shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.generation.steering import FREE, Frame, Part, Steering, part_of, prompt_rows
from meloformer.hid import Family, Tokenizer, Vocabulary
from meloformer.hid.conditions import derive, insert
from meloformer.hid.controls import TOKEN, TRACK
from meloformer.hid.quantize import round_half_up
from meloformer.hid.tokenizer import canonical_order, reorder_tracks
from meloformer.midi.general_midi import instrument_name, parse_instrument
from meloformer.midi.merge import MidiSource
from meloformer.midi.score import DRUMS, Score, Track

# Room for what is written: this many times the tokens that are there now, or on average, if those are more.
ROOM = 1.5


class Prompt:
    """A MIDI file as the model reads it; UserError where it cannot be read or has no notes. conditions: names of those
    that are derived from it for the model; tags: names of the model's tags; predicted: what it chooses.

    `source`: the file; `score`: its quantized music, tracks in the encoder's order; `track_of[i]`: which track of
    `source.score`, so of the file, track i of `score` is; `given_bars`: those of the file, of which the model reads the
    ones from `first_read` on; `score` may have more that are still to be written (`extended`), and its end is the
    piece's where `is_whole`.
    """

    def __init__(
        self,
        path: str | Path,
        vocabulary: Vocabulary,
        conditions: Sequence[str] = (),
        tags: Sequence[str] = (),
        predicted: Sequence[str] = (),
    ):
        self.path, self.vocabulary, self.tags, self.predicted = path, vocabulary, tags, predicted
        self.tokenizer = Tokenizer(vocabulary)
        self.source = MidiSource(path)
        if not self.source.score.num_notes:
            raise UserError(f"{path}: has no notes, so there is nothing to go on from; give another prompt")
        score = self.tokenizer.quantize(self.source.score)
        number = {id(track): i for i, track in enumerate(self.source.score.tracks)}  # equal tracks are still two
        order = canonical_order(score)
        self.track_of = [number[id(score.tracks[i])] for i in order]
        self.score = reorder_tracks(score, order)
        self.derived = derive(self.score).rows(vocabulary, conditions)
        self.given_bars, self.first_read, self.is_whole = self.score.num_bars, 0, True

    def extended(self, num_bars: int, derived: np.ndarray, first_read: int, is_whole: bool) -> Prompt:
        """The same with empty bars behind its end, `num_bars` in all, for which the last meter and tempo hold."""
        more = copy.copy(self)
        more.score, more.derived = replace(self.score, num_bars=num_bars), derived
        more.first_read, more.is_whole = first_read, is_whole
        return more

    def with_music(
        self,
        derived: np.ndarray,
        notes: np.ndarray,
        instruments: Sequence[int] = (),
        gone: frozenset[tuple[int, int]] = frozenset(),
    ) -> Prompt:
        """The same with new music for the model to read: `notes` in ticks of the grid, their track counts `score`'s
        tracks and then `instruments`, and without the old ones of the (track, bar) that are gone; `derived` takes the
        place of what was derived. What is written still goes into the file as it was."""
        more = copy.copy(self)
        tracks = [*self.score.tracks, *(Track(i % DRUMS, i == DRUMS) for i in instruments)]
        old = self.score.notes
        old = old[[cell not in gone for cell in self.cells_of(old)]] if gone else old
        notes = np.concatenate([old, notes])
        more.score = replace(self.score, tracks=tracks, notes=np.sort(notes, order=["track", "onset", "pitch"]))
        more.track_of = [*self.track_of, *range(self.num_tracks, self.num_tracks + len(instruments))]
        more.derived = derived
        return more

    @property
    def num_bars(self) -> int:
        return self.score.num_bars

    @property
    def num_tracks(self) -> int:
        """Tracks of the file's score."""
        return len(self.source.score.tracks)

    def file_ticks(self, ticks: np.ndarray) -> np.ndarray:
        """Ticks of the token grid -> ticks of the file."""
        return round_half_up(ticks * self.source.ticks_per_quarter, self.vocabulary.resolution)

    def notes_in(self, cells: frozenset[tuple[int, int]]) -> np.ndarray:
        """The file's notes that begin in these (track, bar) cells of `score`."""
        notes = self.source.score.notes
        grid = round_half_up(notes["onset"] * self.vocabulary.resolution, self.source.ticks_per_quarter)
        bars = np.searchsorted(self.score.bar_lines(), grid, side="right") - 1
        chosen = {(self.track_of[track], bar) for track, bar in cells}
        return notes[[cell in chosen for cell in zip(notes["track"].tolist(), bars.tolist())]]

    def cells_of(self, notes: np.ndarray) -> list[tuple[int, int]]:
        """(track, bar) of notes in ticks of the grid; a bar behind the end counts as the first one there."""
        return list(zip(notes["track"].tolist(), self._bars_of(notes).tolist()))

    def _bars_of(self, notes: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.score.bar_lines(), notes["onset"], side="right") - 1

    def file_notes(self, notes: np.ndarray) -> np.ndarray:
        """Notes of the grid, their track counts `score`'s tracks and then new ones, as the file's."""
        new = int(notes["track"].max(initial=0)) + 1 - len(self.score.tracks)
        numbers = np.array([*self.track_of, *range(self.num_tracks, self.num_tracks + new)])
        start, end = self.file_ticks(notes["onset"]), self.file_ticks(notes["onset"] + notes["duration"])
        notes = notes.copy()
        notes["track"], notes["onset"], notes["duration"] = numbers[notes["track"]], start, np.maximum(end - start, 1)
        return notes

    def tokens_for(self, cells: Collection[tuple[int, int]], others: int = 0) -> int:
        """Tokens to keep for writing (track, bar) cells, which may lie behind the end, and so many others.

        A BAR or FILL each, and ROOM times the notes of the cells, or of as many cells of the piece, whichever is more.
        """
        notes = self.score.notes
        bars = self._bars_of(notes)
        size = np.full(len(notes), 3)  # P L V, and T for the first of an onset
        size[np.unique(notes[["track", "onset"]], return_index=True)[1]] += 1
        written = max(self.given_bars, int(bars.max()) + 1)
        average = int(size.sum()) / (len(np.unique(notes["track"])) * written)
        chosen = np.zeros((len(self.score.tracks), self.num_bars), dtype=bool)
        for track, bar in cells:
            if bar < self.num_bars:
                chosen[track, bar] = True
        own = int(size[chosen[notes["track"], bars]].sum())
        return len(cells) + others + math.ceil(ROOM * (max(own, average * len(cells)) + average * others))

    def parts(self) -> list[Part]:
        """Its tracks with what is derived from them, for new ones in their place."""
        rows = self.derived
        return [
            part_of(instrument, rows[rows[:, TRACK] == track, TOKEN], self.vocabulary)
            for track, instrument in enumerate(self.score.instruments.tolist())
        ]

    def find_tracks(self, name: str) -> list[int]:
        """Tracks of `score` for a number, counted from 1 in the file's order, or an instrument's name."""
        tracks = self.source.score.tracks
        if name.isdecimal():
            chosen = [i for i, number in enumerate(self.track_of) if number == int(name) - 1]
            said = "they count from 1"
        else:
            try:
                instrument, said = parse_instrument(name), "none of its tracks plays it"
            except UserError:
                instrument, said = None, "no General MIDI instrument begins so"
            chosen = [i for i, track in enumerate(self.score.tracks) if track.instrument == instrument]
        if not chosen:
            names = (f"{i} {instrument_name(track.instrument)}" for i, track in enumerate(tracks, 1))
            raise UserError(f"{self.path}: no track {name}: {said}; it has {', '.join(names)}")
        return chosen

    def stream(
        self,
        first: int,
        last: int,
        masked: frozenset[tuple[int, int]] = frozenset(),
        steering: Steering = FREE,
        adds_parts: bool = False,
        without_tracks: bool = False,
    ) -> tuple[np.ndarray, list[int]]:
        """The head of a stream, all tracks of the bars [first, last) or none, and which tracks of `score` it holds.

        `masked`: (track, bar) cells that hold a MASK; a bar beyond the piece's end has the last meter and tempo. Tracks
        that are silent there and have no such cell are left out. Conditions are those of `steering`, its chords laid
        over the masked bars (all bars, if none is), and beside it what is derived from the score.
        """
        v, score = self.vocabulary, self.score
        ends = self.is_whole and last == score.num_bars if steering.end is None else steering.end
        marks = [v.PIECE_BEGIN] * (first == 0 and steering.begin is not False) + [v.PIECE_END] * ends
        tokens = self.tokenizer.encode(_window(score, first, last), order="given")
        kind = v.family_of[tokens]
        instruments = np.flatnonzero(kind == Family.INSTRUMENT)
        pieces = np.split(tokens[:-1], instruments)
        parts = [tokens[:1], marks, pieces.pop(0)[1:]]
        lines = replace(score, num_bars=last).bar_lines()
        inside = score.notes[(score.notes["onset"] >= lines[first]) & (score.notes["onset"] < lines[last])]
        sounding, tracks = set(np.unique(inside["track"]).tolist()), []
        for track, instrument in enumerate([] if without_tracks else score.instruments.tolist()):
            chosen = {bar - first for t, bar in masked if t == track and first <= bar < last}
            if track not in sounding and not chosen:
                continue
            tracks.append(track)
            piece = pieces.pop(0) if track in sounding else np.array([v.instrument(instrument)])
            head, *bars = np.split(piece, np.flatnonzero(piece == v.BAR))
            bars += [np.array([v.BAR])] * (max(chosen, default=-1) + 1 - len(bars))
            parts += [head, *([v.BAR, v.MASK] if bar in chosen else cell for bar, cell in enumerate(bars))]
        bars = sorted({bar for _, bar in masked}) or range(first, last)
        frame = Frame(first, last, bars, tracks, adds_parts)
        rows = prompt_rows(self.derived, score, frame, steering.controls(v, self.tags))
        return insert(np.concatenate(parts).astype(np.uint16), rows, v), tracks


def _window(score: Score, first: int, last: int) -> Score:
    """Bars [first, last) of a quantized score, all its tracks; it may end later than the score does."""
    lines = replace(score, num_bars=last).bar_lines()
    start, end = int(lines[first]), int(lines[-1])
    notes = score.notes[(score.notes["onset"] >= start) & (score.notes["onset"] < end)].copy()
    notes["onset"] -= start
    tables = []
    for table in (score.meters, score.tempos):
        table = table[np.searchsorted(table["tick"], start, side="right") - 1 : np.searchsorted(table["tick"], end)]
        table = table.copy()
        table["tick"] = np.maximum(table["tick"] - start, 0)
        tables.append(table)
    return replace(score, notes=notes, meters=tables[0], tempos=tables[1], num_bars=last - first)
