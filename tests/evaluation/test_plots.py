"""A piano roll is a picture of the score: its size follows the music, and each note leaves its colour."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.evaluation import plots
from meloformer.evaluation.plots import MAX_BARS, piano_roll
from meloformer.midi import MidiError, Score, Track, note_table, read_score
from tests.midi.real_files import readable_sample

pytest.importorskip("matplotlib", reason="plots need matplotlib")
from matplotlib.colors import to_rgb
from PIL import Image  # comes with matplotlib

BAND = [Track(33), Track(0, is_drum=True), Track(73), Track(33)]


def band(bars: int, velocity: int = 127) -> Score:
    """Bass, drums and flute, a note each a bar."""
    rows = [(t, 96 * bar, 48, 40 + 12 * t, velocity) for t in range(4) for bar in range(bars)]
    return Score(24, BAND, note_table(rows), num_bars=bars, quantized=True)


def pixels(path) -> np.ndarray:
    """(height, width, 3) floats 0..1."""
    return np.asarray(Image.open(path).convert("RGB")) / 255


def share_of(picture: np.ndarray, colour) -> float:
    """Which share of the page has this very colour."""
    return float((np.abs(picture - np.array(to_rgb(colour))).max(axis=2) < 0.02).mean())


def test_every_instrument_has_its_colour_and_drums_their_lane(tmp_path):
    piano_roll(band(8), tmp_path / "roll.png", "a band")
    picture = pixels(tmp_path / "roll.png")
    for colour in (plots.COLOURS[0], plots.COLOURS[1]):
        assert share_of(picture, colour) > 1e-3
    assert share_of(picture, plots.COLOURS[2]) == 0
    score = band(8)
    score.notes = score.notes[score.notes["track"] != 1]
    piano_roll(score, tmp_path / "without.png", "a band")
    without = pixels(tmp_path / "without.png")
    assert without.shape[0] < picture.shape[0]
    for colour in (plots.DRUM_COLOUR, plots.SHADE):  # text and rules come near to both
        assert share_of(picture, colour) > 1.2 * share_of(without, colour)


def test_a_title_is_no_formula(tmp_path):
    """A file of this name ended the run with a traceback of matplotlib's reader of formulas."""
    piano_roll(band(2), tmp_path / "roll.png", "cash_$_and_$_more")
    assert (tmp_path / "roll.png").exists()


def test_a_soft_note_is_paler(tmp_path):
    piano_roll(band(8, velocity=127), tmp_path / "loud.png")
    piano_roll(band(8, velocity=20), tmp_path / "soft.png")
    loud, soft = (share_of(pixels(tmp_path / name), plots.COLOURS[1]) for name in ("loud.png", "soft.png"))
    assert loud > 2 * soft  # what is left is the legend


def test_long_pieces_run_over_several_lines(tmp_path):
    heights = {}
    for bars in (8, 32, 100, MAX_BARS, 300):
        piano_roll(band(bars), tmp_path / "roll.png")
        heights[bars] = pixels(tmp_path / "roll.png").shape[0]
    assert heights[8] == heights[32]
    assert 3 * heights[32] < heights[100] + 3 * 200  # four lines, one head
    assert heights[300] == heights[MAX_BARS]


@pytest.mark.parametrize("bars, lines", [(1, [1]), (32, [32]), (33, [20, 13]), (35, [20, 15]), (100, [28, 28, 28, 16])])
def test_lines_are_about_equally_long(bars, lines):
    step = plots._bars_in_system(bars)
    assert [min(step, bars - start) for start in range(0, bars, step)] == lines


def test_bars_of_a_raw_score_are_cut_short_where_the_meter_changes():
    score = Score(24, [Track(0)], note_table([(0, 0, 400, 60, 64)]), [(0, 4, 4), (120, 3, 4)])
    lines, total = plots._bar_starts(score)
    assert lines.tolist() == [0, 96, 120, 192, 264, 336, 408] and total == 6


def test_a_stray_note_far_away_does_not_make_a_page_of_thousands_of_bars():
    score = Score(24, [Track(0)], note_table([(0, 0, 24, 60, 64), (0, 96 * 27663, 24, 60, 64)]))
    lines, total = plots._bar_starts(score)
    assert len(lines) == MAX_BARS + 1 and total == 27664


def test_scores_without_notes_or_with_drums_alone(tmp_path):
    piano_roll(Score(480), tmp_path / "empty.png")
    piano_roll(Score(24, [Track(0, True)], note_table([(0, 0, 5, 36, 64), (0, 0, 5, 3, 64)])), tmp_path / "drums.png")
    assert share_of(pixels(tmp_path / "drums.png"), plots.SHADE) > 0.01


def test_real_files(real_midi, tmp_path):
    drawn = 0
    for path in readable_sample(real_midi, share=1)[::230]:
        try:
            score = read_score(path)
        except MidiError:
            continue
        piano_roll(score, tmp_path / "roll.png", path.stem)
        drawn += 1
    assert drawn


def test_without_matplotlib_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        piano_roll(band(8), tmp_path / "roll.png")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_a_png(tmp_path):
    piano_roll(band(4), tmp_path / "roll.png")
    assert Image.open(io.BytesIO((tmp_path / "roll.png").read_bytes())).format == "PNG"
