"""Windows: a long piece is cut along bars, and nothing of it is lost, doubled or out of place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.data.windows import BAR_TOO_LONG, BAR_TOO_MANY, PieceTable, cut
from meloformer.hid import Family, Tokenizer
from meloformer.midi import read_score
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY, random_stream
from tests.midi.real_files import midi_files

TOKENIZER = Tokenizer(VOCABULARY)
MARKS = (VOCABULARY.PIECE_BEGIN, VOCABULARY.PIECE_END)


def notes_of(tokens: np.ndarray, first_bar: int = 0) -> list[tuple]:
    """Every note of a stream as (instrument, bar of the piece, onset in the bar, pitch, duration, velocity), sorted."""
    a, value = TOKENIZER.annotate(tokens), VOCABULARY.value_of[tokens]
    onsets = value[a.type == Family.TIME]
    at = np.flatnonzero(a.type == Family.PITCH)
    columns = (a.instrument[at], a.bar[at] + first_bar, onsets[a.onset[at]], value[at], value[at + 1], value[at + 2])
    return sorted(zip(*(column.tolist() for column in columns)))


def bar_lengths(tokens: np.ndarray) -> list[int]:
    return np.diff(TOKENIZER.decode(tokens).bar_lines()).tolist()


def tempos_by_bar(tokens: np.ndarray) -> list[float]:
    score = TOKENIZER.decode(tokens)
    place = np.searchsorted(score.tempos["tick"], score.bar_lines()[:-1], side="right") - 1
    return score.tempos["qpm"][place].tolist()


def check_tiling(tokens: np.ndarray, windows: list[tuple[int, int]], max_tokens: int, max_segments: int) -> None:
    table = PieceTable(tokens, VOCABULARY)
    assert [first for first, _ in windows] == [0, *(last for _, last in windows[:-1])]
    assert windows[-1][1] == table.num_bars
    notes, lengths, tempos = [], [], []
    for first, last in windows:
        window = table.window(first, last)
        TOKENIZER.validate(window)
        segments = int(TOKENIZER.annotate(window).segment.max()) + 1
        assert table.cost(first, last) == (len(window), segments)
        assert len(window) <= max_tokens and segments <= max_segments
        assert (MARKS[0] in window) == (first == 0) and (MARKS[1] in window) == (last == table.num_bars)
        notes += notes_of(window, first)
        lengths += bar_lengths(window)
        tempos += tempos_by_bar(window)
    assert sorted(notes) == notes_of(tokens)
    assert lengths == bar_lengths(tokens) and tempos == tempos_by_bar(tokens)


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 100_000), st.booleans(), st.integers(0, 60), st.floats(0.05, 1.0))
def test_windows_of_random_streams_tile_the_piece(seed, tracks, slack, share):
    tokens = random_stream(seed, max_length=300, masks=False, tracks=tracks)
    table = PieceTable(tokens, VOCABULARY)
    single = [table.cost(bar, bar + 1) for bar in range(table.num_bars)]
    max_tokens, max_segments = max(t for t, _ in single) + slack, max(1, *(s for _, s in single)) + slack // 8
    windows, skipped = cut(table, max_tokens, max_segments, first_share=share)
    assert not skipped
    check_tiling(tokens, windows, max_tokens, max_segments)


@pytest.mark.parametrize("seed", range(4))
def test_windows_of_a_score_tile_it_whatever_the_first_cut(seed):
    tokens = TOKENIZER.encode(make_score(seed, num_bars=30))
    seen = set()
    for share in (0.2, 0.5, 0.8, 1.0):
        windows, skipped = cut(PieceTable(tokens, VOCABULARY), 700, 60, first_share=share)
        assert not skipped and len(windows) > 2
        check_tiling(tokens, windows, 700, 60)
        seen.add(windows[0])
    assert len(seen) == 4, "the first offset has to move"


def test_greedy_windows_could_not_be_longer():
    table = PieceTable(TOKENIZER.encode(make_score(0, num_bars=40)), VOCABULARY)
    windows, _ = cut(table, 600, 40)
    for first, last in windows[:-1]:
        tokens, segments = table.cost(first, last + 1)
        assert tokens > 600 or segments > 40


def test_a_piece_that_fits_is_one_window_with_both_marks():
    tokens = TOKENIZER.encode(make_score(3))
    table = PieceTable(tokens, VOCABULARY)
    windows, _ = cut(table, len(tokens) + 2, 1000, first_share=0.3)
    assert windows == [(0, table.num_bars)]
    whole = table.window(0, table.num_bars)
    assert whole.tolist() == [tokens[0], *MARKS, *tokens[1:]]
    again = PieceTable(whole, VOCABULARY)  # marks of the piece itself are not doubled
    np.testing.assert_array_equal(again.window(0, table.num_bars), whole)


def test_a_bar_over_budget_is_left_out_and_counted():
    v = VOCABULARY
    note = [v.pitch(60), v.duration(12), v.velocity(80)]
    long_bar = [v.BAR] + [token for t in range(40) for token in (v.time(t), *note)]
    short = [v.BAR, v.time(0), *note]
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.BAR, v.BAR]
    tokens = np.array([*head, v.instrument(0), *short, *long_bar, *short, v.EOS])
    windows, skipped = cut(PieceTable(tokens, v), 100, 10)
    assert windows == [(0, 1), (2, 3)] and skipped == {BAR_TOO_LONG: 1}
    tracks = [token for i in range(3) for token in (v.instrument(i), *short)]
    windows, skipped = cut(PieceTable(np.array([*head, *tracks, v.EOS]), v), 100, 2)
    assert windows == [(1, 3)] and skipped == {BAR_TOO_MANY: 1}


def test_a_single_bar_may_use_the_whole_budget():
    """A window's own budget is what it should stay within; a bar that needs more is still better kept."""
    tokens = TOKENIZER.encode(make_score(1, num_bars=6))
    table = PieceTable(tokens, VOCABULARY)
    longest = max(table.cost(bar, bar + 1)[0] for bar in range(6))
    windows, skipped = cut(table, longest, 100, budget=lambda ordinal: longest // 2)
    assert not skipped
    check_tiling(tokens, windows, longest, 100)


def test_real_pieces_tile(real_midi):
    files = midi_files(real_midi / "freedoom")[::60] + midi_files(real_midi / "classical")[::100]
    for path in files:
        tokens = TOKENIZER.encode(read_score(path))
        table = PieceTable(tokens, VOCABULARY)
        longest = max(table.cost(bar, bar + 1)[0] for bar in range(table.num_bars))
        windows, skipped = cut(table, max(1024, longest), 86, first_share=0.6)
        if not skipped:
            check_tiling(tokens, windows, max(1024, longest), 86)
