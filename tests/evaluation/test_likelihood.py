"""Nats by type, per note and per bar, against sums by hand; evaluate.py from a checkpoint to its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer.command_config import EvaluateConfig
from meloformer.data import Corpus, RowPlan
from meloformer.errors import UserError
from meloformer.evaluation.command import run
from meloformer.evaluation.likelihood import TYPES, evaluate_likelihood, split_batches
from meloformer.hid import Family, Vocabulary
from meloformer.hid.rows import _GIVEN, make_row, stack_rows
from meloformer.model import MeloFormer

VOCABULARY = Vocabulary()


class Uniform(torch.nn.Module):
    """A model that gives every token of the vocabulary the same probability."""

    device = torch.device("cpu")

    def prepare(self, batch):
        return batch

    def training_loss(self, batch):
        family = VOCABULARY.family_of[batch["targets"][batch["targets"] >= 0]]
        count = np.bincount(family, minlength=len(Family))
        nats = count * math.log(VOCABULARY.size)
        return torch.tensor(nats.sum()), count.sum(), {"nats": torch.tensor(nats), "count": torch.tensor(count)}


def test_a_note_costs_its_tokens_and_its_share_of_bar_lines():
    """Two bars, two instruments, three notes: worked out by hand."""
    v = VOCABULARY
    note = [v.time(0), v.pitch(60), v.duration(24), v.velocity(90)]
    piece = [v.BOS, v.PIECE_BEGIN, v.CONDUCTOR, v.BAR, v.meter(4, 4), v.tempo(120), v.BAR]
    piece += [v.instrument(0), v.BAR, *note, v.BAR, *note, v.instrument(33), v.BAR, *note, v.EOS]
    row = make_row([np.array(piece)], v, 40, 8)
    batch = stack_rows([row, make_row([], v, 40, 8)])  # a row of padding adds nothing
    result = evaluate_likelihood(Uniform(), [batch])
    # Targets: all but BOS and PIECE_BEGIN.
    assert (result["tokens"], result["notes"], result["bars"], result["rows"]) == (len(piece) - 2, 3, 2, 1)
    each = math.log(v.size)
    assert result["nats_per_token"] == pytest.approx(each) and result["perplexity"] == pytest.approx(v.size)
    assert result["nats_per_note"] == pytest.approx(each * result["tokens"] / 3)
    assert result["nats_per_bar"] == pytest.approx(each * result["tokens"] / 2)
    counts = {name: entry["tokens"] for name, entry in result["by_type"].items()}
    # structure: CONDUCTOR, five BARs, EOS
    assert counts == {"T": 3, "P": 3, "L": 3, "V": 3, "instrument": 2, "structure": 7, "meter": 1, "tempo": 1}


def test_every_predicted_family_has_a_line_in_the_report():
    reported = [family for families in TYPES.values() for family in families]
    assert len(reported) == len(set(reported))
    assert set(reported) == {family for family in Family if not _GIVEN[family]}


def test_the_split_is_read_once_whatever_the_batch_size(trained):
    corpus = Corpus(trained.data.data_dir)
    plan = RowPlan(corpus, trained.data, split="validation")
    model = MeloFormer.from_pretrained(trained.training.output_dir).train()
    results = [evaluate_likelihood(model, split_batches(plan, size)) for size in (1, 3)]
    assert model.training, "the model is left in the mode it was in"
    assert results[0]["notes"] == int(corpus.index["num_notes"][plan.pieces].sum())
    assert results[0]["bars"] == int(corpus.index["num_bars"][plan.pieces].sum())
    for name in ("rows", "tokens", "notes", "bars"):
        assert results[0][name] == results[1][name]
    assert results[0]["nats"] == pytest.approx(results[1]["nats"], rel=1e-5)


def test_a_bounded_validation_takes_rows_from_all_over_the_plan(trained):
    plan = RowPlan(Corpus(trained.data.data_dir), trained.data, split="train", augment=False)
    assert plan.num_rows >= 6
    taken = [batch["tokens"][0] for batch in split_batches(plan, 1, max_rows=3)]
    places = [i for i in range(plan.num_rows) if any(np.array_equal(plan.row(i)[0]["tokens"], t) for t in taken)]
    assert len(taken) == len(places) == 3
    assert places[0] < plan.num_rows / 3 < places[1] < 2 * plan.num_rows / 3 < places[2]


def test_evaluate_writes_what_training_measured(trained, capsys):
    folder = Path(trained.training.output_dir)
    result = run(EvaluateConfig(checkpoint=str(folder), device="cpu", precision="fp32"))
    assert json.loads((folder / "evaluation.json").read_text()) == result
    logged = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert logged["kind"] == "validation" and result["step"] == logged["step"] == 2
    assert result["nats_per_note"] == pytest.approx(logged["nats_per_note"], rel=1e-5)
    assert set(result["baselines"]) == {"unigram", "bigram", "repeat_bar"}
    for baseline in result["baselines"].values():  # over the very same targets
        assert [baseline[name] for name in ("tokens", "notes", "bars")] == [
            result[name] for name in ("tokens", "notes", "bars")
        ]
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("this model", "repeat bar", "structure", "evaluation.json"))


def test_evaluate_on_other_data_and_split(trained, tmp_path):
    output = tmp_path / "numbers.json"
    checkpoint = str(trained.training.output_dir)
    with pytest.raises(UserError, match="shards: no such folder"):
        run(EvaluateConfig(checkpoint=checkpoint, data_dir=str(tmp_path / "shards"), device="cpu"))
    run(EvaluateConfig(checkpoint=checkpoint, split="train", output=str(output), device="cpu", batch_size=4))
    assert json.loads(output.read_text())["baselines"] == {}
    with pytest.raises(UserError, match="is no folder"):
        run(EvaluateConfig(checkpoint=checkpoint, output=str(tmp_path / "no" / "numbers.json"), device="cpu"))


def test_a_missing_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no model there"):
        run(EvaluateConfig(checkpoint=str(tmp_path)))
