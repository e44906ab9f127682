"""Conditions that a model was trained to write itself: where they stand, that requests win, what is said of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.errors import UserError
from meloformer.generation import Part, Request, Sampling, Steering, generate
from meloformer.generation.chosen import chosen_words
from meloformer.generation.engine import begin
from meloformer.generation.request import ConstrainedState
from meloformer.hid import Family
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import DRUMS
from meloformer.model import MeloFormer
from meloformer.model.decoding_layers import DecodingLayers
from tests.generation.steered import TAGS, TOKENIZER, steerable, steerings
from tests.generation.test_on_device import both_ways
from tests.generation.test_steering import check_piece
from tests.generation.test_tensor_state import follow
from tests.hid.streams import VOCABULARY as V

any_names = st.lists(st.sampled_from(list(CONDITIONS)), unique=True)


def predicting(*names: str, **config):
    model = steerable(**config)
    model.predicted = list(names)
    return model


def shortest_of(request: Request, names) -> int:
    """The least max_length that is not refused."""
    low, high = 1, 4000
    while low < high:
        middle = (low + high) // 2
        try:
            ConstrainedState(V, request, middle, TAGS, names)
            high = middle
        except UserError:
            low = middle + 1
    return low


# --- the grammar ------------------------------------------------------------------------------------------------------


@given(
    any_names,
    steerings,
    st.none() | st.integers(1, 6),
    st.none() | st.sampled_from([(4, 4), (6, 8), (3, 4), (1, 16)]),
    st.none() | st.lists(st.sampled_from([0, 33, 48, DRUMS]), min_size=1, max_size=3),
    st.integers(0, 60),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_any_choice_is_a_stream_as_the_encoder_writes_them(names, steering, bars, meter, instruments, spare, seed):
    """The worst model there is, with limits down to the shortest piece there can be."""
    controls = steering.controls(V, TAGS)
    if controls.splits_bars and meter is not None and meter[0] % 2:
        meter = (4, 4)
    if instruments is not None:
        instruments = instruments + [part.instrument for part in steering.parts]
    if bars is not None:
        bars = max(bars, controls.num_bars)
    request = Request(bars, meter, None, instruments, steering=steering)
    limit = shortest_of(request, names) + spare
    state = ConstrainedState(V, request, limit, TAGS, names)
    rng = np.random.default_rng(seed)
    while not state.is_finished:
        choices = np.flatnonzero(state.allowed())
        families = V.family_of[choices]
        state.push(int(rng.choice(choices[families == rng.choice(np.unique(families))])))
    tokens = np.array(state.tokens)
    assert len(tokens) <= limit
    TOKENIZER.validate(tokens)
    score = TOKENIZER.decode(tokens)
    assert TOKENIZER.encode(score, order="given").tolist() == tokens.tolist()
    mine = tokens[state.chosen_at]
    families = {Family(f) for f in V.family_of[mine].tolist()}
    assert families <= {CONDITIONS[name] for name in names}
    # Without what the model chose the piece holds what was asked for, and nothing else.
    gone = [at - n for at in state.chosen_at for n in range(1 + (V.family_of[tokens[at]] == Family.CHORD))]
    check_piece(TOKENIZER.decode(np.delete(tokens, gone)), steering)
    text = TOKENIZER.text(tokens).split()
    only_drums = set(request.ordered_instruments() or [0]) == {DRUMS}
    assert sum(word.startswith("KEY") for word in text) == (
        steering.key is not None or ("key" in names and steering.chords is None and not only_drums)
    )
    if "bar_density" in names:
        assert sum(word.startswith("BAR_DENSITY") for word in text) == score.num_bars
    if "role" in names:
        assert sum(word.startswith("ROLE") for word in text) == len(score.tracks)
    if "chords" in names and steering.chords is None:
        chords = [(c.bar, c.onset, c.token) for c in TOKENIZER.decode(tokens).controls if c.onset >= 0]
        assert chords[0][:2] == (0, 0)
        assert all(a[2] != b[2] for a, b in pairwise(chords))
        lines = score.bar_lines()
        for bar, onset, _ in chords:
            numerator = score.meters["numerator"][np.searchsorted(score.meters["tick"], lines[bar], "right") - 1]
            half = (lines[bar + 1] - lines[bar]) // 2
            assert onset == 0 or (onset == half and numerator % 2 == 0)


@given(
    any_names,
    st.none() | st.integers(1, 5),
    st.none() | st.sampled_from([(4, 4), (3, 4), (1, 16), (6, 8)]),
    st.none() | st.lists(st.sampled_from([0, 0, 33, 128]), min_size=1, max_size=3),
    st.integers(0, 2**32 - 1),
    st.integers(0, 100),
)
@settings(max_examples=20, deadline=None)
def test_the_device_allows_what_the_host_allows(names, bars, meter, instruments, seed, spare):
    request = Request(bars, meter, None, instruments)
    start = ConstrainedState(V, request, shortest_of(request, names) + spare, TAGS, names)
    start.forced_prefix()
    follow(start, seed)


@given(any_names, st.lists(st.sampled_from([0, 33, 128]), min_size=1, max_size=3), st.integers(0, 2**32 - 1))
@settings(max_examples=12, deadline=None)
def test_new_parts_behind_a_prompt_get_conditions_on_both(names, instruments, seed):
    head = [V.BOS, V.PIECE_BEGIN, V.CONDUCTOR, V.BAR, V.meter(4, 4), V.tempo(90), V.BAR, V.instrument(0), V.BAR]
    head += [V.time(0), V.pitch(60), V.duration(24), V.velocity(90)]
    start = ConstrainedState(V, Request(instruments=instruments, given=np.array(head)), 120, TAGS, names)
    start.forced_prefix()
    follow(start, seed)
    state, rng = start.branch(), np.random.default_rng(seed)
    while not state.is_finished:
        state.push(int(rng.choice(np.flatnonzero(state.allowed()))))
    families = set(V.family_of[np.array(state.tokens)[len(head) :]].tolist())
    of_parts = {CONDITIONS[name] for name in names} & {Family.ROLE, Family.DENSITY, Family.POLYPHONY}
    if set(instruments) == {128}:
        of_parts.discard(Family.POLYPHONY)
    assert families & {*range(Family.KEY, len(Family))} == of_parts


def text_of(state: ConstrainedState) -> str:
    return TOKENIZER.text(np.array(state.forced_prefix()))


def test_what_comes_before_what_was_asked_for_is_not_chosen_blind():
    """A key stands in front of the chords: a model asked for Am F would have chosen its key without knowing them."""
    names = ["key", "chords", "density", "role"]

    def begun(request: Request) -> str:
        return text_of(ConstrainedState(V, request, 300, TAGS, names))

    assert begun(Request(2)) == "BOS PIECE_BEGIN"  # and a key is chosen
    assert begun(Request(2, (4, 4), 90, steering=Steering(chords="Am F", density=4))).endswith("CHORD_F_maj")
    assert begun(Request(2, (4, 4), 90, steering=Steering(key="C", bar_density=[3]))).endswith("TEMPO_90 T_0")
    assert begun(Request(2, (4, 4), 90, [DRUMS], steering=Steering(chords="N", density=4))).endswith(
        "INSTRUMENT_DRUMS ROLE_drums"
    )
    assert "KEY" not in begun(Request(2, (4, 4), 90, [DRUMS], steering=Steering(chords="N", parts=[Part(DRUMS)])))
    assert begun(Request(2, (4, 4), 90, chooses=False)).endswith("TEMPO_90 BAR")


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def inclined(monkeypatch):
    """`inclined(*tokens)`: models prefer these tokens wherever they may stand, the earlier ones more."""

    def incline(*tokens: int) -> None:
        bonus = torch.zeros(V.size)
        bonus[list(tokens)] = 1000.0 * torch.arange(len(tokens), 0, -1)
        for owner in (MeloFormer, DecodingLayers):
            plain = owner.head
            monkeypatch.setattr(owner, "head", lambda self, hidden, plain=plain: plain(self, hidden) + bonus)

    return incline


def chord(name: int) -> int:
    return V.token(Family.CHORD, name)


def test_the_model_chooses_and_a_request_wins(inclined):
    inclined(V.token(Family.KEY, 21), chord(40), chord(73), V.time(0))
    model = predicting("key", "chords")
    request = Request(3, (3, 4), 90, [33])
    sampling = Sampling(temperature=0)
    (sample,) = generate(model, request, sampling=sampling, max_length=100)
    text = TOKENIZER.text(sample.tokens)
    assert text.startswith("BOS PIECE_BEGIN KEY_A_minor CONDUCTOR BAR METER_3/4 TEMPO_90 T_0 CHORD_")
    words = chosen_words(sample.chosen, V, TAGS)
    assert words == "A minor, chords F Am F" and sample.score == TOKENIZER.decode(sample.tokens)
    assert chosen_words(sample.chosen, V, TAGS, most=2) == "A minor, chords F Am ..."
    (sample,) = generate(model, Request(3, (3, 4), 90, [33], steering=Steering(key="C")), 1, sampling, max_length=100)
    assert "KEY_C_major" in TOKENIZER.text(sample.tokens) and chosen_words(sample.chosen, V) == "chords F Am F"
    steering = Steering(key="C", chords="C G")
    (sample,) = generate(model, Request(3, (3, 4), 90, [33], steering=steering), 1, sampling, max_length=100)
    assert "T_0 CHORD_C_maj BAR T_0 CHORD_G_maj BAR T_0 CHORD_C_maj INSTR" in TOKENIZER.text(sample.tokens)
    assert not len(sample.chosen)
    (sample,) = generate(model, Request(3, (3, 4), 90, [33], chooses=False), 1, sampling, max_length=100)
    assert "KEY" not in TOKENIZER.text(sample.tokens) and "CHORD" not in TOKENIZER.text(sample.tokens)


def test_the_same_pieces_on_the_device(monkeypatch):
    model = predicting("key", "chords", "tag", "density", "role", "bar_density", "polyphony").double()
    plain, tensors = both_ways(monkeypatch, model, Request(2), num_samples=3, seed=2, max_length=120)
    assert plain == tensors
    assert all("CHORD" in TOKENIZER.text(np.array(tokens)) for tokens, _ in plain)


def test_guidance_waits_while_the_model_chooses_and_weighs_what_it_chose():
    """The copy without conditions reads no T of the conductor, so its old logits would have a say in which chord."""
    model = predicting("key", "chords").double()
    request, sampling = Request(2, (4, 4), 90, [33]), Sampling(temperature=0)

    def greedy(**settings):
        return generate(model, request, sampling=sampling, max_length=70, **settings)[0].tokens.tolist()

    plain, guided = greedy(), greedy(guidance=4.0)
    end = plain.index(V.instrument(33))
    assert guided[: end + 1] == plain[: end + 1]
    assert guided != plain
    same = generate(model, request, 3, None, 5, 1, 70, guidance=2.0)
    assert [s.tokens.tolist() for s in same] == [
        s.tokens.tolist() for s in generate(model, request, 3, None, 5, 3, 70, guidance=2.0)
    ]


def test_a_model_without_tags_writes_none():
    model = predicting("tag")
    model.tags = []
    assert begin(model, Request(1), 60).forced_prefix()[:3] == [V.BOS, V.PIECE_BEGIN, V.CONDUCTOR]
