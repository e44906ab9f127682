"""Models that can be steered, and random things to ask of them."""

from __future__ import annotations

from hypothesis import strategies as st

from meloformer.generation import Part, Steering
from meloformer.hid import Tokenizer
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import DRUMS
from tests.hid.streams import VOCABULARY
from tests.model.music import tiny_model

TOKENIZER = Tokenizer(VOCABULARY)
TAGS = ["jazz", "rock"]


def steerable(**config):
    model = tiny_model(**config)
    model.conditions, model.tags = list(CONDITIONS), TAGS
    return model


parts = st.lists(
    st.builds(
        Part,
        instrument=st.sampled_from([0, 0, 48]),
        role=st.none() | st.sampled_from(["melody", "chords", "pad"]),
        density=st.none() | st.integers(1, 10),
        polyphony=st.none() | st.integers(1, 6),
    )
    | st.builds(Part, instrument=st.just(DRUMS), role=st.none() | st.just("drums"), density=st.none() | st.just(9)),
    max_size=3,
)
steerings = st.builds(
    Steering,
    key=st.none() | st.sampled_from(["A minor", "Bb", "F# major"]),
    chords=st.none() | st.lists(st.sampled_from(["Am", "F", "C7", "Gsus4", "none"]), min_size=1, max_size=5),
    chord_bars=st.sampled_from([0.5, 1, 1.5, 2]),
    density=st.none() | st.integers(1, 10),
    bar_density=st.none() | st.lists(st.integers(0, 7), min_size=1, max_size=4),
    tag=st.none() | st.sampled_from(TAGS),
    parts=parts,
    begin=st.none() | st.booleans(),
    end=st.none() | st.booleans(),
)
