"""Switches that must not change what is learnt, and those that change where a run begins and ends."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from meloformer.command_line import load
from meloformer.config import Config, ModelConfig
from meloformer.errors import UserError
from meloformer.export import export
from meloformer.hid import Vocabulary
from meloformer.midi import read_score
from meloformer.model import MeloFormer
from meloformer.training import checkpoint, loop, preview, run, streams
from meloformer.training.loop import train
from tests.training.processes import records

PRETRAINED = Path(__file__).resolve().parents[2] / "pretrained"
# Losses of 20 steps on a CPU, recorded with torch 2.13. A change that is not meant to change numbers keeps them.
REFERENCE = [
    *(7.096357, 7.078878, 7.015947, 6.963542, 6.914786, 6.858624, 6.815733),
    *(6.786679, 6.770569, 6.691882, 6.689772, 6.667507, 6.623962, 6.592116),
    *(6.569602, 6.567876, 6.529052, 6.526535, 6.543547, 6.497311),
]


def test_twenty_steps_give_the_recorded_losses(make_config):
    given = {"max_steps": 20, "learning_rate": 1e-3, "seed": 3}
    # Recorded before conditions could be given: without them nothing else has changed.
    config = make_config(model={"dropout": 0.0}, data={"validation_fraction": 0.0, "bare_probability": 1.0}, **given)
    train(config)
    losses = [record["loss"] for record in records(config)]
    assert losses == pytest.approx(REFERENCE, abs=1e-5), losses


def weights(config) -> dict[str, torch.Tensor]:
    return checkpoint.read_tensors(checkpoint.find(config.training.output_dir) / checkpoint.MODEL)


# --- where and how fast -----------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_nothing(make_config, monkeypatch):
    """With dropout, whose masks must be the same the second time; and layers do run a second time."""
    plain = make_config("plain", max_steps=4)
    train(plain)
    calls = [0]
    forward = torch.nn.Module.__call__

    def counted(self, *arguments, **options):
        calls[0] += type(self).__name__ == "Layer"
        return forward(self, *arguments, **options)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    train(make_config("counted", max_steps=4))
    without, calls[0] = calls[0], 0
    saved = make_config("saved", max_steps=4, gradient_checkpointing=True)
    train(saved)
    assert calls[0] > without
    assert records(saved) == records(plain)
    assert records(saved, "validation") == records(plain, "validation")


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiling_gives_the_same_losses_and_two_graphs(make_config, monkeypatch, gradient_checkpointing):
    """One graph with gradients and one without, in two epochs and two validations. Inductor itself takes a minute or
    two on a CPU, so this compiles for autograd's own kernels; docs/log.md has a run of inductor."""
    import torch._dynamo.utils

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    given = {"max_steps": 6, "val_interval": 3, "gradient_checkpointing": gradient_checkpointing}
    plain = make_config("plain", model={"dropout": 0.0}, **given)
    compiled = make_config("compiled", model={"dropout": 0.0}, compile=True, **given)
    train(plain)
    assert not torch._dynamo.utils.counters["stats"]
    train(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    for kind, name in (("train", "loss"), ("validation", "nats_per_note")):
        for a, b in zip(records(plain, kind), records(compiled, kind)):
            assert b[name] == pytest.approx(a[name], rel=1e-5)
    assert weights(compiled).keys() == weights(plain).keys()


@pytest.mark.parametrize(("words", "expected"), [([], False), (["--compile"], True), (["--no-compile"], False)])
def test_compile_can_be_turned_on_and_off(words, expected):
    assert load(Config, ["--data_dir", "x", *words]).training.compile is expected


def test_switches_may_change_when_a_run_is_resumed(make_config):
    """More memory, another machine, another ear: none of it makes another run of it."""
    whole = make_config("whole", max_steps=4)
    train(whole)
    first = make_config("first", max_steps=4, save_interval=2, patience=0)
    train(first)
    for name in ("step_00000004", "latest", "best"):
        path = Path(first.training.output_dir) / "checkpoints" / name
        path.rename(path.with_name(f"gone_{name}"))
    checkpoint.write_pointer(Path(first.training.output_dir) / "checkpoints", "latest", 2)
    changed = {"gradient_checkpointing": True, "sample_interval": 4, "patience": 9, "val_max_rows": 300}
    train(make_config("first", max_steps=4, resume="auto", **changed))
    assert records(first) == records(whole)


# --- fine-tuning ------------------------------------------------------------------------------------------------


def test_init_from_takes_weights_and_nothing_else(make_config, capsys):
    """A fresh schedule, step 0, no moments; the shape of the model is the old run's without being said again."""
    old = make_config("old", max_steps=3, learning_rate=1e-2)
    train(old)
    new = make_config("new", max_steps=2, learning_rate=1e-9, init_from=old.training.output_dir, min_lr=0.0)
    new.model = ModelConfig(dropout=0.2)
    train(new)
    before, after = weights(old), weights(new)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7, msg=name)
    assert [record["step"] for record in records(new)] == [1, 2]
    model = MeloFormer.from_pretrained(new.training.output_dir)
    assert (model.config.d_model, model.config.n_layer, model.config.dropout) == (32, 2, 0.2)
    state = checkpoint.read_state(checkpoint.find(new.training.output_dir))
    assert state["progress"]["step"] == 2 and state["config"]["model"]["d_model"] == 32
    assert "2 layers, d_model 32" in capsys.readouterr().out

    again = make_config("new", max_steps=2, learning_rate=1e-9, init_from="gone", min_lr=0.0, resume="auto")
    again.model = ModelConfig(dropout=0.2)
    train(again)
    assert "nothing to resume" in capsys.readouterr().out


