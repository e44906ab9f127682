"""FractalMIDI on the shared training loop: resuming, names of checkpoints, pictures, two stages, evaluation."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from meloformer.config import Config, DataConfig
from meloformer.errors import UserError
from meloformer.fractal import evaluate
from meloformer.fractal.config import FractalConfig, FractalData, FractalEvaluateConfig, FractalModel, FractalTraining
from meloformer.fractal.dataset import RollCorpus, RollPlan
from meloformer.fractal.likelihood import evaluate_likelihood, unigram_entropy
from meloformer.fractal.model import FractalMIDI
from meloformer.fractal.roll import write_roll
from meloformer.training import checkpoint, loop
from meloformer.training.loop import train
from tests.fractal.small import SIZES, as_batch, random_roll, small_model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> dict[str, str]:
    """Six short pieces with a bass that walks, four to train on."""
    folder = tmp_path_factory.mktemp("rolls")
    for piece in range(6):
        rng = np.random.default_rng(piece)
        roll = np.zeros((128, 44), dtype=np.uint8)
        for column in range(0, 44, 4):
            roll[36 + rng.integers(12), column : column + 3] = 80
            roll[60 + rng.integers(12), column : column + 4] = 100
        write_roll(roll, folder / f"{piece}.mid")
    for name, pieces in (("train", range(4)), ("valid", range(4, 6))):
        (folder / f"{name}.txt").write_text("\n".join(f"{piece}.mid" for piece in pieces))
    return {"train_data": str(folder / "train.txt"), "val_data": str(folder / "valid.txt")}


@pytest.fixture
def make_config(lists, tmp_path):
    def make(run: str = "run", model: dict | None = None, data: dict | None = None, **given) -> FractalConfig:
        training = {"device": "cpu", "batch_size": 2, "learning_rate": 3e-3, "warmup_steps": 2, "num_workers": 0}
        training |= {"log_interval": 1, "val_interval": 3, "save_interval": 100, "sample_interval": 0, "max_steps": 6}
        config = FractalConfig(
            model=FractalModel(**{**SIZES, "generator_types": ["mar", "ar", "mar"], "dropout": 0.1, **(model or {})}),
            data=FractalData(**{**lists, "crop_length": 16, **(data or {})}),
            training=FractalTraining(output_dir=str(tmp_path / run), **{**training, **given}),
        )
        config.validate()
        return config

    return make


def records(config, kind="train"):
    lines = (Path(config.training.output_dir) / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == kind]
    return [{name: value for name, value in record.items() if name != "cells_per_second"} for record in found]


def names(config) -> list[str]:
    return sorted(path.name for path in (Path(config.training.output_dir) / "checkpoints").iterdir())


# --- the loop -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_unbroken_one(make_config, monkeypatch):
    """Bit for bit: masks, crops, dropout and silent patches left out come from counters."""
    given = {"model": {"silent_fraction": 0.5}, "gradient_accumulation_steps": 2, "max_steps": 5}
    straight = make_config("straight", **given)
    train(straight)
    broken = make_config("broken", resume="auto", **given)
    real, count = loop.accumulate, [0]

    def stopped(*arguments):
        count[0] += 1
        if count[0] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate", stopped)
        train(broken)
    assert len(records(broken)) == 2 and names(broken)[-1] == "step_00000002"
    train(broken)
    assert records(broken) == records(straight)
    assert records(broken, "validation") == records(straight, "validation")
    ends = [checkpoint.find(config.training.output_dir) for config in (straight, broken)]
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        one, other = (checkpoint.read_tensors(end / file) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoints_have_the_documents_names_and_the_best_are_kept(make_config, monkeypatch):
    """Each is evaluated, whatever --val_check_interval_steps says, and named by it."""
    values = iter([0.5, 0.3, 0.4, 0.2, 0.6, 0.7])
    real = evaluate_likelihood
    monkeypatch.setattr(
        "meloformer.fractal.family.evaluate_likelihood", lambda *a: {**real(*a), "nats_per_cell": next(values)}
    )
    config = make_config(val_interval=100, save_interval=1, save_top_k=2)
    train(config)
    assert names(config) == [
        *("best", "latest", "step_00000002-val_loss_0.3000", "step_00000004-val_loss_0.2000"),
        "step_00000006-val_loss_0.7000",
    ]
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    assert checkpoint.read_pointer(checkpoints, "best").name == "step_00000004-val_loss_0.2000"
    for spelled in ("best", "best.ckpt", "step_00000004-val_loss_0.2000.ckpt"):
        assert checkpoint.find(checkpoints / spelled).name == "step_00000004-val_loss_0.2000"
        assert FractalMIDI.from_pretrained(checkpoints / spelled).crop_length == 16
    assert FractalMIDI.from_pretrained(config.training.output_dir).config == config.model


def test_pictures_and_gifs_while_training(make_config):
    """They change nothing of the run; what TensorBoard is shown has the documents' names."""
    pytest.importorskip("matplotlib")
    boards = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plain = make_config("plain", max_steps=2, val_interval=2)
    train(plain)
    given = {"sample_interval": 2, "num_images_to_log": 2, "preview_num_iter_list": [2, 1, 1], "generation_length": 20}
    config = make_config(max_steps=2, val_interval=2, **given)
    train(config)
    assert records(config) == records(plain)
    run = Path(config.training.output_dir)
    gifs = sorted(path.name for path in (run / "generation_gifs").iterdir())
    assert gifs == ["step_0000002_sample_0.gif", "step_0000002_sample_1.gif"]
    samples = sorted(path.name for path in (run / "samples").iterdir())
    assert samples == [f"step_0000002_sample_{i}.{kind}" for i in range(2) for kind in ("mid", "png")]
    board = boards.EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    tags = board.Tags()
    assert {"val/ground_truth", "val/generated", "val/generation_preview"} <= set(tags["images"])
    assert {"train/loss", "val_loss", "lr", "train/levels/0/masked", "train/levels/2/problems"} <= set(tags["scalars"])


