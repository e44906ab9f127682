"""Obedience: does a model write what it is asked for? Measured on pieces that it never saw.

In: a model, a corpus and its data settings. Windows of held-out pieces say what is asked for: bars, meter, tempo,
instruments, and every condition that the model knows, derived from the window's own notes (`hid.conditions`); every
other window is the end of its piece. `SAMPLES_A_WINDOW` pieces are written for each. Out: for each measure

    {"asked": 0.71, "shuffled": 0.38, "real": 0.80, "share_of_gap": 0.79}

what the samples reach against what was asked of them, the same samples against what was asked of another window, and
the real windows against their own conditions; and how much of the way from `shuffled` to `real` is gone.

- key, chords: share of pitched notes in the scale of the key, in the chord of the half bar they begin in (`none` aside)
- density, bar_density, track_density, polyphony: mean distance in bins between asked and derived from the sample
- role: share of parts that have the role that was asked for
- end: share of samples whose last bar is thin, with fewer than THIN times the notes of the bars before on average. The
  windows that end their piece are asked for twice more, with the mark of an end (asked) and without it (in the place of
  shuffled), all else equal and the bars' densities untold, which would ask for a thin bar themselves; real ends
  (real) stand beside other real windows (real_other)

>>> measure(model, corpus, config.data, num_samples=32)["measures"]["chords"]["share_of_gap"]   # doctest: +SKIP

The surprise: nothing of a real window reaches the model but what a musician could have typed. So its parts stand in the
order in which a request writes them, and not in the encoder's, which knows how low a part lies: track i of a sample is
what was asked of track i of its window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from meloformer.config import DataConfig
from meloformer.data import Corpus
from meloformer.data.packing import split_pieces
from meloformer.data.windows import PieceTable
from meloformer.errors import UserError
from meloformer.generation import Part, Request, Sampling, Steering, generate
from meloformer.generation.request import request_order
from meloformer.hid import Tokenizer
from meloformer.hid.conditions import CHORD_TONES, KEY_TONES, Conditions, chord_name, derive, key_name
from meloformer.hid.controls import CONDITIONS
from meloformer.hid.tokenizer import reorder_tracks
from meloformer.hid.vocabulary import ROLES
from meloformer.midi.score import DRUMS, Score
from meloformer.model import MeloFormer

NUM_BARS = 8
SAMPLES_A_WINDOW = 2
ROOM = 0.75  # of the longest stream: what a real window may take of it, the rest is for conditions and more notes
THIN = 0.8  # of 480 pieces of a band's and choral music 50 % end so, and of their other windows 8 % (docs/log.md)
NO_CHORD = len(CHORD_TONES) - 1


@dataclass
class Window:
    """Some bars of a real piece and what they say of themselves."""

    score: Score
    conditions: Conditions
    begins: bool
    ends: bool

    def request(self, known: list[str], end: bool | None = None) -> Request:
        """The same bars anew; known: names of the conditions that may be asked for; end: not the window's own."""
        score, c = self.score, self.conditions
        numerator, denominator = (int(score.meters[0][name]) for name in ("numerator", "denominator"))
        halves = half_chords(c, score)
        parts = [
            Part(
                instrument,
                ROLES[c.role[i]] if "role" in known else None,
                int(c.track_density[i]) + 1 if "density" in known else None,
                int(c.polyphony[i]) + 1 if "polyphony" in known and c.polyphony[i] >= 0 else None,
            )
            for i, instrument in enumerate(score.instruments.tolist())
        ]
        steering = Steering(
            key=key_name(c.key) if "key" in known and c.key is not None else None,
            chords=[chord_name(chord) for chord in halves.ravel().tolist()] if "chords" in known else None,
            chord_bars=1 / halves.shape[1],
            density=c.density + 1 if "density" in known and c.density is not None else None,
            bar_density=c.bar_density.tolist() if "bar_density" in known else None,
            parts=parts,
            begin=self.begins,
            end=self.ends if end is None else end,
        )
        return Request(
            score.num_bars,
            (numerator, denominator),
            int(score.tempos[0]["qpm"]),
            score.instruments.tolist(),
            steering=steering,
            chooses=False,  # a model that writes conditions itself is asked for no more than the others are
        )


