"""Each metric against its definition taken literally, note by note and tick by tick; and against MuSpy, where it is."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from meloformer.evaluation.bars import bars_of, bars_of_others, bars_of_stream, loop, shuffled_bars
from meloformer.evaluation.metrics import METRICS, measure
from meloformer.hid import Tokenizer
from meloformer.midi import read_score, write_midi
from meloformer.midi.score import DRUMS, Score, Track, note_table
from tests.evaluation.music import MIXED, random_bars, random_score


def slowly(bars, tracks) -> dict[str, float]:
    """Every metric of the notes of these tracks, by its definition."""
    lines = bars.lines.tolist()
    notes = [
        (int(bars.track[i]), int(bars.bar[i]), int(bars.onset[i]), int(bars.pitch[i]), int(bars.duration[i]))
        for i in range(len(bars.bar))
        if bars.track[i] in tracks
    ]
    pitched = [note for note in notes if bars.instruments[note[0]] != DRUMS]
    nan = float("nan")
    out = dict.fromkeys(METRICS, nan)
    classes = Counter(pitch % 12 for _, _, _, pitch, _ in pitched)
    if pitched:
        shares = [count / len(pitched) for count in classes.values()]
        out["pitch_class_entropy"] = -sum(p * math.log2(p) for p in shares)
        best = 0
        for steps in ((0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)):
            for root in range(12):
                scale = {(root + step) % 12 for step in steps}
                best = max(best, sum(count for pitch, count in classes.items() if pitch in scale))
        out["scale_consistency"] = best / len(pitched)
        sounding = defaultdict(set)
        for _, bar, onset, pitch, duration in pitched:
            for tick in range(lines[bar] + onset, lines[bar] + onset + duration):
                sounding[tick].add(pitch)
        out["polyphony"] = sum(map(len, sounding.values())) / len(sounding)
    if notes:
        grooves = [set() for _ in range(bars.num_bars)]
        loud = [False] * bars.num_bars
        for _, bar, onset, _, duration in notes:
            grooves[bar].add(onset)
            for tick in range(lines[bar] + onset, min(lines[bar] + onset + duration, lines[-1])):
                loud[max(b for b in range(bars.num_bars) if lines[b] <= tick)] = True
        pairs = []
        for b in range(bars.num_bars - 1):
            length = lines[b + 1] - lines[b]
            if lines[b + 2] - lines[b + 1] == length:
                pairs.append(len(grooves[b] ^ grooves[b + 1]) / length)
        out["groove_consistency"] = 1 - sum(pairs) / len(pairs) if pairs else nan
        out["empty_bar_rate"] = loud.count(False) / bars.num_bars
        out["notes_per_bar"] = len(notes) / len({(track if len(tracks) == 1 else 0, bar) for track, bar, *_ in notes})
    return out


@pytest.mark.parametrize("meters", [((0, 4, 4),), MIXED], ids=["4/4", "mixed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_metric_is_its_definition(seed, meters):
    bars = random_bars(seed, meters=meters)
    everything, found = slowly(bars, {0, 1, 2, 3}), measure(bars)
    assert found["all"] == pytest.approx(everything, nan_ok=True)
    for name, metric in METRICS.items():
        each = metric(bars, bars.track, bars.num_tracks)
        expected = [slowly(bars, {track})[name] for track in range(bars.num_tracks)]
        assert each == pytest.approx(np.array(expected), nan_ok=True), name
        known = [x for track, x in enumerate(expected) if not math.isnan(x)]
        assert found["tracks"][name] == pytest.approx(np.mean(known)), name


def test_what_has_nothing_to_measure_is_nan_and_not_zero():
    drums = bars_of(Score(24, [Track(0, is_drum=True)], note_table([(0, 0, 6, 36, 90), (0, 48, 6, 38, 90)])))
    values = measure(drums)["all"]
    assert all(math.isnan(values[name]) for name in ("pitch_class_entropy", "scale_consistency", "polyphony"))
    assert math.isnan(values["groove_consistency"]), "one bar has no neighbour"
    assert values["empty_bar_rate"] == 0 and values["notes_per_bar"] == 2
    empty = bars_of(Score(24, [Track(0)]))
    assert all(math.isnan(value) for value in measure(empty)["all"].values())


def test_bars_of_a_stream_and_of_its_score_are_the_same():
    tokenizer = Tokenizer()
    score = random_score(3, meters=MIXED)
    tokens = tokenizer.encode(score, order="given")
    one, other = bars_of(score), bars_of_stream(tokens, tokenizer.vocabulary)
    for name in ("track", "bar", "onset", "pitch", "duration", "lines", "instruments"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_controls_keep_what_they_should_and_lose_the_form():
    pool = [random_bars(seed) for seed in range(4)]
    rng = np.random.default_rng(0)
    bars = pool[0]

    def contents(piece):
        return sorted(sorted(zip(piece.track[at], piece.code[at])) for at in (piece.bar == b for b in range(12)))

    shuffled = shuffled_bars(bars, rng)
    assert contents(shuffled) == contents(bars) and not np.array_equal(shuffled.bar, bars.bar)

    foreign = bars_of_others(bars, pool, rng)
    cells = {(t, b) for t, b in zip(bars.track.tolist(), bars.bar.tolist())}
    assert {(t, b) for t, b in zip(foreign.track.tolist(), foreign.bar.tolist())} == cells
    for piece in (bars, foreign):
        assert sorted(zip(piece.bar[piece.is_drum], piece.code[piece.is_drum])) == sorted(
            zip(bars.bar[bars.is_drum], bars.code[bars.is_drum])
        )
    theirs = {
        tuple(sorted(p.code[(p.track == t) & (p.bar == b)])) for p in pool[1:] for t in (1, 2, 3) for b in range(12)
    }
    for track, bar in cells:
        if track != 0:
            assert tuple(sorted(foreign.code[(foreign.track == track) & (foreign.bar == bar)])) in theirs

    again = loop(bars)
    for b in range(12):
        assert sorted(again.code[again.bar == b]) == sorted(bars.code[bars.bar == b % 4])


def test_muspy_agrees_on_the_same_files(tmp_path):
    """MuSpy lets a note that ends on a bar line sound in the next bar, and counts bars to the end of the last note."""
    muspy = pytest.importorskip("muspy")
    for seed in range(4):
        score = random_score(seed)
        write_midi(score, tmp_path / "piece.mid")
        theirs = muspy.read_midi(tmp_path / "piece.mid")
        assert theirs.resolution == 24
        bars = bars_of(replace(score, num_bars=score.end_tick // 96 + 1))
        found = measure(bars)["all"]
        assert found["pitch_class_entropy"] == pytest.approx(muspy.pitch_class_entropy(theirs))
        assert found["scale_consistency"] == pytest.approx(muspy.scale_consistency(theirs))
        assert found["polyphony"] == pytest.approx(muspy.polyphony(theirs))
        assert found["groove_consistency"] == pytest.approx(muspy.groove_consistency(theirs, 96))
        longer = measure(replace(bars, duration=bars.duration + 1))["all"]
        assert longer["empty_bar_rate"] == pytest.approx(muspy.empty_measure_rate(theirs, 96))


def test_real_music_lies_where_real_music_lies(real_midi):
    """Medians of band music, and no value outside what its definition allows."""
    files = sorted((real_midi / "freedoom").glob("*.mid"))[:12]
    found = [measure(bars_of(read_score(file)))["all"] for file in files]
    for values in found:
        assert 0 <= values["pitch_class_entropy"] <= math.log2(12) and 7 / 12 <= values["scale_consistency"] <= 1
        assert (
            values["polyphony"] >= 1 and 0.5 < values["groove_consistency"] <= 1 and 0 <= values["empty_bar_rate"] < 1
        )
    median = {name: np.median([values[name] for values in found]) for name in METRICS}
    assert 2 < median["pitch_class_entropy"] < 3.4 and 0.8 < median["scale_consistency"] < 1
    assert 2 < median["polyphony"] < 8 and median["empty_bar_rate"] < 0.1