def test_fast_dev_run_does_everything_and_leaves_nothing(make_config, capsys):
    config = make_config(fast_dev_run=True, sample_interval=5000, num_images_to_log=1, preview_num_iter_list=[1, 1, 1])
    train(config)
    said = capsys.readouterr().out
    assert "validation: " in said and "sample: " in said and "finished 3 steps" in said
    assert "generate.py" not in said  # whose --checkpoint was the folder that is gone
    assert not Path(config.training.output_dir).exists()


# --- two stages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["init_from", "resume"])
def test_another_crop_length_takes_the_weights_alone(make_config, how, capsys):
    """The documents' second stage: --resume_from_checkpoint of the first one's latest.ckpt, with a longer crop."""
    first = make_config("first", max_steps=2)
    train(first)
    latest = str(Path(first.training.output_dir) / "checkpoints" / "latest.ckpt")
    second = make_config(
        "second", data={"crop_length": 32}, max_steps=2, learning_rate=1e-9, min_lr=0.0, **{how: latest}
    )
    train(second)
    said = capsys.readouterr().out
    assert ("was trained at crop_length 16, not 32: its weights are taken" in said) == (how == "resume")
    assert [record["step"] for record in records(second)] == [1, 2]
    before, after = (
        checkpoint.read_tensors(checkpoint.find(c.training.output_dir) / "model.safetensors") for c in (first, second)
    )
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6, msg=name)
    assert FractalMIDI.from_pretrained(second.training.output_dir).crop_length == 32


def test_the_same_crop_length_goes_on(make_config, monkeypatch):
    straight = make_config("straight", max_steps=4, save_interval=2)
    train(straight)
    checkpoints = Path(straight.training.output_dir) / "checkpoints"
    before = records(straight)
    earlier = next(checkpoints.glob("step_00000002*"))
    train(make_config("straight", max_steps=4, save_interval=2, resume=str(earlier)))
    assert records(straight) == before
    with pytest.raises(UserError, match="a checkpoint of another run"):
        train(make_config("other", max_steps=4, resume=str(earlier)))


def test_what_does_not_fit_is_one_line(make_config, lists, tmp_path):
    first = make_config("first", max_steps=1, model={"generator_types": ["ar", "ar", "ar"]})
    train(first)
    with pytest.raises(UserError, match=r"generator_types is mar,ar,mar, and .* was trained with ar,ar,ar: ar and mar"):
        train(make_config("second", init_from=first.training.output_dir))
    with pytest.raises(UserError, match=r"model.generator_types is \['mar', 'ar', 'mar'\], and .*first"):
        train(make_config("first", resume="auto", max_steps=1))
    with pytest.raises(UserError, match=r"model.embed_dim_list is \[32, 16, 16, 16\].* leave it out"):
        model = {"generator_types": ["ar"] * 3, "embed_dim_list": [32, 16, 16, 16]}
        train(make_config("second", init_from=first.training.output_dir, model=model))
    streams = Config(data=DataConfig(data_dir="nowhere"))
    streams.training.output_dir, streams.training.resume = first.training.output_dir, "auto"
    with pytest.raises(UserError, match=r"family is 'meloformer', and .* was trained with 'fractal'"):
        train(streams)
    with pytest.raises(UserError, match="nothing is held out; give --val_data"):
        train(make_config("third", patience=2, data={"val_data": None}))
    assert not (tmp_path / "second").exists() and not (tmp_path / "third").exists()


