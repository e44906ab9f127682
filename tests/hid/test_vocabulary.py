"""The vocabulary is what shards and checkpoints are bound to: it may not change by accident."""

from __future__ import annotations

import json

import numpy as np
import pytest

from meloformer.hid import Family, Vocabulary
from meloformer.hid.vocabulary import VocabularyError

V = Vocabulary()


def test_the_table_is_the_one_that_shards_were_written_with():
    """A new hash means that every shard and model out there is refused: then VERSION goes up, on purpose."""
    assert (V.size, V.hash) == (1206, "ff6a82bd585d56d3")


@pytest.mark.parametrize(
    ("family", "size"),
    [
        (Family.INSTRUMENT, 129),
        (Family.TIME, 192),
        (Family.PITCH, 128),
        (Family.DURATION, 76),
        (Family.VELOCITY, 32),
        (Family.TEMPO, 301),
        (Family.METER, 60),
        (Family.KEY, 24),
        (Family.CHORD, 97),
        (Family.TAG, 64),
        (Family.ROLE, 6),
        (Family.DENSITY, 10),
        (Family.POLYPHONY, 6),
        (Family.BAR_DENSITY, 8),
        (Family.RESERVED, 64),
    ],
)
def test_families_have_their_sizes(family, size):
    assert V.family_size(family) == size


def test_ids_are_ranges_in_the_order_of_the_families_and_the_reserved_ones_come_last():
    assert [V.start(f) for f in Family] == sorted(V.start(f) for f in Family)
    assert V.PAD == 0
    assert V.ids(Family.RESERVED).stop == V.size
    assert len(set(V.names)) == V.size
    for family in Family:
        assert (V.family_of[V.ids(family)] == family).all()


@pytest.mark.parametrize("resolution", [4, 12, 24, 48, 96])
def test_durations_are_exact_up_to_a_half_note_and_within_six_percent_beyond(resolution):
    vocabulary = Vocabulary(resolution)
    values = vocabulary.durations
    assert (np.diff(values) > 0).all() and values[-1] == 32 * resolution
    assert values[: 2 * resolution].tolist() == list(range(1, 2 * resolution + 1))
    assert {3 * resolution, 4 * resolution, 6 * resolution, 8 * resolution} <= set(values.tolist())
    ticks = np.arange(1, values[-1] + 1)
    error = np.abs(values[vocabulary.duration_index(ticks)] - ticks)
    # on a grid coarser than the default, a representable value is itself rounded to a tick
    assert (error <= 0.06 * ticks + (0.5 if resolution < 24 else 0)).all()


def test_saved_and_loaded_it_is_the_same_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "vocabulary.json"
    Vocabulary(12).save(path)
    assert Vocabulary.load(path) == Vocabulary(12) != V
    data = json.loads(path.read_text())
    for change, message in (
        ({"version": 99}, "version 99"),
        ({"hash": "0" * 16}, "preprocess the MIDI files again"),
        ({"resolution": 7}, "multiple of 4"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(VocabularyError, match=message):
            Vocabulary.load(path)
    path.write_text("not json")
    with pytest.raises(VocabularyError, match="not JSON"):
        Vocabulary.load(path)
    with pytest.raises(VocabularyError, match="no such file"):
        Vocabulary.load(tmp_path / "nowhere.json")
