"""Rolls as pictures: a PNG of one, the picture of a long one as two stacked halves, a GIF of how one came about.

In: (128, T) uint8 rolls, cells 0..127 (meloformer.fractal.roll). Out: `SCALE` x `SCALE` pixels a cell, high pitches
above, time to the right, in viridis: silence is its darkest colour, 127 its lightest.

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

MAX_VELOCITY = 127
FRAME_MILLISECONDS = 200
SCALE = 3


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


def write_png(roll: np.ndarray, path: str | Path, stacked: bool = False) -> None:
    """One roll, whole or absent; UserError without Pillow, or where the folder cannot be written."""
    buffer = io.BytesIO()
    _image(roll, stacked).save(buffer, format="PNG")
    _write(path, buffer)


def write_gif(frames: Sequence[np.ndarray], path: str | Path) -> None:
    """Rolls of one shape, 200 ms each, in an endless loop."""
    if not frames:
        raise ValueError("a GIF needs at least one frame")
    images = [_image(frame, stacked=False) for frame in frames]
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


def _image(roll: np.ndarray, stacked: bool):
    """A palette image: a velocity is one and the same index in every frame."""
    palette = viridis()
    from PIL import Image

    image = Image.fromarray(_enlarged(levels(roll, stacked)))
    image.putpalette(palette.tobytes())
    return image


def _enlarged(shades: np.ndarray) -> np.ndarray:
    return np.repeat(np.repeat(shades, SCALE, axis=0), SCALE, axis=1)


def _write(path: str | Path, buffer: io.BytesIO) -> None:
    try:
        write_atomic(path, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); check the folder") from None
