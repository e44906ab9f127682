"""encode, decode, annotate, defer: what goes in comes out, on every valid stream and on every real file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.hid import Family, GrammarError, StreamState, Tokenizer, find_segments
from meloformer.hid.tokenizer import canonical_order, reorder_tracks
from tests.hid.streams import VOCABULARY, random_stream

TOKENIZER = Tokenizer(VOCABULARY)
seeds = st.integers(0, 2**32 - 1)


@given(seeds)
@settings(max_examples=150, deadline=None)
def test_every_valid_stream_decodes_and_encodes_to_itself(seed):
    tokens = random_stream(seed, masks=False)
    score = TOKENIZER.decode(tokens)
    assert TOKENIZER.encode(score, order="given").tolist() == tokens.tolist()
    assert TOKENIZER.decode(TOKENIZER.encode(score)) == reorder_tracks(score, canonical_order(score))


@given(seeds, st.data())
@settings(max_examples=150, deadline=None)
def test_undefer_is_the_inverse_of_defer(seed, data):
    tokens = random_stream(seed, masks=False)
    tracks = int((VOCABULARY.family_of[tokens] == Family.INSTRUMENT).sum())
    bars = TOKENIZER.decode(tokens).num_bars
    cells = [(t, b) for t in range(tracks) for b in range(bars)]
    chosen = data.draw(st.lists(st.sampled_from(cells), unique=True)) if cells else []
    moved = TOKENIZER.defer(tokens, chosen)
    TOKENIZER.validate(moved)
    assert (moved == VOCABULARY.MASK).sum() == len(chosen)
    assert TOKENIZER.undefer(moved).tolist() == tokens.tolist()
    assert TOKENIZER.decode(moved) == TOKENIZER.decode(tokens)
    # deferring some of the cells first, the rest later, is the same as all at once, up to undefer
    twice = TOKENIZER.defer(TOKENIZER.defer(tokens, chosen[::2]), chosen[1::2])
    assert twice.tolist() == moved.tolist()


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_streams_with_masks_decode_to_valid_scores(seed):
    tokens = random_stream(seed)
    plain = TOKENIZER.undefer(tokens)
    TOKENIZER.validate(plain)
    assert TOKENIZER.encode(TOKENIZER.decode(tokens), order="given").tolist() == plain.tolist()


@given(seeds)
@settings(max_examples=60, deadline=None)
def test_annotations_agree_with_the_incremental_twin_at_every_prefix(seed):
    tokens = random_stream(seed, max_length=120)
    state = StreamState(VOCABULARY)
    rows = []
    for n, token in enumerate(tokens.tolist(), start=1):
        rows.append(list(state.push(token)))
        if state.open_segment >= 0:  # the BAR and its controls learn their segment with the first onset
            for row in rows[state.segment_start :]:
                row[6] = state.open_segment
        whole = TOKENIZER.annotate(tokens[:n])
        assert np.array(rows).T.tolist() == [field.tolist() for field in whole]
        segments = find_segments(whole)
        assert len(segments.start) == state.num_segments
        assert (whole.segment[segments.start] == np.arange(len(segments.start))).all()
        assert (whole.segment[segments.end] == np.arange(len(segments.end))).all()


@given(seeds)
@settings(max_examples=100, deadline=None)
def test_closing_length_is_the_shortest_way_out(seed):
    """Walk any prefix to its end by always taking the token that closes soonest: as long as was foretold."""
    tokens = random_stream(seed, max_length=80)
    cut = seed % len(tokens)
    state = StreamState(VOCABULARY)
    for token in tokens[:cut].tolist():
        state.push(token)
    expected = state.closing_length()
    steps = 0
    while not state.is_finished:
        choices = np.flatnonzero(state.allowed())
        for family in (Family.EOS, Family.FILL, Family.TIME, Family.BAR, None):
            of_family = choices if family is None else choices[VOCABULARY.family_of[choices] == family]
            if family == Family.TIME and state.is_between_notes():
                continue
            if len(of_family):
                break
        state.push(int(of_family[0]))
        steps += 1
    assert steps == expected


def test_invalid_streams_are_named_by_their_first_wrong_token():
    v = VOCABULARY
    head = [v.BOS, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.instrument(0), v.BAR]
    note = [v.pitch(60), v.duration(24), v.velocity(90)]
    bad = {
        "T must rise": [*head, v.time(12), *note, v.time(12), *note, v.EOS],
        "P must rise": [*head, v.time(12), *note, *note, v.EOS],
        "T outside the bar": [*head, v.time(96), *note, v.EOS],
        "more bars than the conductor": [*head, v.time(0), *note, v.BAR, v.time(0), *note, v.EOS],
        "a track without a note": [*head, v.EOS],
        "FILL without MASK": [*head, v.time(0), *note, v.FILL, v.EOS],
        "no FILL for a MASK": [*head, v.MASK, v.EOS],
        "the first bar without tempo": [*head[:4], v.instrument(0), v.BAR, v.time(0), *note, v.EOS],
        "a meter restated": [*head[:5], v.BAR, v.meter(4, 4), *head[5:], v.time(0), *note, v.EOS],
        "a control in the wrong place": [v.BOS, v.token(Family.ROLE, 0), *head[1:], v.time(0), *note, v.EOS],
        "unfinished": [*head, v.time(0), *note],
    }
    for reason, tokens in bad.items():
        with pytest.raises(GrammarError, match="token"):
            TOKENIZER.decode(np.array(tokens))
            pytest.fail(reason)
    with pytest.raises(GrammarError, match="token 0 is 5000"):
        TOKENIZER.validate(np.array([5000]))
