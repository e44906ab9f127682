"""What conditions are worth is measured on the same notes, and a model that reads them shows it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer.command_config import EvaluateConfig
from meloformer.data import Corpus
from meloformer.errors import UserError
from meloformer.evaluation.command import run
from meloformer.evaluation.conditions import report, subsets, worth_of
from meloformer.hid import Family
from meloformer.hid.controls import CONDITIONS
from meloformer.model import MeloFormer


class Listener(torch.nn.Module):
    """A nat for each target, and half a nat where the piece's key is given."""

    device = torch.device("cpu")

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def prepare(self, batch):
        return batch

    def training_loss(self, batch):
        targets = batch["targets"]
        given = np.zeros(targets.shape, dtype=bool)
        for row, document in zip(*np.where(batch["type"] == Family.KEY)):
            given[row] |= batch["document"][row] == batch["document"][row, document]
        nats = np.where(given, 0.5, 1.0)[targets >= 0]
        family = self.vocabulary.family_of[targets[targets >= 0]]
        sums, count = np.bincount(family, nats, len(Family)), np.bincount(family, minlength=len(Family))
        return torch.tensor(sums.sum()), count.sum(), {"nats": torch.tensor(sums), "count": torch.tensor(count)}


def test_every_subset_is_measured_on_the_same_targets(trained):
    corpus = Corpus(trained.data.data_dir)
    found = worth_of(Listener(corpus.vocabulary), corpus, trained.data, "validation", subsets(["each"]), 2)
    assert list(found) == ["none", *CONDITIONS, "all"]
    for result in found.values():
        for name in ("notes", "bars", "tokens"):
            assert result[name] == found["none"][name]
    for name, result in found.items():
        expected = 0.5 if name in ("key", "all") else 1.0
        assert math.isclose(result["nats_per_token"], expected), name
    assert [line.split()[0] for line in report(found).splitlines()[1:]] == list(found)


def test_evaluate_shows_and_writes_it(trained, capsys):
    result = run(EvaluateConfig(checkpoint=trained.training.output_dir, device="cpu", conditions=["key", "chords"]))
    assert list(result["conditions"]) == ["none", "key+chords"]
    assert result["conditions"]["none"]["notes"] == result["notes"]
    shown = capsys.readouterr().out
    assert "key+chords" in shown and "gain" in shown
    written = json.loads((Path(trained.training.output_dir) / "evaluation.json").read_text())
    assert written["conditions"] == result["conditions"]


def test_the_checkpoint_knows_what_its_model_was_told(trained):
    model = MeloFormer.from_pretrained(trained.training.output_dir)
    assert model.conditions == list(CONDITIONS) and model.tags == []


def test_an_unknown_condition_is_one_line(trained):
    with pytest.raises(UserError, match="conditions is 'tempo', must be of key, chords"):
        run(EvaluateConfig(checkpoint=trained.training.output_dir, conditions=["tempo"]))