def half_chords(conditions: Conditions, score: Score) -> np.ndarray:
    """(bars, 2) the chord in force in each half bar, (bars, 1) where the first meter's number is odd."""
    parts = 2 - int(score.meters[0]["numerator"]) % 2
    halves = np.full((score.num_bars, parts), -1, dtype=np.int64)
    for bar, tick, chord in conditions.chords.tolist():
        halves[bar, min(int(tick > 0), parts - 1)] = chord
    flat = halves.ravel()
    return flat[np.maximum.accumulate(np.where(flat >= 0, np.arange(len(flat)), 0))].reshape(halves.shape)


def draw_windows(corpus: Corpus, data: DataConfig, count: int, max_tokens: int, seed: int, split: str) -> list[Window]:
    """`count` windows of NUM_BARS bars, or as many as fit, one piece after the other; the even ones end their piece.

    Windows in which the meter changes are passed over, and those without a pitched note. Tracks stand as a request of
    the window's instruments writes them.
    """
    pieces = split_pieces(corpus, data)[0][split]
    tokenizer, rng, windows = Tokenizer(corpus.vocabulary), np.random.default_rng(seed), []
    for piece in [*rng.permutation(pieces)] * (4 * -(-count // max(len(pieces), 1))):
        table = PieceTable(corpus.piece(int(piece)), corpus.vocabulary)
        wants_end = len(windows) % 2 == 0
        bars = min(NUM_BARS, table.num_bars - (not wants_end))
        while bars > 1:
            first = table.num_bars - bars if wants_end else int(rng.integers(table.num_bars - bars))
            if table.cost(first, first + bars)[0] <= max_tokens:
                break
            bars -= 1
        if bars < 2:
            continue
        score = tokenizer.decode(table.window(first, first + bars))
        score = reorder_tracks(score, np.array(request_order(score.instruments.tolist()), dtype=np.int64))
        found = derive(score)
        if len(score.meters) == 1 and found.key is not None:
            windows.append(Window(score, found, first == 0, wants_end))
        if len(windows) == count:
            break
    return windows


# --- the measures ---------------------------------------------------------------------------------------------------


def pitched_notes(score: Score) -> np.ndarray:
    """The note table without drums."""
    return score.notes[score.instruments[score.notes["track"]] != DRUMS]


def share_in_key(score: Score, asked: Window) -> tuple[float, float]:
    """(notes in the scale, all pitched notes)."""
    notes = pitched_notes(score)
    return float(KEY_TONES[asked.conditions.key][notes["pitch"] % 12].sum()), len(notes)


def share_in_chords(score: Score, asked: Window) -> tuple[float, float]:
    """(notes in the chord where they begin, all pitched notes where there is one); another window's chords repeat."""
    notes, lines = pitched_notes(score), score.bar_lines()
    halves = half_chords(asked.conditions, asked.score)
    bar = np.searchsorted(lines, notes["onset"], side="right") - 1
    part = (notes["onset"] - lines[bar]) * halves.shape[1] // (lines[bar + 1] - lines[bar])
    chord = halves[bar % len(halves), part]
    some = chord != NO_CHORD
    return float(CHORD_TONES[chord, notes["pitch"] % 12][some].sum()), int(some.sum())


def _distance(found: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """(sum of distances, how many); what is shorter repeats, -1 is not compared."""
    asked = np.resize(asked, len(found))
    both = (found >= 0) & (asked >= 0)
    return float(np.abs(found - asked)[both].sum()), int(both.sum())


def _distances(of: Callable[[Conditions], np.ndarray]) -> Callable[[Score, Window], tuple[float, float]]:
    return lambda score, asked: _distance(np.atleast_1d(of(derive(score))), np.atleast_1d(of(asked.conditions)))


def same_role(score: Score, asked: Window) -> tuple[float, float]:
    role = derive(score).role
    return float((role == np.resize(asked.conditions.role, len(role))).sum()), len(role)


# Name of the measure: the condition that the model must know, and what is added up: (sum, number).
MEASURES: dict[str, tuple[str, Callable[[Score, Window], tuple[float, float]]]] = {
    "key": ("key", share_in_key),
    "chords": ("chords", share_in_chords),
    "density": ("density", _distances(lambda c: c.density)),
    "bar_density": ("bar_density", _distances(lambda c: c.bar_density)),
    "track_density": ("density", _distances(lambda c: c.track_density)),
    "polyphony": ("polyphony", _distances(lambda c: c.polyphony)),
    "role": ("role", same_role),
}


def is_thin_at_the_end(score: Score) -> bool:
    """Whether the last bar has fewer than THIN times the notes of the bars before, on average."""
    notes = np.histogram(score.notes["onset"], score.bar_lines())[0]
    return bool(notes[-1] < THIN * notes[:-1].mean())


def compare(
    samples: list[list[Score]], windows: list[Window], known: list[str], endings: dict[bool, list[Score]]
) -> dict[str, dict[str, float]]:
    """The module's docstring has it; samples[i] were asked for what windows[i] says, by the conditions `known`.

    endings: what was written for the windows that end, with the mark and without it; empty where none ends.
    """
    others = windows[1:] + windows[:1]
    table = {}
    for name, (condition, of) in MEASURES.items():
        if condition not in known:
            continue
        asked = _mean(of(score, window) for scores, window in zip(samples, windows) for score in scores)
        shuffled = _mean(of(score, other) for scores, other in zip(samples, others) for score in scores)
        real = _mean(of(window.score, window) for window in windows)
        table[name] = {"asked": asked, "shuffled": shuffled, "real": real, "share_of_gap": _gap(asked, shuffled, real)}
    real = {end: [is_thin_at_the_end(w.score) for w in windows if w.ends == end] for end in (True, False)}
    if endings and all(real.values()):
        asked, other = (float(np.mean([is_thin_at_the_end(s) for s in endings[mark]])) for mark in (True, False))
        real_end, real_other = float(np.mean(real[True])), float(np.mean(real[False]))
        table["end"] = {
            "asked": asked,
            "shuffled": other,
            "real": real_end,
            "share_of_gap": _gap(asked, other, real_end),
            "real_other": real_other,
        }
    return table


def _mean(pairs) -> float:
    sums = np.array(list(pairs), dtype=np.float64).sum(axis=0)
    return float(sums[0] / max(sums[1], 1))


def _gap(asked: float, shuffled: float, real: float) -> float | None:
    return (asked - shuffled) / (real - shuffled) if real != shuffled else None


def measure(
    model: MeloFormer,
    corpus: Corpus,
    data: DataConfig,
    num_samples: int = 32,
    seed: int = 0,
    guidance: float = 1.0,
    split: str = "validation",
    sampling: Sampling | None = None,
) -> dict:
    """{"measures": {name: {"asked", "shuffled", "real", "share_of_gap"}}, "samples", "windows", "bars", ...}.

    Bounded: num_samples, rounded up to whole windows, of NUM_BARS bars at most. UserError for a model that knows no
    condition.
    """
    known = [name for name in model.conditions if name in CONDITIONS]
    if not known:
        raise UserError("obedience: the model was trained without conditions, so there is nothing to ask of it")
    count = max(2, -(-num_samples // SAMPLES_A_WINDOW))
    windows = draw_windows(corpus, data, count, int(ROOM * model.max_seq_len), seed, split)
    if len(windows) < 2:
        raise UserError(f"obedience: the {split} split has no two windows of one meter; try --split train")

    def write(number: int, request: Request) -> list[Score]:
        written = generate(model, request, SAMPLES_A_WINDOW, sampling, seed + number, guidance=guidance)
        return [sample.score for sample in written]

    samples = [write(number, window.request(known)) for number, window in enumerate(windows)]
    untold = [name for name in known if name != "bar_density"]
    endings = {
        mark: [score for i, w in enumerate(windows) if w.ends for score in write(i, w.request(untold, mark))]
        for mark in (True, False)
    }
    return {
        "measures": compare(samples, windows, known, endings),
        "samples": sum(map(len, samples)),
        "windows": len(windows),
        "bars": sum(score.num_bars for group in samples for score in group),
        "guidance": guidance,
        "seed": seed,
    }


def report(obedience: dict) -> str:
    """The measures as a table for people."""
    lines = [
        f"{obedience['samples']} pieces asked for what {obedience['windows']} held-out windows are, "
        f"guidance {obedience['guidance']:g}",
        f"{'':16}{'asked':>10}{'shuffled':>10}{'real':>10}{'of the gap':>12}",
    ]
    for name, row in obedience["measures"].items():
        share = "" if row["share_of_gap"] is None else f"{row['share_of_gap']:12.2f}"
        lines.append(
            f"{name.replace('_', ' '):16}{row['asked']:10.3f}{row['shuffled']:10.3f}{row['real']:10.3f}{share}"
        )
    return "\n".join(lines)
