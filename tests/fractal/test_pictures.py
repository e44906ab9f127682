"""What a picture shows: silence dark, 127 bright, high notes above; a GIF's frames and their times."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.fractal import pictures

Image = pytest.importorskip("PIL.Image")


def open_rgb(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def cells_of(seen: np.ndarray, columns: int, strip: int = 0) -> np.ndarray:
    """A PNG's cells, without what stands around them."""
    top = strip * (pictures.TOP + 128 * pictures.SCALE + pictures.BOTTOM) + pictures.TOP
    return seen[top : top + 128 * pictures.SCALE, pictures.LEFT : pictures.LEFT + columns * pictures.SCALE]


def test_silence_is_the_first_colour_and_the_loudest_the_last(tmp_path):
    roll = np.zeros((128, 8), dtype=np.uint8)
    roll[127, 0], roll[0, 7] = 127, 1
    pictures.write_png(roll, tmp_path / "a.png")
    seen = cells_of(open_rgb(tmp_path / "a.png"), 8)
    assert seen.shape == (128 * pictures.SCALE, 8 * pictures.SCALE, 3)
    assert seen[0, 0].tolist() == pictures.viridis()[255].tolist()  # pitch 127 is above, column 0 on the left
    assert seen[0, -1].tolist() == pictures.viridis()[0].tolist()
    assert seen[-1, -1].tolist() == pictures.viridis()[2].tolist()
    assert np.array_equal(pictures.picture(roll), seen)


def test_every_velocity_has_its_own_colour():
    roll = np.arange(128, dtype=np.uint8).reshape(128, 1)
    assert len(np.unique(pictures.levels(roll))) == 128
    assert pictures.levels(roll)[[-1, 0], 0].tolist() == [0, 255]


def test_the_square_picture_of_512_columns_is_two_halves():
    roll = np.zeros((128, 512), dtype=np.uint8)
    roll[60, 10], roll[60, 300] = 127, 64
    square = pictures.levels(roll, stacked=True)
    assert square.shape == (256, 256)
    assert square[127 - 60, 10] == 255 and square[128 + 127 - 60, 300 - 256] == round(64 * 255 / 127)
    assert pictures.levels(roll[:, :511], stacked=True).shape == (256, 256)


def test_bars_and_octaves_are_named_and_what_was_written_is_framed(tmp_path):
    """Nobody could tell which bar a note was in, nor which bars of a prompt were new."""
    scale = pictures.SCALE
    roll = np.random.default_rng(0).integers(0, 128, (128, 64)).astype(np.uint8)
    written = (np.arange(64) >= 16) & (np.arange(64) < 48)
    pictures.write_png(roll, tmp_path / "a.png", written=written)
    pictures.write_png(roll, tmp_path / "plain.png")
    framed, plain = open_rgb(tmp_path / "a.png"), open_rgb(tmp_path / "plain.png")
    assert np.array_equal(cells_of(plain, 64), pictures.picture(roll))
    changed = (framed != plain).any(axis=-1)
    assert (framed[changed] == pictures.FRAME).all()
    across = cells_of(changed, 64)[10].nonzero()[0]
    assert across.tolist() == [16 * scale, 48 * scale - 1] and changed.sum() == 2 * (32 * scale + 128 * scale - 2)
    below = plain[pictures.TOP + 128 * scale + 1, pictures.LEFT :]  # a tick at every bar
    assert (below < 200).all(axis=-1).nonzero()[0].tolist() == [0, 16 * scale, 32 * scale, 48 * scale]
    left = plain[:, pictures.LEFT - 2]
    ticks = (left < 200).all(axis=-1).nonzero()[0]
    assert len(ticks) == 10 and set(np.diff(ticks)) == {12 * scale}

    pictures.write_png(roll, tmp_path / "halves.png", stacked=True, written=written)
    halves = open_rgb(tmp_path / "halves.png")
    across = [(cells_of(halves, 32, i)[10] == pictures.FRAME).all(axis=-1).nonzero()[0].tolist() for i in (0, 1)]
    assert across == [[16 * scale, 32 * scale - 1], [0, 16 * scale - 1]]


def test_a_gif_shows_every_frame_for_200_ms_in_the_same_colours(tmp_path):
    frames = [np.full((128, 16), velocity, dtype=np.uint8) for velocity in (0, 40, 127)]
    pictures.write_gif(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for i, frame in enumerate(frames):
            gif.seek(i)
            assert np.array_equal(np.array(gif.convert("RGB")), pictures.picture(frame))
            assert gif.info["duration"] == 200


def test_without_pillow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    pictures.viridis.cache_clear()
    assert not pictures.can_draw()
    with pytest.raises(UserError, match="pip install matplotlib pillow"):
        pictures.write_png(np.zeros((128, 4), np.uint8), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"a.png: cannot be written \(No such file or directory\); check the folder"):
        pictures.write_png(np.zeros((128, 4), np.uint8), tmp_path / "nowhere" / "a.png")
