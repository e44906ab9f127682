"""A run that learns to write key and chords: its validation says how well, its checkpoint that it does, and it does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer.command_config import EvaluateConfig, GenerateConfig
from meloformer.data import Corpus, RowPlan
from meloformer.errors import UserError
from meloformer.evaluation.command import run as evaluate
from meloformer.evaluation.likelihood import evaluate_likelihood, split_batches
from meloformer.evaluation.predicted import Predicted, only_conditions
from meloformer.generation.command import run as generate
from meloformer.hid import Family
from meloformer.hid.controls import CONDITIONS
from meloformer.midi import read_score
from meloformer.model import MeloFormer
from meloformer.training.loop import train
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="module")
def predicting(tmp_path_factory):
    """The config of a finished run of two steps that predicts key and chords."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("predicting")
    data = {"predict_conditions": ["chords", "key"]}
    config = small_config(write_corpus(folder), folder / "run", data=data, max_steps=2, val_interval=2)
    train(config)
    return config


class Counter:
    """A model to which every target costs as many nats as its family's number."""

    device, training = torch.device("cpu"), False

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def prepare(self, batch):
        return batch

    def eval(self): ...

    def train(self, mode): ...

    def training_loss(self, batch):
        family = self.vocabulary.family_of[batch["targets"][batch["targets"] >= 0]]
        count = np.bincount(family, minlength=len(Family))
        sums = torch.tensor(count * np.arange(len(Family)) * 1.0)
        return sums.sum(), count.sum(), {"nats": sums, "count": torch.tensor(count)}


def test_conditions_are_counted_by_type_and_in_no_sum(predicting):
    corpus = Corpus(predicting.data.data_dir)
    model, predicted = Counter(corpus.vocabulary), Predicted(corpus, predicting.data)
    assert predicted.names == ["key", "chords"]
    found = predicted.evaluate(model, 2)
    plan = predicted.plan
    written = np.concatenate([plan.document(window)[0] for window in range(len(plan.windows))])
    count = np.bincount(corpus.vocabulary.family_of[written], minlength=len(Family))
    assert found["key"] == {"nats_per_token": 16.0, "nats": 16.0 * count[Family.KEY], "tokens": count[Family.KEY]}
    assert found["chords"]["tokens"] == count[Family.CHORD] > 0
    assert found["chords"]["nats_per_token"] == Family.CHORD + Family.TIME
    music = RowPlan(corpus, predicting.data, split="validation")
    result = evaluate_likelihood(model, split_batches(music, 2))
    assert not {*result["by_type"]} & {*CONDITIONS}
    batch = next(split_batches(plan, 2))
    kept = only_conditions(batch)["targets"]
    names = {Family(f).name for f in corpus.vocabulary.family_of[kept[kept >= 0]]}
    assert names == {"KEY", "CHORD", "TIME"}


def test_validation_and_evaluate_show_them(predicting, capsys):
    folder = Path(predicting.training.output_dir)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (validation,) = [record for record in log if record["kind"] == "validation"]
    result = evaluate(EvaluateConfig(checkpoint=str(folder), device="cpu"))
    for by_type in (validation["by_type"], result["by_type"]):
        assert list(by_type)[-2:] == ["key", "chords"]
        # an untrained model draws a key from all tokens, and a chord behind a T from all tokens
        assert 4 < by_type["key"]["nats_per_token"] < 12 < by_type["chords"]["nats_per_token"] < 20
    for record in (validation, result):
        music = [entry for name, entry in record["by_type"].items() if name not in CONDITIONS]
        assert sum(entry["tokens"] for entry in music) == record["tokens"]
        assert np.isclose(sum(entry["nats"] for entry in music), record["nats"])
    shown = capsys.readouterr().out
    assert [line.split()[2] for line in shown.splitlines() if line.startswith(("key ", "chords "))] == ["apart"] * 2


def test_the_checkpoint_says_so_and_the_command_lets_it(predicting, tmp_path, capsys):
    """generate.py forbade every condition that was not asked for, so what the model had learnt was never heard."""
    folder = predicting.training.output_dir
    assert MeloFormer.from_pretrained(folder).predicted == ["chords", "key"]

    def written(name: str, **flags) -> tuple[list[str], str]:
        output = tmp_path / name
        settings = {"num_samples": 2, "bars": 3, "time_signature": "3/4", "max_length": 150, "device": "cpu", **flags}
        generate(GenerateConfig(checkpoint=folder, output=str(output), **settings))
        (report,) = json.loads((output / "generation.json").read_text())["runs"]
        for sample in report["samples"]:
            assert read_score(output / sample["file"]).num_notes == sample["notes"] > 0
        return [sample["chosen"] for sample in report["samples"]], capsys.readouterr().out

    for chosen in (found := written("free"))[0]:
        key, chords = chosen.split(", ")
        assert key.endswith(("major", "minor")) and chords.startswith("chords ")
        assert f"; the model chose {key}, chords {chords.split()[1]}" in found[1]
    chosen, shown = written("key", key="A minor")
    assert all(words.startswith("chords ") for words in chosen) and "minor" not in shown
    assert written("chords", chords="Am F")[0] == ["", ""]
    chosen, shown = written("off", derive=False)
    assert chosen == ["", ""] and "chose" not in shown
    assert all("chords" in words for words in written("guided", guidance=2.0)[0])
    model = MeloFormer.from_pretrained(folder)
    model.predicted = []
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(
        UserError, match="--no-derive needs a MIDI file to go on from, or a model that was trained with"
    ):
        generate(GenerateConfig(checkpoint=str(tmp_path / "plain"), output=str(tmp_path / "none"), derive=False))
    assert not (tmp_path / "none").exists()
