"""evaluate.py for a FractalMIDI checkpoint: held-out nats per cell beside the unigram entropy of the same rolls.

In: a `FractalEvaluateConfig`. Every column of every held-out piece counts once, in rolls of the run's crop_length. Out:
a line, and evaluation.json in the run's folder (or `output`), whole or absent: what likelihood.py reports, and

    {"checkpoint": "runs/fractal/checkpoints/step_00005000-val_loss_0.0901", "step": 5000, "data": "valid.txt", ..}

>>> run(FractalEvaluateConfig(checkpoint="runs/fractal"))   # doctest: +SKIP

What surprises: a list given as --data is all held out; the run's own training pieces are not taken out of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from meloformer.device import choose_device, choose_precision
from meloformer.errors import UserError
from meloformer.evaluation.command import EVALUATION, run_folder
from meloformer.evaluation.likelihood import split_batches
from meloformer.files import require_file, write_atomic
from meloformer.fractal.config import FractalData, FractalEvaluateConfig
from meloformer.fractal.dataset import RollCorpus, RollPlan
from meloformer.fractal.likelihood import evaluate_likelihood
from meloformer.fractal.model import FractalMIDI
from meloformer.pretrained import find_pretrained
from meloformer.training.checkpoint import read_state
from meloformer.wording import counted


def run(config: FractalEvaluateConfig) -> dict:
    """Evaluate, print a line, write the file; returns what was written."""
    folder = find_pretrained(config.checkpoint)
    model = FractalMIDI.from_pretrained(folder)
    state = read_state(folder)
    output = Path(config.output) if config.output else run_folder(folder) / EVALUATION
    require_file(output)
    data = FractalData.from_dict(state["config"]["data"], f"{folder}: data")
    held_out = config.data or data.val_data
    if held_out is None:
        raise UserError(f"{folder}: was trained with nothing held out; give a list of MIDI files as --data")
    crop_length = config.crop_length or data.crop_length
    data = replace(data, train_data=held_out, val_data=None, crop_length=crop_length)
    device = choose_device(config.device)
    plan = RollPlan(RollCorpus(data), data, split="train", augment=False)
    batches = tqdm(
        split_batches(plan, config.batch_size),
        total=-(-plan.num_rows // config.batch_size),
        unit="batch",
        mininterval=0.5 if sys.stderr.isatty() else 30.0,
    )
    likelihood = evaluate_likelihood(model.to(device), batches, choose_precision(config.precision, device))
    evaluation = {
        **likelihood,
        "checkpoint": str(folder),
        "step": state["progress"]["step"],
        "data": held_out,
        "pieces": plan.corpus.num_pieces,
        "crop_length": crop_length,
    }
    write_atomic(output, json.dumps(evaluation, indent=1).encode())
    print(
        f"{folder}, step {evaluation['step']}: {likelihood['nats_per_cell']:.4f} nats a cell, "
        f"{likelihood['of_unigram']:.3f} of the unigram entropy {likelihood['unigram_nats_per_cell']:.4f}, on "
        f"{counted(evaluation['pieces'], 'piece')} in {counted(likelihood['rolls'], 'roll')} of "
        f"{crop_length} columns\nwritten to {output}"
    )
    return evaluation
