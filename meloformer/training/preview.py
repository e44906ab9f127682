"""A piece to listen to while a run is going on: what the model writes now, as MIDI and as a piano roll.

    runs/base/samples/step_00005000.mid, .png (with matplotlib)

>>> write_preview(model, Path("runs/base/samples"), step=5000, seed=0).files   # doctest: +SKIP
[PosixPath('runs/base/samples/step_00005000.mid'), PosixPath('runs/base/samples/step_00005000.png')]

What surprises: every piece of a run is written from the same random numbers, so what differs between two of them
is what was learnt in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from meloformer.errors import UserError
from meloformer.evaluation.plots import piano_roll, require_matplotlib
from meloformer.generation import Request, Sampling, generate
from meloformer.midi import write_midi
from meloformer.model import MeloFormer
from meloformer.training.family import Preview

BARS = 8
MAX_LENGTH = 1024  # tokens: about a minute on a CPU, for a model that has not learnt to end yet


def write_preview(model: MeloFormer, folder: Path, step: int, seed: int) -> Preview:
    """Generate one piece of BARS bars and write it. The model is left in the mode it was in."""
    folder.mkdir(exist_ok=True)
    was_training = model.training
    model.eval()
    try:
        length = min(model.max_seq_len, MAX_LENGTH)
        (sample,) = generate(model, Request(bars=BARS), 1, Sampling(top_p=0.98), seed, max_length=length)
    finally:
        model.train(was_training)
    midi = folder / f"step_{step:08d}.mid"
    write_midi(sample.score, midi)
    try:
        require_matplotlib()
    except UserError:  # the piece itself needs no picture
        return Preview([midi])
    picture = midi.with_suffix(".png")
    piano_roll(sample.score, picture, title=f"step {step}")
    from matplotlib.image import imread

    return Preview([midi, picture], {"sample": np.rint(imread(picture)[..., :3] * 255).astype(np.uint8)})
