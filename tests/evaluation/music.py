"""Random pieces for the metrics: several tracks, drums, changing meters, held notes, empty bars."""

from __future__ import annotations

import numpy as np

from meloformer.evaluation.bars import Bars, bars_of
from meloformer.hid import Vocabulary, quantize
from meloformer.midi.score import Score, Track, note_table


def random_score(seed: int, num_bars: int = 12, meters=((0, 4, 4),)) -> Score:
    """Quantized. Few pitches and onsets, so that bars share notes; track 3 is silent half of the time."""
    rng = np.random.default_rng(seed)
    rows = []
    for track in range(4):
        for bar in range(num_bars):
            if (track == 3 and bar % 4 < 2) or (track == 2 and bar == 5):
                continue
            for _ in range(int(rng.integers(1, 6))):
                onset = 96 * bar + 12 * int(rng.integers(8))
                rows.append((track, onset, int(rng.choice([6, 12, 24, 150])), 48 + int(rng.integers(8)), 90))
    tracks = [Track(0, is_drum=True), Track(33), Track(0), Track(0)]
    return quantize(Score(24, tracks, note_table(rows), meters=list(meters)), Vocabulary())


def random_bars(seed: int, **named) -> Bars:
    return bars_of(random_score(seed, **named), f"piece {seed}")


MIXED = ((0, 4, 4), (384, 3, 4), (384 + 72 * 3, 4, 4))
