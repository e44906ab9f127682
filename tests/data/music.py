"""Small invented pieces, and corpora of them: no real music is needed to test how it is stored and cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meloformer.config import PreprocessConfig
from meloformer.data import Corpus
from meloformer.data.preprocess import preprocess
from meloformer.midi import Score, Track, note_table, write_midi

METERS = ((4, 4), (3, 4), (6, 8))
TRACKS = (Track(0, is_drum=True), Track(33), Track(0), Track(0), Track(73))


def make_score(seed: int, num_bars: int = 12, density: float = 0.7) -> Score:
    """Four to five tracks, two of them pianos, with rests, chords, a meter change and a tempo change."""
    rng = np.random.default_rng(seed)
    change = int(rng.integers(2, num_bars - 1))
    first, second = (METERS[i] for i in rng.permutation(len(METERS))[:2])
    length = {meter: 480 * 4 * meter[0] // meter[1] for meter in METERS}
    lines = [0]
    for bar in range(num_bars):
        lines.append(lines[-1] + length[first if bar < change else second])
    notes = []
    for track in range(len(TRACKS)):
        for bar in range(num_bars):
            if rng.random() > density and (track, bar) != (0, num_bars - 1):
                continue
            for onset in rng.choice(np.arange(0, 1440, 120), size=rng.integers(1, 5), replace=False):
                for pitch in rng.choice(np.arange(40, 90), size=rng.integers(1, 4), replace=False):
                    notes.append((track, lines[bar] + int(onset), int(rng.integers(60, 900)), int(pitch), 80))
    return Score(
        480,
        list(TRACKS),
        note_table(notes),
        meters=[(0, *first), (lines[change], *second)],
        tempos=[(0, 120.0), (lines[num_bars // 2], 90.0)],
    )


def write_folder(folder: Path, seeds, num_bars: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        write_midi(make_score(seed, num_bars), folder / f"piece{seed:03d}.mid")
    return folder


def make_corpus(folder: Path, seeds=range(24), num_bars: int = 12, **settings) -> Corpus:
    """Write MIDI files, preprocess them, open the result."""
    write_folder(folder / "midi", seeds, num_bars)
    preprocess(PreprocessConfig(input=str(folder / "midi"), output=str(folder / "corpus"), **settings))
    return Corpus(folder / "corpus")
