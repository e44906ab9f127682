"""Controls put into a stream and taken out: every subset of conditions is a valid stream of the same music."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.hid import Family, Tokenizer, Vocabulary
from meloformer.hid.conditions import CONDITIONS, derive, insert, strip
from meloformer.hid.controls import control_rows, num_tokens
from meloformer.hid.tokenizer import canonical_order, reorder_tracks
from meloformer.midi import read_score
from tests.data.music import make_score
from tests.hid.streams import VOCABULARY, random_stream
from tests.midi.real_files import midi_files

TOKENIZER = Tokenizer(VOCABULARY)
V = VOCABULARY
subsets = st.sets(st.sampled_from(list(CONDITIONS)))


def check(score, which) -> None:
    """The stream with these conditions is valid, holds the same score, and gives it back with and without them."""
    plain = TOKENIZER.encode(score, order="given")
    rows = derive(score, tag=3).rows(V, which)
    tokens = insert(plain, rows, V)
    TOKENIZER.validate(tokens)
    assert len(tokens) == len(plain) + num_tokens(rows)
    assert strip(tokens, CONDITIONS, V).tolist() == plain.tolist()
    decoded = TOKENIZER.decode(tokens)
    assert TOKENIZER.encode(decoded, order="given").tolist() == tokens.tolist()
    assert [list(control) for control in decoded.controls] == rows.tolist()
    decoded.controls = []
    assert decoded == score
    present = set(V.family_of[tokens].tolist())
    assert not present & {int(CONDITIONS[name]) for name in CONDITIONS if name not in which}


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10), subsets)
def test_every_subset_of_conditions_holds_the_same_music(seed, which):
    score = TOKENIZER.quantize(make_score(seed))
    check(reorder_tracks(score, canonical_order(score)), which)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), subsets)
def test_conditions_of_any_valid_stream(seed, which):
    """Odd meters, empty bars, several tracks of one instrument: whatever the grammar holds."""
    score = TOKENIZER.decode(random_stream(seed, masks=False, tracks=True))
    score.controls = []
    check(score, which)


def test_conditions_of_real_files(real_midi):
    files = [path for path in midi_files(real_midi) if "awkward" not in path.parts]
    for path in files[::250]:
        score = TOKENIZER.quantize(read_score(path))
        check(score, CONDITIONS)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 2**32 - 1))
def test_what_is_stripped_can_be_put_back(seed):
    """All controls that random streams hold: marks and reserved ones stay, bars of tracks and several of a place."""
    tokens = random_stream(seed, masks=False)
    plain = strip(tokens, CONDITIONS, V)
    TOKENIZER.validate(plain)
    conditions = {int(family) for family in CONDITIONS.values()}
    rows = [c for c in TOKENIZER.decode(tokens).controls if int(V.family_of[c.token]) in conditions]
    assert insert(plain, rows, V).tolist() == tokens.tolist()
    assert insert(plain, rows[::-1], V).tolist() == tokens.tolist()
    chords = {tuple(row[:2]) for row in rows if row[2] >= 0}
    some = [row for i, row in enumerate(rows) if i % 2 or (tuple(row[:2]) in chords and row[2] >= 0)]
    rest = [row for row in rows if row not in some]
    assert insert(insert(plain, some, V), rest, V).tolist() == tokens.tolist()


def test_a_deferred_bar_keeps_its_conditions():
    score = TOKENIZER.quantize(make_score(2))
    plain = TOKENIZER.encode(score, order="given")
    tokens = insert(plain, derive(score).rows(V), V)
    cells = [(0, 1), (1, 3), (2, 11)]
    moved = TOKENIZER.defer(tokens, cells)
    TOKENIZER.validate(moved)
    assert insert(TOKENIZER.defer(plain, cells), derive(score).rows(V), V).tolist() == moved.tolist()
    assert TOKENIZER.undefer(moved).tolist() == tokens.tolist()


def test_a_conductor_alone_may_be_a_head_or_whole():
    """The last bar's chord stood before its bar where no EOS follows: a piece is begun from such a head."""
    head = [V.BOS, V.CONDUCTOR, V.BAR, V.meter(4, 4), V.tempo(120), V.BAR]
    chord = [(-1, 1, 0, V.start(Family.CHORD))]
    for end in ([], [V.EOS]):
        assert insert(np.array(head + end), chord, V).tolist() == [*head, V.time(0), V.start(Family.CHORD), *end]


def test_a_place_that_is_not_there_or_taken_is_refused():
    note = [V.time(0), V.pitch(60), V.duration(24), V.velocity(90)]
    head = [V.BOS, V.CONDUCTOR, V.BAR, V.meter(4, 4), V.tempo(120)]
    tokens = np.array([*head, V.instrument(0), V.BAR, *note, V.EOS])
    key, chord, role = V.token(Family.KEY, 0), V.token(Family.CHORD, 0), V.token(Family.ROLE, 0)
    for row in ((1, -1, -1, role), (-1, 1, 0, chord), (0, 1, -1, key), (0, 0, 0, chord), (-2, -1, -1, key)):
        with pytest.raises(ValueError, match="no such place"):
            insert(tokens, [row], V)
    with pytest.raises(ValueError, match="one of its family"):
        insert(insert(tokens, [(-1, -1, -1, key)], V), [(-1, -1, -1, key + 1)], V)
    with pytest.raises(ValueError, match="chords"):
        insert(insert(tokens, [(-1, 0, 0, chord)], V), [(-1, 0, 48, chord)], V)


def test_rows_sort_into_the_order_of_the_stream():
    v = Vocabulary()
    rows = [
        (0, -1, -1, v.token(Family.ROLE, 0)),
        (-1, 0, 48, v.token(Family.CHORD, 1)),
        (-1, -1, -1, v.token(Family.TAG, 0)),
    ]
    assert control_rows(rows).tolist() == [list(row) for row in rows[::-1]]
    assert control_rows([]).shape == (0, 4)
