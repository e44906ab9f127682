"""A planted copy is found in any key, at its length; what is no copy is not; runs against a search bar by bar."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from meloformer.evaluation.bars import Bars, bars_of
from meloformer.evaluation.memorisation import Copies, Library
from meloformer.midi import read_score


def piece(seed: int, num_bars: int = 20, tracks: int = 2, notes: int = 5, pitches: int = 24) -> Bars:
    """Pitched tracks with `notes` notes a bar, drawn anew each bar."""
    rng = np.random.default_rng(seed)
    track, bar = (x.reshape(-1) for x in np.meshgrid(np.arange(tracks), np.arange(num_bars), indexing="ij"))
    track, bar = np.repeat(track, notes), np.repeat(bar, notes)
    onset = np.tile(np.arange(notes) * 12, tracks * num_bars)
    pitch = rng.integers(40, 40 + pitches, len(bar))
    lines = np.arange(num_bars + 1) * 96
    return Bars(
        track, bar, onset, pitch, np.full(len(bar), 12), lines, np.arange(tracks, dtype=np.int32), f"piece {seed}"
    )


def planted(source: Bars, host: Bars, first: int, length: int, interval: int, track: int = 0) -> Bars:
    """`host` with bars [2, 2 + length) of `track` replaced by bars from `first` on of the source's track 0."""
    keep = np.flatnonzero(~((host.track == track) & (host.bar >= 2) & (host.bar < 2 + length)))
    mine = np.flatnonzero((source.track == 0) & (source.bar >= first) & (source.bar < first + length))
    columns = {}
    for name in ("track", "bar", "onset", "pitch", "duration"):
        columns[name] = np.concatenate([getattr(host, name)[keep], getattr(source, name)[mine]])
    columns["track"][len(keep) :] = track
    columns["bar"][len(keep) :] += 2 - first
    columns["pitch"][len(keep) :] += interval
    columns["duration"][len(keep) :] = 30  # played longer: a copy all the same
    return replace(host, **columns)


@pytest.mark.parametrize("length, interval", [(4, 0), (5, 0), (5, 7), (9, -5), (18, 3)])
def test_a_planted_copy_is_found_at_its_length_in_any_key(length, interval):
    source = piece(0)
    library = Library([piece(1), source, piece(2)])
    found = library.copies(planted(source, piece(9), 1, length, interval, track=1))
    assert found["tracks"] == (Copies(1, 2, length) if length >= 5 else Copies(0, 2, 0))
    assert found["jointly"] == Copies(0, 1, 0), "the other track plays something else"


def test_another_interval_in_every_bar_is_no_copy():
    """Equal bars in keys of their own: each bar is found, the run is not."""
    source = piece(0)
    copy = planted(source, piece(9), 1, 8, 0)
    moved = replace(copy, pitch=copy.pitch + np.where(copy.track == 0, copy.bar % 3, 0))
    library = Library([source])
    assert library.copies(copy)["tracks"].copied == 1 and library.copies(moved)["tracks"].copied == 0
    assert library.nearest(moved)[1] == pytest.approx(8 / 40)


def test_thin_bars_and_one_bar_again_and_again_are_nobodys():
    thin = piece(0, notes=3)
    assert Library([thin]).copies(thin)["tracks"] == Copies(0, 0, 0)
    assert Library([thin]).copies(thin)["jointly"] == Copies(1, 1, 20), "two thin tracks together are thick enough"
    ostinato = piece(1)
    first = np.flatnonzero((ostinato.bar == 0) & (ostinato.track == 0))
    again = ostinato.at(np.tile(first, 20))
    again = replace(again, bar=np.repeat(np.arange(20), len(first)))
    assert Library([again]).copies(again)["tracks"] == Copies(0, 0, 0)


def test_all_tracks_jointly_copied_and_a_library_without_music():
    source = piece(4)
    library = Library([piece(5), source])
    assert library.copies(source) == {"tracks": Copies(2, 2, 20), "jointly": Copies(1, 1, 20)}
    assert library.nearest(source) == ("piece 4", 1.0)
    assert Library([]).copies(source)["tracks"] == Copies(0, 2, 0) and Library([]).nearest(source) == ("", 0.0)


def slow_runs(bars: Bars, length: int = 5) -> set:
    """Every run of `length` bars of a pitched track: shapes and steps of its lowest notes, as tuples."""
    found = set()
    for track in range(bars.num_tracks):
        if bars.instruments[track] == 128:
            continue
        shapes = []
        for bar in range(bars.num_bars):
            at = (bars.track == track) & (bars.bar == bar)
            notes = set(zip(bars.onset[at].tolist(), bars.pitch[at].tolist()))
            low = min((pitch for _, pitch in notes), default=0)
            shape = frozenset((onset, pitch - low) for onset, pitch in notes)
            shapes.append((shape, low) if len(notes) >= 4 else None)
        for start in range(bars.num_bars - length + 1):
            run = shapes[start : start + length]
            if None not in run and len(set(run)) > 1:
                found.add(tuple((shape, low - run[0][1]) for shape, low in run))
    return found


def test_copies_are_those_of_a_search_bar_by_bar(real_midi):
    """Real rhythms, with every seventh bar gone, so that runs are broken at all places of a phrase."""
    files = sorted((real_midi / "freedoom").glob("d_e1m*.mid"))[:6]
    pool = [bars_of(read_score(file)) for file in files]
    library, known = Library(pool[:3]), set().union(*map(slow_runs, pool[:3]))
    copied = judged = 0
    for bars in pool:
        bars = bars.at(np.flatnonzero(bars.bar % 7 != 0))
        one_track = [slow_runs(bars.at(np.flatnonzero(bars.track == track))) for track in range(bars.num_tracks)]
        found = library.copies(bars)["tracks"]
        assert found.copied == sum(bool(mine & known) for mine in one_track)
        assert found.judged == sum(map(bool, one_track)) and found.longest in (0, 6)
        copied, judged = copied + found.copied, judged + found.judged
    assert 0 < copied < judged
