"""A song to go on from; and one thread: on a busy machine two that wait for each other are forty times slower."""

from __future__ import annotations

import pytest

from meloformer.generation.prompt import Prompt
from meloformer.midi import Score, Track, note_table, write_midi
from tests.hid.streams import VOCABULARY
from tests.training.conftest import one_thread  # noqa: F401


@pytest.fixture
def song(tmp_path):
    """Four bars of 3/4, then two of 4/4: a violin that is silent at the end, a bass, drums, another violin."""
    rows = []
    for bar, start in enumerate([0, 288, 576, 864, 1152, 1536]):
        for beat in range(3):
            if bar < 3:
                rows.append((0, start + 96 * beat, 90, 70 + bar, 80))
            rows.append((1, start + 96 * beat, 48, 40 + beat, 90))
            rows.append((2, start + 96 * beat, 6, 36, 100))
        rows.append((3, start, 280, 60, 70))
    score = Score(
        96,
        [Track(40, name="first"), Track(33), Track(0, True), Track(40, name="second")],
        note_table(rows),
        [(0, 3, 4), (1152, 4, 4)],
        [(0, 100.0), (576, 150.0)],
    )
    write_midi(score, tmp_path / "song.mid")
    return tmp_path / "song.mid"


@pytest.fixture
def prompt(song):
    return Prompt(song, VOCABULARY)