def test_init_from_refuses_what_does_not_fit(make_config, tmp_path):
    train(make_config("old", max_steps=1))
    old = make_config("old").training.output_dir
    with pytest.raises(UserError, match=r"model.d_model is 64, and .*old was trained with 32; leave it out"):
        train(make_config("new", max_steps=1, init_from=old, model={"d_model": 64}))
    with pytest.raises(UserError, match="nowhere: no model there"):
        train(make_config("new", max_steps=1, init_from=str(tmp_path / "nowhere")))
    assert not (tmp_path / "new").exists()


def test_a_tag_that_means_another_style_is_named(make_config, tmp_path, capsys):
    """Tags are numbers to the model: fine-tuned on other folders it took `--tag jazz` for the waltzes of its first run,
    and nothing said so."""
    model = MeloFormer(make_config().model, Vocabulary())
    model.tags = ["rock", "waltz"]
    model.save_pretrained(tmp_path / "old")
    for tags, said in ((["rock", "jazz"], "(jazz was waltz)"), (["rock"], None)):
        family = streams.Streams(make_config("new"))
        family.open_data(0)
        family.corpus.meta["input"]["tags"] = tags
        family.open_pretrained(str(tmp_path / "old"))
        out = capsys.readouterr().out
        assert said in out if said else out == ""


def test_rows_follow_the_run_that_is_fine_tuned(make_config, tmp_path, capsys):
    """A model of rows of 2,048 tokens was fine-tuned in rows of 24,576, the default: nine minutes a step."""
    old = make_config("old", max_steps=1, data={"max_seq_len": 352, "max_segments": 40})
    train(old)
    open_rows = {"max_steps": 1, "init_from": old.training.output_dir, "data": {"max_seq_len": None}}
    capsys.readouterr()
    new = make_config("new", **open_rows)
    train(new)
    assert (new.data.max_seq_len, new.data.max_segments) == (352, 40)
    assert f"rows of 352 tokens, as {old.training.output_dir} was trained" in capsys.readouterr().out
    saved = checkpoint.read_state(checkpoint.find(new.training.output_dir))["config"]["data"]
    assert (saved["max_seq_len"], saved["max_segments"]) == (352, 40)
    again = make_config("new", **open_rows, resume="auto")
    train(again)  # refused as another run, were the rows the default's
    assert "nothing to resume" in capsys.readouterr().out

    exported = tmp_path / "exported"
    export(old.training.output_dir, exported, max_seq_len=2048)  # what it may write, not what it was trained on
    of_export = make_config("of_export", **{**open_rows, "init_from": str(exported)})
    train(of_export)
    assert of_export.data.max_seq_len == 352
    (exported / checkpoint.STATE).unlink()
    silent = make_config("silent", **{**open_rows, "init_from": str(exported)}, batch_size=1)
    silent.data.max_segments = 128  # 24,576 tokens are many for a test: the row is what is asked, not the time
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "endless_steps", interrupted)
        train(silent)
    assert f"24,576 tokens, the default: {exported} does not say what it was trained on" in capsys.readouterr().out

    given = make_config("given", max_steps=1, init_from=old.training.output_dir)
    train(given)
    assert given.data.max_seq_len == 384 and "rows of 384 tokens\n" in capsys.readouterr().out


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_the_pretrained_model_says_what_it_was_trained_on():
    config = load(Config, ["--data_dir", "x", "--init_from", str(PRETRAINED)])
    family = streams.Streams(config)
    family.adopt_data(run.saved_config(str(PRETRAINED))["data"], "pretrained")
    assert (config.data.max_seq_len, config.data.max_segments) == (8192, 768)
    told = load(Config, ["--data_dir", "x", "--init_from", str(PRETRAINED), "--max_seq_len", "24576"])
    streams.Streams(told).adopt_data(run.saved_config(str(PRETRAINED))["data"], "pretrained")
    assert told.data.max_seq_len == 24576


