"""The training loop on a corpus of a dozen pieces: what it learns, what it saves, what it refuses."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from meloformer.data import Corpus, RowPlan, Step, batches, num_targets, steps_in
from meloformer.errors import UserError
from meloformer.hid.rows import stack_rows
from meloformer.model import MeloFormer
from meloformer.training import checkpoint, loop, streams
from meloformer.training.loop import TrainingError, accumulate, train
from meloformer.training.optimizer import build_optimizers
from meloformer.training.run import LOCK


def records(config, kind="train"):
    lines = (Path(config.training.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def losses(config):
    return [(record["step"], record["epoch"], record["loss"], record["grad_norm"]) for record in records(config)]


def stop_after(monkeypatch, step, error=None, number=signal.SIGTERM):
    """Make the run get a signal, or die, while it works on update number `step`."""
    real, count = loop.accumulate, [0]

    def stopped(*arguments):
        count[0] += 1
        if count[0] == step:
            if error is not None:
                raise error
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(loop, "accumulate", stopped)


# --- the step ---------------------------------------------------------------------------------------------------


def first_step(config, rows):
    corpus = Corpus(config.data.data_dir)
    plan = RowPlan(corpus, config.data, 0, 0, "train")
    return corpus, next(batches(plan, 0, rows, micro_batch=rows))


def test_the_accumulated_step_equals_one_big_batch(make_config):
    """Micro-batches have different numbers of targets: dividing each by its own would weigh their tokens unequally."""
    config = make_config(model={"dropout": 0.0})
    corpus, big = first_step(config, 4)
    rows = [{name: values[i] for name, values in big.micro_batches[0].items()} for i in range(4)]
    rows[3]["targets"] = np.where(np.arange(384) < 100, rows[3]["targets"], -1)  # far fewer than the others
    gradients, values = [], []
    for size in (4, 1):
        micro_batches = [stack_rows(rows[i : i + size]) for i in range(0, 4, size)]
        step = Step(0, micro_batches, [], [num_targets(batch) for batch in micro_batches])
        torch.manual_seed(0)
        model = MeloFormer(config.model, corpus.vocabulary)
        values.append(accumulate(model, step, torch.float32, step.num_targets).item())
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_is_learnt_by_heart(make_config, optimizer):
    config = make_config(model={"d_model": 64, "d_ff": 128, "dropout": 0.0}, data={"max_seq_len": 256})
    corpus, step = first_step(config, 1)
    torch.manual_seed(0)
    model = MeloFormer(config.model, corpus.vocabulary)
    optimizers = build_optimizers(model, optimizer, 1e-2, 0.0, (0.9, 0.95))
    for _ in range(120):
        loss = accumulate(model, step, torch.float32, step.num_targets).item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers:
            each.step()
            each.zero_grad()
    assert loss < 0.1


def test_every_target_of_an_epoch_counts_once(make_config, monkeypatch):
    """Also in the last step, with a micro-batch that is partly padding and two that are nothing else."""
    config = make_config(model={"dropout": 0.0}, batch_size=3, gradient_accumulation_steps=4)
    corpus = Corpus(config.data.data_dir)
    plan = RowPlan(corpus, config.data, 0, 0, "train")
    config.training.max_steps = steps_in(plan, 12)
    rows = [plan.row(i)[0] for i in range(plan.num_rows)]
    of_last_step = rows[(config.training.max_steps - 1) * 12 :]
    assert len(of_last_step) % 3 and len(of_last_step) < 6, "the corpus should leave the last step uneven"

    seen, real = [], loop.accumulate

    def watched(model, step, *arguments):
        loss = real(model, step, *arguments)
        seen.append((step.num_targets, loss.item()))
        if len(seen) == config.training.max_steps:
            with torch.no_grad():
                nats, count, _ = model.training_loss(stack_rows(of_last_step))
            assert loss.item() == pytest.approx(nats.item() / count, rel=1e-5)
        return loss

    monkeypatch.setattr(loop, "accumulate", watched)
    train(config)
    assert sum(count for count, _ in seen) == sum(int((row["targets"] >= 0).sum()) for row in rows)
    progress = checkpoint.read_state(checkpoint.find(config.training.output_dir))["progress"]
    assert (progress["epoch"], progress["step_in_epoch"]) == (1, 0)


# --- resuming ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "precision"), [("adamw", "fp32"), ("muon", "bf16")])
def test_a_resumed_run_has_the_losses_of_an_unbroken_one(make_config, monkeypatch, optimizer, precision):
    """Bit for bit, with dropout, past the end of an epoch, whether it was asked to stop or died between checkpoints."""
    given = {"optimizer": optimizer, "precision": precision, "max_steps": 12}
    straight = make_config("straight", **given)
    train(straight)
    assert len({epoch for _, epoch, *_ in losses(straight)}) >= 2

    broken = make_config("broken", resume="auto", save_interval=3, **given)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(broken)  # SIGTERM during update 2: saved there
    assert [step for step, *_ in losses(broken)] == [1, 2]
    with monkeypatch.context() as patch:
        stop_after(patch, 6, error=RuntimeError("killed"))
        with pytest.raises(RuntimeError):
            train(broken)  # dies in update 8: goes on from 6, and the log is cut back to it
    assert [step for step, *_ in losses(broken)] == [1, 2, 3, 4, 5, 6, 7]
    train(broken)
    assert losses(broken) == losses(straight)
    drop = ("tokens_per_second",)
    for one, other in zip(records(broken, "validation"), records(straight, "validation")):
        assert {k: v for k, v in one.items() if k not in drop} == {k: v for k, v in other.items() if k not in drop}
    ends = [checkpoint.find(config.training.output_dir) for config in (straight, broken)]
    for file in (checkpoint.MODEL, checkpoint.OPTIMIZER):
        one, other = (checkpoint.read_tensors(end / file) for end in ends)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stopped", [4, 6])
def test_a_validation_that_a_stop_forestalled_is_made_up_for(make_config, monkeypatch, capsys, stopped, killed):
    """SIGTERM in the very step: the checkpoint was saved, the validation was never done, at the last step neither.
    `killed`: once more, between the line of that validation and its checkpoint; then it stood in the log twice."""

    def interrupt(*_):
        raise KeyboardInterrupt

    given = {"max_steps": 6, "val_interval": 2, "save_interval": 100}
    straight, broken = make_config("straight", **given), make_config("broken", resume="auto", **given)
    assert train(straight) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stopped)
        assert train(broken) == signal.SIGTERM
    assert "SIGTERM: saved at step" in capsys.readouterr().out
    assert [record["step"] for record in records(broken, "validation")] == list(range(2, stopped, 2))
    if killed:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", interrupt)
            train(broken)
        assert records(broken, "validation")[-1]["step"] == stopped
    assert train(broken) == 0
    one, other = ([(r["step"], r["nats_per_note"]) for r in records(c, "validation")] for c in (straight, broken))
    assert one == other and [step for step, _ in one] == [2, 4, 6]
    for name in ("best", "latest"):
        pointers = [(Path(c.training.output_dir) / "checkpoints" / name).read_text() for c in (straight, broken)]
        assert pointers[0] == pointers[1]


def test_what_stays_is_on_stdout_and_the_bar_on_stderr(make_config, capfd):
    """A log of stdout was full of carriage returns, and the bar stood at 100 % through a long validation."""
    train(make_config(max_steps=2, val_interval=2))
    out, error = capfd.readouterr()
    assert "validation: " in out and "finished 2 steps" in out and "\r" not in out and "validating" not in out
    assert "validating: 100%" in error and "\n" not in error.strip()
    assert all(f"{word} " in out for word in ("onset", "pitch", "duration", "velocity"))


def test_the_mean_loss_of_a_log_interval_survives_a_stop_in_its_middle(make_config, monkeypatch):
    straight = make_config("straight", max_steps=8, log_interval=4)
    train(straight)
    broken = make_config("broken", max_steps=8, log_interval=4, resume="auto")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train(broken)
    train(broken)
    assert losses(broken) == losses(straight) and len(losses(broken)) == 2


def test_the_same_rows_in_other_micro_batches_continue_the_run(make_config, monkeypatch):
    config = make_config(max_steps=4, resume="auto")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        train(config)
    other = make_config(max_steps=4, resume="auto", batch_size=1, gradient_accumulation_steps=4)
    train(other)
    assert [step for step, *_ in losses(other)] == [1, 2, 3, 4]


def test_going_back_to_an_earlier_checkpoint_leaves_the_later_ones(make_config, capsys):
    config = make_config(max_steps=6, save_interval=2, keep_last=5)
    train(config)
    before = losses(config)
    checkpoints = Path(config.training.output_dir) / "checkpoints"
    again = make_config(max_steps=6, save_interval=2, keep_last=5, resume=str(checkpoints / "step_00000002"))
    train(again)
    assert "left behind" in capsys.readouterr().out
    assert losses(again) == before
    assert checkpoint.all_steps(checkpoints) == [2, 4, 6]


def test_auto_starts_fresh_where_there_is_nothing_and_says_when_all_is_done(make_config, capsys):
    config = make_config(max_steps=2, resume="auto")
    train(config)
    assert losses(config)[-1][0] == 2

    def written():
        files = Path(config.training.output_dir).rglob("*")
        return sorted(path.stat().st_mtime_ns for path in files if path.name != LOCK)

    before = written()
    capsys.readouterr()
    train(config)
    assert "finished, at step 2 of 2" in capsys.readouterr().out
    assert written() == before


def test_auto_passes_over_a_damaged_checkpoint(make_config, capsys):
    config = make_config(max_steps=4, save_interval=2, resume="auto")
    train(config)
    before = losses(config)
    damaged = Path(config.training.output_dir) / "checkpoints" / "step_00000004" / checkpoint.OPTIMIZER
    damaged.write_bytes(damaged.read_bytes()[:-10])
    train(config)
    assert f"passed over: {damaged}" in capsys.readouterr().out
    assert losses(config) == before


def test_the_checkpoint_opens_as_a_model_and_holds_no_pickle(make_config):
    config = make_config(max_steps=2)
    train(config)
    run = Path(config.training.output_dir)
    model = MeloFormer.from_pretrained(run)
    weights = checkpoint.read_tensors(checkpoint.find(run) / checkpoint.MODEL)
    assert torch.equal(model.state_dict()["token.weight"], weights["token.weight"])
    kinds = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ""}  # the last: the pointers latest and best
    assert yaml.safe_load((run / "config.yaml").read_text()) == config.to_dict()


# --- refusals ---------------------------------------------------------------------------------------------------


def test_a_folder_with_a_run_in_it_is_refused_without_resume(make_config):
    config = make_config(max_steps=1)
    train(config)
    with pytest.raises(UserError, match=r"holds a run; go on with --resume auto"):
        train(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 1e-3}, "training.learning_rate is 0.001, and .* was trained with 0.003"),
        ({"max_steps": 9}, "training.max_steps is 9, .* start a new run in another --output_dir, with --init_from"),
        ({"seed": 1}, "training.seed is 1"),
        ({"precision": "bf16"}, "training.precision is 'bf16'"),
        ({"batch_size": 4}, "8 rows a step, and .* was trained with 4"),
        ({"data": {"max_seq_len": 512, "max_segments": 128}}, "data.max_seq_len is 512"),
        ({"model": {"d_ff": 64}}, "model.d_ff is 64"),
        ({"resume": "runs/none"}, "runs/none: no checkpoint there"),
    ],
)
def test_resuming_with_other_settings_is_refused(make_config, change, said):
    train(make_config(max_steps=1))
    with pytest.raises(UserError, match=said):
        train(make_config(**{"max_steps": 1, "resume": "auto", **change}))


def test_a_checkpoint_of_another_run_is_refused(make_config):
    train(make_config("one", max_steps=1))
    other = make_config("other", max_steps=1)
    other.training.resume = make_config("one").training.output_dir
    with pytest.raises(UserError, match="a checkpoint of another run"):
        train(other)
    assert not Path(other.training.output_dir).exists()


def test_other_data_is_refused(make_config, monkeypatch):
    config = make_config(max_steps=2, resume="auto")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(config)
    real = streams.Corpus

    def changed(data_dir):
        corpus = real(data_dir)
        corpus.hash = "another"
        return corpus

    monkeypatch.setattr(streams, "Corpus", changed)
    with pytest.raises(UserError, match="its data hash is another"):
        train(config)


def test_pieces_that_are_all_skipped_name_the_setting_that_skips_them(make_config):
    with pytest.raises(UserError, match=r"no music is left to train on: \d+ bars that alone exceed max_seq_len are"):
        train(make_config(max_steps=1, data={"max_seq_len": 16, "max_segments": 128}))


def test_conditions_that_the_data_does_not_have_cannot_be_predicted(make_config, monkeypatch):
    """The run went to its end, and the model had learnt none."""
    monkeypatch.setattr(Corpus, "has_conditions", False)
    with pytest.raises(UserError, match=r"predict_conditions is key,chords, and .*shards was preprocessed with --no-c"):
        train(make_config(max_steps=1, data={"predict_conditions": ["key", "chords"]}))


def test_missing_data_leaves_nothing_behind(make_config, tmp_path):
    config = make_config(max_steps=1)
    config.data.data_dir = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        train(config)
    assert not Path(config.training.output_dir).exists()


# --- what goes wrong on the way ---------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_skips_the_update_and_stops_the_run_in_the_end(make_config, monkeypatch, capsys):
    config = make_config(max_steps=10, max_nonfinite_steps=3)
    real, count = loop.accumulate, [0]

    def spoilt(*arguments):
        loss = real(*arguments)
        count[0] += 1
        return loss * math.nan if count[0] in (2, 5, 6, 7) else loss

    monkeypatch.setattr(loop, "accumulate", spoilt)
    with pytest.raises(TrainingError, match=r"step 7, epoch \d: 3 updates in a row .*\.mid bars \d+-\d+"):
        train(config)
    shown = {record["step"]: record for record in records(config)}
    assert shown[2]["loss"] is None and shown[2]["skipped"] == 1
    assert shown[4]["loss"] is not None and shown[6]["skipped"] == 3
    assert "step 2: loss nan" in capsys.readouterr().out


def test_a_validation_that_is_not_finite_can_be_beaten(make_config, monkeypatch):
    """Nothing is less than nan: a first validation that overflowed stayed the best one, and patience ended the run."""
    config = make_config(max_steps=6, val_interval=2, patience=2)
    real, count = streams.Streams.score, [0]

    def spoilt(self, result):
        count[0] += 1
        return math.nan if count[0] == 1 else real(self, result)

    monkeypatch.setattr(streams.Streams, "score", spoilt)
    train(config)
    state = checkpoint.read_state(checkpoint.find(Path(config.training.output_dir) / "checkpoints/best"))
    assert count[0] == 3 and state["progress"]["step"] in (4, 6)


def test_a_skipped_update_changes_no_weight(make_config, monkeypatch):
    config = make_config(max_steps=1)
    monkeypatch.setattr(loop, "accumulate", lambda *arguments: torch.tensor(math.inf))
    train(config)
    saved = checkpoint.read_tensors(checkpoint.find(config.training.output_dir) / checkpoint.MODEL)
    torch.manual_seed(0)
    fresh = MeloFormer(config.model, Corpus(config.data.data_dir).vocabulary).state_dict()
    assert all(torch.equal(saved[name], fresh[name]) for name in saved)


def test_a_second_interrupt_has_the_default_effect(make_config, monkeypatch):
    """So that a hanging run can be left: the first signal is handled once."""
    config = make_config(max_steps=5)
    seen = []
    real = checkpoint.save

    def saving(*arguments):
        seen.append(signal.getsignal(signal.SIGINT))
        return real(*arguments)

    monkeypatch.setattr(checkpoint, "save", saving)
    stop_after(monkeypatch, 2, number=signal.SIGINT)
    before = signal.getsignal(signal.SIGINT)
    train(config)
    assert seen == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) == before
    assert losses(config)[-1][0] == 2


def test_a_folder_that_cannot_be_made_is_one_line(make_config, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match=r"file.*[Nn]ot a directory.*--resume auto"):
        train(make_config("file/run", max_steps=1))
