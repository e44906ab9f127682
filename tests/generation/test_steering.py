"""What a musician asks for stands in the stream, in its place, and every sample stays a valid piece."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.errors import UserError
from meloformer.generation import Part, Request, Sampling, Steering, generate
from meloformer.generation.guidance import begin_guided, without_conditions
from meloformer.generation.request import ConstrainedState
from meloformer.generation.steering import parse_parts
from meloformer.hid import Annotations, Family
from meloformer.hid.conditions import parse_chord, parse_key
from meloformer.midi import DRUMS, Score
from tests.generation.likeliest import decided
from tests.generation.steered import TAGS, TOKENIZER, steerable, steerings
from tests.hid.streams import VOCABULARY
from tests.model.music import tiny_model


def expected_chords(steering: Steering, bars: int) -> list[tuple[int, int, int]]:
    """(bar, half, chord) of each change: the slow way, half bar by half bar."""
    each, out, last = round(2 * steering.chord_bars), [], None
    for half in range(2 * bars):
        chord = parse_chord(steering.chords[half // each % len(steering.chords)])
        if chord != last:
            out.append((*divmod(half, 2), chord))
        last = chord
    return out


def check_piece(score: Score, steering: Steering) -> None:
    """The controls of a decoded piece are those that were asked for, no more, no fewer."""
    v, lines = VOCABULARY, score.bar_lines()
    wanted = [v.PIECE_BEGIN] * (steering.begin is not False) + [v.PIECE_END] * (steering.end is True)
    if steering.key is not None:
        wanted.append(v.token(Family.KEY, parse_key(steering.key)))
    if steering.tag is not None:
        wanted.append(v.token(Family.TAG, TAGS.index(steering.tag)))
    if steering.density is not None:
        wanted.append(v.token(Family.DENSITY, steering.density - 1))
    assert sorted(wanted) == [c.token for c in score.controls if c.track < 0 and c.bar < 0]
    densities = [v.value_of[c.token] for c in score.controls if v.family_of[c.token] == Family.BAR_DENSITY]
    given = steering.bar_density or []
    assert densities == [given[bar % len(given)] for bar in range(score.num_bars if given else 0)]
    chords = [c for c in score.controls if v.family_of[c.token] == Family.CHORD]
    wanted = expected_chords(steering, score.num_bars) if steering.chords else []
    halves = [
        (c.bar, c.onset and 2 * c.onset // (lines[c.bar + 1] - lines[c.bar]), v.value_of[c.token]) for c in chords
    ]
    assert halves == wanted
    for c in chords:
        assert c.onset in (0, (lines[c.bar + 1] - lines[c.bar]) / 2)
    described = sorted((part.instrument, sorted(part.tokens(v))) for part in steering.parts if steering.parts)
    tracks = [
        (int(i), sorted(c.token for c in score.controls if c.track == k)) for k, i in enumerate(score.instruments)
    ]
    for part in described:
        tracks.remove(part)
    assert not any(tokens for _, tokens in tracks)


@given(
    steerings,
    st.none() | st.integers(1, 9),
    st.none() | st.sampled_from([(4, 4), (6, 8), (2, 2)]),
    st.none() | st.lists(st.sampled_from([0, 33, 48, DRUMS]), min_size=1, max_size=3),
    st.integers(0, 60),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200, deadline=None)
def test_any_choice_among_the_allowed_tokens_holds_what_was_asked_for(steering, bars, meter, instruments, spare, seed):
    """The worst model there is, with limits down to the shortest piece there can be."""
    controls = steering.controls(VOCABULARY, TAGS)
    if instruments is not None:
        instruments = instruments + [part.instrument for part in steering.parts]
    if bars is not None:
        bars = max(bars, controls.num_bars)
    request = Request(bars, meter, 90, instruments, steering=steering)
    least = bars or max(controls.num_bars, 1)
    shortest = 6 + len(controls.head) + least + controls.tokens_in_bars(0, least)
    shortest += 6 * max(len(request.ordered_instruments() or []), 1) + sum(
        len(p.tokens(VOCABULARY)) for p in steering.parts
    )
    with pytest.raises(UserError, match="need at least"):
        ConstrainedState(VOCABULARY, request, shortest - 1, TAGS)
    state = ConstrainedState(VOCABULARY, request, shortest + spare, TAGS)
    rng = np.random.default_rng(seed)
    while not state.is_finished:
        token = int(rng.choice(np.flatnonzero(state.allowed())))
        state.push(token)
    assert len(state.tokens) <= shortest + spare
    score = TOKENIZER.decode(np.array(state.tokens))
    check_piece(score, steering)
    if bars is not None:
        assert score.num_bars == bars
    if instruments is not None:
        assert sorted(score.instruments.tolist()) == sorted(instruments)


def test_what_is_owed_to_later_parts_is_kept_free():
    """Eighteen tokens of conditions are more than the reserve that would hide their being forgotten."""
    parts = [Part(instrument, "melody", 3, 2) for instrument in range(40, 46)]
    request = Request(1, (4, 4), 90, steering=Steering(parts=parts))
    for seed in range(20):
        rng = np.random.default_rng(seed)
        state = ConstrainedState(VOCABULARY, request, 63 + 8)
        while not state.is_finished:
            state.push(int(rng.choice(np.flatnonzero(state.allowed()))))
        assert len(state.tokens) <= 63 + 8 and len(state.state.instruments) == 6


def test_chords_stand_where_they_change_and_begin_again():
    steering = Steering(chords="Am F | C, C", chord_bars=0.5)
    state = ConstrainedState(VOCABULARY, Request(3, (4, 4), 90, [33], steering=steering), 300)
    text = TOKENIZER.text(np.array(state.forced_prefix()))
    first = "T_0 CHORD_A_min T_48 CHORD_F_maj BAR T_0 CHORD_C_maj BAR T_0 CHORD_A_min T_48 CHORD_F_maj INSTRUMENT_33"
    assert text == f"BOS PIECE_BEGIN CONDUCTOR BAR METER_4/4 TEMPO_90 {first} BAR"
    # without a number of bars there are at least as many as the progression takes
    state = ConstrainedState(VOCABULARY, Request(meter=(4, 4), tempo=90, steering=Steering(chords="Am F C")), 300)
    assert TOKENIZER.text(np.array(state.forced_prefix())).count("BAR") == 3
    # half bars of an odd meter are no place for a chord, so a model that may choose the meter chooses an even one
    state = ConstrainedState(VOCABULARY, Request(4, steering=steering), 300)
    state.forced_prefix()
    assert {VOCABULARY.meters[VOCABULARY.value_of[t]][0] % 2 for t in np.flatnonzero(state.allowed())} == {0}


def test_parts_are_found_by_their_instruments():
    described = parse_parts(["program=violin,density=4", "program=33", "role=bass", "program=violin,polyphony=2"])
    request = Request(1, (4, 4), 90, [40, 33, 40, DRUMS], steering=Steering(parts=described))
    state = ConstrainedState(VOCABULARY, request, 300)
    assert [TOKENIZER.text(np.array([ids.start for ids in part], dtype=int)) for part in state.parts] == [
        *("", "ROLE_bass", "DENSITY_4", "POLYPHONY_2"),
    ]
    alone = Request(1, steering=Steering(parts=described))
    assert alone.ordered_instruments() == [33, 40, 40]


@pytest.mark.parametrize(
    ("steering", "message"),
    [
        ({"key": "H minor"}, "key 'H minor'"),
        ({"chords": "Am Xm"}, "chord 'Xm'"),
        ({"chords": " "}, "chords is empty"),
        ({"chords": "A B C D E"}, "chords has 5, and there are 4 bars"),
        ({"chords": "A B C", "chord_bars": 2}, "chords has 3 of 2 bars each, and there are 4 bars"),
        *(
            ({"chords": "A B", "chord_bars": bars}, rf"chord_bars is {re.escape(str(bars))}, must be a multiple of 0.5")
            for bars in (0.3, 0.0, -1.0, 1e308, float("inf"), float("nan"))  # 1e308 was an OverflowError
        ),
        (
            {"chords": "A B", "chord_bars": 0.5, "meter": (3, 4)},
            "chord_bars is 0.5, which splits bars",
        ),
        ({"bar_density": [1, 2, 3, 4, 5]}, "bar_density has 5 numbers for 4 bars"),
        ({"bar_density": [8]}, "bar_density is 8, must be from 0 to 7"),
        ({"density": 11}, "density is 11, must be from 1 to 10"),
        ({"tag": "polka"}, "tag 'polka': the model knows jazz, rock"),
        ({"parts": [Part(40)]}, "a track of Violin is described"),
        ({"parts": [Part(33), Part(33)]}, "a track of Electric Bass"),
        ({"parts": [Part(33, role="melody")]}, "its role is always 'bass'"),
        ({"parts": [Part(DRUMS, role="bass")]}, "its role is always 'drums'"),
        ({"parts": [Part(0, role="drums")]}, "that of drums alone"),
        ({"parts": [Part(DRUMS, polyphony=2)]}, "asked of pitched tracks alone"),
        ({"parts": [Part(0, density=0)]}, "density is 0, must be from 1 to 10"),
        ({"parts": [Part(0, role="singer")]}, "role 'singer'"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(steering, message):
    steering = dict(steering)
    request = Request(4, steering.pop("meter", None), instruments=[0, 33, DRUMS], steering=Steering(**steering))
    with pytest.raises(UserError, match=message) as caught:
        ConstrainedState(VOCABULARY, request, 500, TAGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("request_", [Request(10**18), Request(steering=Steering(chords="A B", chord_bars=1000))])
def test_more_bars_than_tokens_are_refused_at_once(request_):
    """They were gone through one by one, and a billion of them gave no answer."""
    with pytest.raises(UserError, match=r"max_length is 500, and \d+ bars of 1 instruments need at least \d+ tokens"):
        ConstrainedState(VOCABULARY, request_, 500)


def test_a_model_is_asked_only_for_what_it_was_trained_with():
    model = tiny_model()
    model.conditions, model.tags = ["key"], []
    with pytest.raises(UserError, match="chords: the model was trained without it and knows key"):
        generate(model, Request(2, steering=Steering(key="C", chords="C")), max_length=100)
    model.conditions = []
    with pytest.raises(UserError, match="role: the model was trained without it and knows no condition"):
        generate(model, Request(2, steering=Steering(parts=[Part(0, role="pad")])), max_length=100)
    generate(model, Request(1, instruments=[0], steering=Steering(end=True)), max_length=40)


def test_untrained_models_keep_to_random_conditions():
    rng = np.random.default_rng(0)
    model = steerable()
    for trial in range(6):
        steering = Steering(
            key="D minor" if rng.random() < 0.5 else None,
            chords=["Dm", "Bb", "F", "C"] if rng.random() < 0.5 else None,
            density=int(rng.integers(1, 11)) if rng.random() < 0.5 else None,
            tag="rock" if rng.random() < 0.5 else None,
            parts=[Part(33, "bass", 3)] if rng.random() < 0.5 else [],
            begin=bool(rng.random() < 0.5),
            end=bool(rng.random() < 0.5),
        )
        guidance = 1.0 if not steering.names() else float(rng.choice([1.0, 2.5]))
        request = Request(4, instruments=[33, 0], steering=steering)
        for sample in generate(model, request, 2, seed=trial, max_length=160, batch_size=2, guidance=guidance):
            check_piece(sample.score, steering)
            assert sample.score == TOKENIZER.decode(sample.tokens)


# --- guidance -------------------------------------------------------------------------------------------------------

FULL = Steering(key="A minor", chords="Am F", density=5, bar_density=[3, 4], parts=[Part(33, density=2)], end=True)


def test_guided_logits_are_the_formula_over_two_full_passes():
    """Token by token: conditions that come in the middle of the stream are read by one of its two copies alone."""
    model = steerable()
    (sample,) = generate(
        model, Request(instruments=[33, 0], steering=FULL), max_length=170, sampling=Sampling(top_p=1.0)
    )
    tokens = sample.tokens
    annotations = TOKENIZER.annotate(tokens)
    given, v = model.logits(tokens), VOCABULARY
    plain = without_conditions(tokens, v)
    TOKENIZER.validate(plain)
    assert len(plain) < len(tokens) and TOKENIZER.text(plain).startswith(
        "BOS PIECE_BEGIN PIECE_END CONDUCTOR BAR METER"
    )
    free = model.logits(plain)
    start = 4
    session, logits = begin_guided(model, tokens[:start], 200, 40, guidance=3.0)
    for end in range(start, len(tokens) + 1):
        kept = len(without_conditions(tokens[:end], v))
        expected = free[kept - 1] + 3.0 * (given[end - 1] - free[kept - 1])
        # behind a T of the conductor the copy without conditions waits in front of it
        torch.testing.assert_close(logits[0], expected, atol=5e-4, rtol=0)
        if end < len(tokens):
            logits = session.step(tokens[end : end + 1], Annotations(*(field[end : end + 1] for field in annotations)))


def test_guidance_of_one_is_none_and_of_zero_forgets_the_conditions():
    model = decided(steerable()).double()
    request = Request(2, (4, 4), 90, [33], steering=Steering(key="A minor", chords="Am F"))
    plain = Request(2, (4, 4), 90, [33])

    def greedy(request, **settings):
        (sample,) = generate(model, request, sampling=Sampling(temperature=0), max_length=70, **settings)
        return sample.tokens

    steered, free = greedy(request), greedy(plain)
    prompt = np.array(ConstrainedState(VOCABULARY, request, 70).forced_prefix())
    one = begin_guided(model, prompt, 70, 15, 1.0)[1][0]
    torch.testing.assert_close(one, model.logits(prompt)[-1].float(), atol=1e-5, rtol=0)
    forgotten = greedy(request, guidance=0.0)
    # the same music as without conditions, up to where the limit of length is nearer for the longer stream
    music = without_conditions(forgotten, VOCABULARY)[:40]
    assert music.tolist() == free[:40].tolist() != without_conditions(steered, VOCABULARY)[:40].tolist()
    with pytest.raises(UserError, match="guidance needs a condition"):
        generate(model, plain, guidance=2.0, max_length=70)


def test_guided_samples_do_not_depend_on_their_batch_mates():
    model = steerable().double()
    request = Request(2, instruments=[DRUMS, 33], steering=Steering(key="E minor", chords="Em D", density=7))
    pieces = {
        size: [s.tokens.tolist() for s in generate(model, request, 4, None, 7, size, 75, guidance=2.0)]
        for size in (1, 3, 4)
    }
    assert pieces[1] == pieces[3] == pieces[4]
    assert len({tuple(piece) for piece in pieces[1]}) == 4
    assert pieces[1] != [s.tokens.tolist() for s in generate(model, request, 4, None, 7, 4, 75)]