@pytest.mark.parametrize(
    ("given", "saved"),
    [
        (ModelConfig(), ModelConfig(size="small")),
        (ModelConfig(n_layer=3), ModelConfig(size="large", n_layer=3)),
        (ModelConfig(), ModelConfig(size="small", summary_ff="shared", visible=None)),
        (ModelConfig(d_ff=100), ModelConfig(size="small", d_ff=100, n_layer=2, pattern="full_causal")),
    ],
)
def test_a_model_follows_what_it_is_not_asked_to_be(given, saved):
    assert streams.adopt(given, saved.to_dict(), "there") == saved
    with pytest.raises(UserError, match=r"model.size is 'small'"):
        streams.adopt(ModelConfig(size="small"), ModelConfig(size="large").to_dict(), "there")


def test_patience_ends_a_run_that_no_longer_gets_better(make_config, monkeypatch, capsys):
    config = make_config(max_steps=50, val_interval=1, patience=2, resume="auto")
    values = iter([5.0, 4.0, 4.5, 4.0])
    real = streams.evaluate_likelihood
    monkeypatch.setattr(
        streams, "evaluate_likelihood", lambda *arguments: {**real(*arguments), "nats_per_note": next(values)}
    )
    train(config)
    assert "finished 4 steps, 2 validations without a better one; best validation 4.000" in capsys.readouterr().out
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    assert checkpoint.read_pointer(checkpoints, "best").name == "step_00000002"
    train(config)
    assert "nothing to resume" in capsys.readouterr().out


def test_patience_on_one_held_out_piece_is_warned_of(make_config, capsys):
    """Of nineteen pieces one was held out, and it decided when the run was over."""
    one = {"val_max_rows": 1, "max_steps": 1, "data": {"validation_fraction": 0.05}}
    train(make_config("patient", patience=2, **one))
    said = capsys.readouterr().out
    assert "held out    1 piece in 2 rows" in said
    assert "warning     1 held-out piece to decide when patience ends the run" in said
    assert "raise --validation_fraction" in said
    train(make_config("impatient", **one))
    train(make_config("many", patience=2, max_steps=1, data={"validation_fraction": 0.5}))
    assert "warning" not in capsys.readouterr().out


def test_patience_needs_something_held_out(make_config):
    with pytest.raises(UserError, match=r"training.patience is 2, and nothing is held out"):
        train(make_config(max_steps=1, patience=2, data={"validation_fraction": 0.0}))


# --- something to listen to -------------------------------------------------------------------------------------


def test_samples_are_pieces_and_leave_the_run_as_it_is(make_config):
    plain, listening = make_config("plain", max_steps=4), make_config("listening", max_steps=4, sample_interval=2)
    train(plain)
    train(listening)
    assert records(listening) == records(plain)
    samples = Path(listening.training.output_dir) / "samples"
    names = sorted(path.name for path in samples.iterdir())
    assert [name for name in names if name.endswith(".mid")] == ["step_00000002.mid", "step_00000004.mid"]
    assert read_score(samples / "step_00000004.mid").num_notes
    assert not (Path(plain.training.output_dir) / "samples").exists()
    boards = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("matplotlib")
    assert "step_00000004.png" in names
    board = boards.EventAccumulator(str(Path(listening.training.output_dir) / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("sample")] == [2, 4]


def test_without_matplotlib_the_piece_itself_is_written(make_config, monkeypatch):
    def absent():
        raise UserError("a piano roll needs matplotlib")

    monkeypatch.setattr(preview, "require_matplotlib", absent)
    config = make_config(max_steps=1, sample_interval=1)
    train(config)
    samples = Path(config.training.output_dir) / "samples"
    assert [path.name for path in samples.iterdir()] == ["step_00000001.mid"]