def test_the_fourth_generator_type_is_said_to_choose_nothing(make_config, capsys):
    train(make_config(max_steps=1, model={"generator_types": ["mar", "ar", "mar", "ar"]}))
    assert capsys.readouterr().out.count("the last word (ar) chooses nothing") == 1


def test_four_equal_words_are_what_the_documents_give(make_config, capsys):
    """README's own line was greeted with a complaint."""
    train(make_config(max_steps=1, model={"generator_types": ["mar"] * 4}))
    assert "chooses nothing" not in capsys.readouterr().out


# --- evaluation ---------------------------------------------------------------------------------------------------


def test_the_held_out_figure_counts_every_cell_once(make_config, lists):
    """Against a sum of its own, cell by cell, for a model that is ar throughout: there it is exact."""
    model = small_model("ar", "ar", "ar")
    data = FractalData(**lists, crop_length=16)
    corpus = RollCorpus(data)
    plan = RollPlan(corpus, data, split="validation")
    rows = [plan.row(i)[0] for i in range(plan.num_rows)]
    result = evaluate_likelihood(model, [{name: row[name][None] for name in row} for row in rows])
    nats, counts = 0.0, np.zeros(128, dtype=np.int64)
    for piece in corpus.pieces["validation"].tolist():
        roll = corpus.roll(piece)
        counts += np.bincount(roll.reshape(-1), minlength=128)
        for first in range(0, roll.shape[1], 16):
            nats += model.training_loss(as_batch(roll[None, :, first : first + 16]))[0].item()
    assert result["cells"] == counts.sum()
    assert result["nats_per_cell"] == pytest.approx(nats / counts.sum(), rel=1e-5)
    shares = counts[counts > 0] / counts.sum()
    assert result["unigram_nats_per_cell"] == pytest.approx(-(shares * np.log(shares)).sum())
    assert result["of_unigram"] == pytest.approx(result["nats_per_cell"] / result["unigram_nats_per_cell"])


def test_silent_patches_left_out_in_training_are_not_left_out_here():
    batch = as_batch(random_roll(32, share=0.01))
    plain, sparing = small_model("ar", "ar", "ar"), small_model("ar", "ar", "ar", silent_fraction=0.1)
    a, b = (evaluate_likelihood(model, [batch]) for model in (plain, sparing))
    assert a == b
    sparing.train()
    assert evaluate_likelihood(sparing, [batch]) == a and sparing.training


def test_entropy_of_nothing_is_zero():
    assert unigram_entropy(np.zeros(128, dtype=np.int64)) == 0


def test_evaluate_py_writes_the_numbers_of_the_whole_split(make_config, lists, tmp_path, capsys):
    config = make_config(max_steps=3, model={"generator_types": ["ar", "ar", "ar"]})
    train(config)
    result = evaluate.run(FractalEvaluateConfig(checkpoint=config.training.output_dir, batch_size=3))
    written = json.loads((Path(config.training.output_dir) / "evaluation.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert result["step"] == 3 and result["pieces"] == 2 and result["cells"] == 2 * 44 * 128
    assert result["nats_per_cell"] == pytest.approx(records(config, "validation")[-1]["nats_per_cell"], rel=1e-6)
    assert "of the unigram entropy" in capsys.readouterr().out
    other = FractalEvaluateConfig(
        checkpoint=config.training.output_dir, data=lists["train_data"], crop_length=44, output=str(tmp_path / "a.json")
    )
    assert evaluate.run(other)["rolls"] == 4
    with pytest.raises(UserError, match=r"is no folder; make it first"):
        evaluate.run(
            FractalEvaluateConfig(checkpoint=config.training.output_dir, output=str(tmp_path / "x" / "a.json"))
        )
