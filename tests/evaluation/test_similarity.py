"""The similarity curve and repeats against sets of notes, compared pair by pair; controls fall where they should."""

from __future__ import annotations

import numpy as np
import pytest

from meloformer.evaluation.bars import bars_of, loop, shuffled_bars
from meloformer.evaluation.similarity import (
    DISTANCES,
    VIEWS,
    curve,
    peaks,
    repeats,
    similarity_error,
    similarity_sums,
)
from meloformer.midi import read_score
from tests.evaluation.music import MIXED, random_bars


def slowly(bars, view):
    """(DISTANCES, 2) by sets, pair by pair."""
    drums = [track for track in range(bars.num_tracks) if bars.instruments[track] == 128]
    pitched = [track for track in range(bars.num_tracks) if track not in drums]
    parts = {"pitched": [pitched], "drums": [drums], "tracks": [[t] for t in range(bars.num_tracks)]}[view]
    sums = np.zeros((DISTANCES, 2))
    for part in parts:
        sets = [set() for _ in range(bars.num_bars)]
        for i in range(len(bars.bar)):
            if bars.track[i] in part:
                sets[bars.bar[i]].add((int(bars.pitch[i]), int(bars.duration[i]), int(bars.onset[i])))
        for i in range(bars.num_bars):
            for j in range(i + 1, min(i + DISTANCES + 1, bars.num_bars)):
                if sets[i] | sets[j]:
                    sums[j - i - 1] += len(sets[i] & sets[j]) / len(sets[i] | sets[j]), 1
    return sums


@pytest.mark.parametrize("seed, num_bars, meters", [(0, 50, ((0, 4, 4),)), (1, 12, MIXED), (2, 1, ((0, 4, 4),))])
def test_sums_are_those_of_sets(seed, num_bars, meters):
    bars = random_bars(seed, num_bars=num_bars, meters=meters)
    found = similarity_sums(bars)
    assert found.keys() == set(VIEWS)
    for view in VIEWS:
        assert found[view] == pytest.approx(slowly(bars, view)), view


def test_pairs_without_a_note_do_not_count():
    """Two empty bars are alike, but say nothing: counted as 1 they would make silence look like form."""
    bars = random_bars(0)
    silent = bars.at(np.flatnonzero(np.isin(bars.bar, (0, 6))))
    assert similarity_sums(silent)["pitched"][:, 1].tolist() == slowly(silent, "pitched")[:, 1].tolist()
    nothing = bars.at(np.zeros(0, dtype=int))
    assert np.isnan(curve(similarity_sums(nothing)["pitched"])).all() and repeats(nothing) == (0, 0)


def test_a_bar_repeats_if_its_track_had_the_very_notes_before():
    for seed in range(3):
        bars = random_bars(seed, num_bars=30)
        bars = loop(bars) if seed else bars
        seen, again, every = set(), 0, 0
        for track in range(bars.num_tracks):
            for bar in range(bars.num_bars):
                notes = frozenset(bars.code[(bars.track == track) & (bars.bar == bar)].tolist())
                if notes:
                    every += 1
                    again += (track, notes) in seen
                    seen.add((track, notes))
        assert repeats(bars) == (again, every)


def test_peaks_and_error_of_curves_by_hand():
    flat, phrase = np.full(DISTANCES, 0.2), np.full(DISTANCES, 0.2)
    phrase[3::4] = 0.5
    assert peaks(flat) == pytest.approx(0) and peaks(phrase) == pytest.approx(30)
    assert similarity_error(flat, phrase) == pytest.approx(100 * 0.3 / 4)
    half_known = np.where(np.arange(DISTANCES) < 20, phrase, np.nan)
    assert similarity_error(half_known, phrase) == 0
    assert np.isnan(similarity_error(np.full(DISTANCES, np.nan), phrase))


def test_real_music_has_phrases_and_shuffled_music_has_none(real_midi):
    """Measured over 100 pieces: peaks of Freedoom 17.5 +- 1.8 %; here a dozen, so within wide bounds."""
    rng = np.random.default_rng(0)
    pieces = [bars_of(read_score(file), file.name) for file in sorted((real_midi / "freedoom").glob("*.mid"))[::8]]

    def peak(control):
        return float(peaks(curve(sum(similarity_sums(control(bars))["pitched"] for bars in pieces))))

    assert 8 < peak(lambda bars: bars) < 35
    assert abs(peak(lambda bars: shuffled_bars(bars, rng))) < 3
    assert peak(loop) > 50
    shares = [again / every for again, every in map(repeats, pieces)]
    assert 0.4 < np.mean(shares) < 0.9
