"""Rolls as pictures: a PNG of one, the picture of a long one as two stacked halves, a GIF of how one came about.

In: (128, T) uint8 rolls, cells 0..127 (meloformer.fractal.roll). Out: `SCALE` x `SCALE` pixels a cell, high pitches
above, time to the right, in viridis: silence is its darkest colour, 127 its lightest. Around a PNG stand bar numbers
(of 4/4), octaves and the scale of velocities, and a frame where something was written into a prompt; GIFs and
TensorBoard's pictures are cells alone.

>>> write_png(roll, "roll.png")                         # doctest: +SKIP
>>> write_gif(frames, "roll.gif")                       # the rolls of a generation in progress   # doctest: +SKIP

Needs matplotlib for the colours and Pillow, which comes with it. The surprise: the documents' "256 x 256" picture is a
roll of 512 columns drawn `stacked`: the first 256 columns above, the last 256 below.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.files import write_atomic
from meloformer.fractal.roll import COLUMNS_PER_BAR, NUM_PITCHES

MAX_VELOCITY = 127
FRAME_MILLISECONDS = 200
SCALE = 3
# Margins in pixels: octaves on the left, bars below, velocities on the right
LEFT, TOP, BOTTOM, RIGHT = 28, 6, 20, 52
PAPER, INK, FRAME = (255, 255, 255), (90, 90, 90), (255, 127, 14)
LABEL = 24  # pixels that a bar's number needs


def can_draw() -> bool:
    """Whether matplotlib and Pillow are here."""
    try:
        import matplotlib  # noqa: F401
        import PIL.Image  # noqa: F401
    except ImportError:
        return False
    return True


def require_pictures() -> None:
    """UserError unless pictures can be drawn; asked before minutes of work, not after."""
    if not can_draw():
        raise UserError("pictures of piano rolls need matplotlib and Pillow; pip install matplotlib pillow")


def levels(roll: np.ndarray, stacked: bool = False) -> np.ndarray:
    """(rows, columns) uint8: index into the colours of every cell, the highest pitch first; 0 -> 0, 127 -> 255."""
    shades = np.rint(roll.astype(np.float64) * 255 / MAX_VELOCITY).astype(np.uint8)[::-1]
    if stacked:
        shades = np.pad(shades, ((0, 0), (0, shades.shape[1] % 2)))
        shades = np.concatenate(np.split(shades, 2, axis=1))
    return np.ascontiguousarray(shades)


def picture(roll: np.ndarray, stacked: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 in colour, SCALE pixels a cell: what TensorBoard is shown."""
    return viridis()[_enlarged(levels(roll, stacked))]


@cache
def viridis() -> np.ndarray:
    """(256, 3) uint8."""
    require_pictures()
    from matplotlib import colormaps

    return (colormaps["viridis"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def write_png(roll: np.ndarray, path: str | Path, stacked: bool = False, written: np.ndarray | None = None) -> None:
    """One roll between its axes, whole or absent; `written`, (T,) bool, are columns to put into a frame. UserError
    without Pillow, or where the folder cannot be written."""
    cells = picture(roll, stacked)
    from PIL import Image, ImageDraw

    strips = np.split(cells, cells.shape[0] // (NUM_PITCHES * SCALE))  # one above the other
    height, width = strips[0].shape[:2]
    image = Image.new("RGB", (LEFT + width + RIGHT, (TOP + height + BOTTOM) * len(strips)), PAPER)
    draw = ImageDraw.Draw(image)
    new = np.zeros(len(strips) * width // SCALE, dtype=bool)
    if written is not None:
        new[: len(written)] = written
    for i, (strip, mine) in enumerate(zip(strips, np.split(new, len(strips)))):
        top = i * (TOP + height + BOTTOM) + TOP
        image.paste(Image.fromarray(strip), (LEFT, top))
        _axes(draw, top, width // SCALE, i * width // SCALE)
        for first, end in _stretches(mine):
            draw.rectangle((LEFT + first * SCALE, top, LEFT + end * SCALE - 1, top + height - 1), outline=FRAME)
    _velocities(image, draw, LEFT + width, height)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    _write(path, buffer)


def _axes(draw, top: int, columns: int, first: int) -> None:
    """Octaves and bars of a strip that begins at column `first` of its roll, as far as there is room for them."""
    bottom = top + NUM_PITCHES * SCALE
    for octave in range(0, 10):
        y = bottom - (12 * (octave + 1)) * SCALE - SCALE / 2  # the middle of its C; C4 is pitch 60
        draw.line((LEFT - 4, y, LEFT - 1, y), fill=INK)
        draw.text((LEFT - 6, y), f"C{octave}", fill=INK, anchor="rm")
    every = 1
    while every * COLUMNS_PER_BAR * SCALE < LABEL:
        every *= 2
    for column in range(-first % COLUMNS_PER_BAR, columns, COLUMNS_PER_BAR):
        bar, x = (first + column) // COLUMNS_PER_BAR, LEFT + column * SCALE
        draw.line((x, bottom, x, bottom + 3), fill=INK)
        if bar % every == 0:
            draw.text((x + 2, bottom + 4), str(bar + 1), fill=INK)


def _velocities(image, draw, left: int, height: int) -> None:
    """The scale of colours, to the right of the first strip."""
    from PIL import Image

    shades = np.rint(np.linspace(255, 0, height)).astype(np.uint8)
    image.paste(Image.fromarray(viridis()[np.repeat(shades[:, None], 10, axis=1)]), (left + 10, TOP))
    for velocity in (0, 32, 64, 96, MAX_VELOCITY):
        y = TOP + (height - 1) * (1 - velocity / MAX_VELOCITY)
        draw.text((left + 24, min(max(y, TOP + 4), TOP + height - 5)), str(velocity), fill=INK, anchor="lm")


def _stretches(mask: np.ndarray) -> list[tuple[int, int]]:
    """(first, behind the last) of every run of True.

    >>> _stretches(np.array([False, True, True]))
    [(1, 3)]
    """
    edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0))
    return [(int(first), int(end)) for first, end in edges.reshape(-1, 2)]


def write_gif(frames: Sequence[np.ndarray], path: str | Path) -> None:
    """Rolls of one shape, 200 ms each, in an endless loop."""
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    images = [_image(frame) for frame in frames]
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format="GIF",
        save_all=True,
        append_images=images[1:],
        duration=FRAME_MILLISECONDS,
        loop=0,
    )
    _write(path, buffer)


def _image(roll: np.ndarray):
    """A palette image: a velocity is one and the same index in every frame."""
    palette = viridis()
    from PIL import Image

    image = Image.fromarray(_enlarged(levels(roll)))
    image.putpalette(palette.tobytes())
    return image


def _enlarged(shades: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(shades, SCALE, axis=0), SCALE, axis=1)


def _write(path: str | Path, buffer: io.BytesIO) -> None:
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the folder") from None
