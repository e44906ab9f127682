"""Checkpoints: whole or absent, two pointers, retention."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from meloformer.training import checkpoint
from tests.training.processes import CONTEXT


def save(folder, step, keep_last=2, best_step=None, value=0.0, fail=None, suffix=""):
    def save_model(into):
        save_file({"weight": torch.full((3,), value)}, into / checkpoint.MODEL)
        (into / "config.json").write_text("{}")
        if fail is not None:
            raise fail

    moments = {"weight/exp_avg": torch.full((3,), value)}
    best = [] if best_step is None else [best_step]
    return checkpoint.save(folder, f"step_{step:08d}{suffix}", save_model, moments, {"step": step}, keep_last, best)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path):
    folder = save(tmp_path, 500, best_step=500)
    assert names(folder) == ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert (tmp_path / "latest").read_text() == (tmp_path / "best").read_text() == "step_00000500\n"
    checkpoint.check(folder)
    assert checkpoint.find(folder) == checkpoint.find(tmp_path) == folder


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_checkpoints_and_nothing_half_written(tmp_path, error):
    """A full disk, and a second Ctrl-C, in the middle of writing."""
    save(tmp_path, 1, value=1.0)
    before = names(tmp_path)
    with pytest.raises(BaseException) as caught:
        save(tmp_path, 2, value=2.0, fail=error)
    assert names(tmp_path) == before
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    if isinstance(error, OSError):
        assert isinstance(caught.value, checkpoint.CheckpointError)
        assert "No space left" in str(caught.value) and "--resume auto" in str(caught.value)


def test_what_a_kill_leaves_is_passed_over_and_removed(tmp_path):
    """SIGKILL gives no chance to clean up: a folder aside, or one that was renamed before `latest` moved."""
    save(tmp_path, 1)
    (tmp_path / ".step_00000002.tmp").mkdir()
    torn = tmp_path / "step_00000003"
    torn.mkdir()
    assert checkpoint.newest(tmp_path).name == "step_00000001"
    save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000002"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 2, value=1.0)
    checkpoint.write_pointer(tmp_path, "latest", None)
    folder = save(tmp_path, 2, value=2.0)
    assert checkpoint.read_tensors(folder / checkpoint.OPTIMIZER)["weight/exp_avg"].tolist() == [2.0] * 3


def save_again_and_die(folder, suffix, operation):
    """SIGKILL at the file operation number `operation` after the old folder was moved."""
    count = [0]

    def watch(event, arguments):
        count[0] += event == "os.rename" and str(arguments[1]).endswith(".old")
        if count[0] and event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            count[0] += 1
            if count[0] == operation + 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    save(folder, 4, keep_last=3, value=2.0, suffix=suffix)


def save_again_and_die_everywhere(folder, suffix):
    """Folders 0, 1, .. of `folder`, killed one operation later each; the last was not killed any more."""
    for operation in range(60):
        save(folder / str(operation), 2, value=0.0)
        save(folder / str(operation), 4, value=1.0)
        if os.fork() == 0:
            save_again_and_die(folder / str(operation), suffix, operation)
            os._exit(0)
        status = os.wait()[1]
        if status != signal.SIGKILL:
            sys.exit(status != 0)


@pytest.mark.parametrize("suffix", ["", "-val_loss_0.5000"])
def test_saving_the_newest_step_again_can_be_killed_anywhere(tmp_path, suffix):
    """The folder that `latest` names was moved away before its replacement stood there; killed in between, the run
    began at 0. A validation that SIGTERM forestalled saves its step again, the second family under another name."""
    process = CONTEXT.Process(target=save_again_and_die_everywhere, args=(tmp_path, suffix))
    process.start()
    process.join()
    assert process.exitcode == 0
    values = []
    for folder in sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name)):
        checkpoint.restore(folder)
        newest = checkpoint.newest(folder)
        assert checkpoint.step_of(newest) == 4, names(folder)
        checkpoint.check(newest)
        values.append(checkpoint.read_tensors(newest / checkpoint.MODEL)["weight"][0].item())
        save(folder, 6, keep_last=2)
        assert checkpoint.all_steps(folder) == [4, 6]
        assert not [name for name in names(folder) if name.startswith(".")]
    assert len(values) > 5 and values == sorted(values) and set(values) == {1.0, 2.0}


@pytest.mark.parametrize("broken", ["replace", "sync_directory"])
@pytest.mark.parametrize("suffix", ["", "-val_loss_0.5000"])
def test_saving_a_step_again_may_fail_anywhere(tmp_path, monkeypatch, suffix, broken):
    """A disk that says no between the two renames, or after them: what stood there was removed all the same."""
    save(tmp_path, 2)
    save(tmp_path, 4, value=1.0)
    where, calls = {"replace": (os, 2), "sync_directory": (checkpoint, 2)}[broken], [0]
    real = getattr(where[0], broken)

    def failing(*arguments):
        calls[0] += 1
        if calls[0] == where[1]:
            raise OSError(errno.EIO, "Input/output error")
        return real(*arguments)

    monkeypatch.setattr(where[0], broken, failing)
    with pytest.raises(checkpoint.CheckpointError, match="Input/output error"):
        save(tmp_path, 4, value=2.0, suffix=suffix)
    monkeypatch.undo()
    newest = checkpoint.newest(tmp_path)
    assert checkpoint.step_of(newest) == 4 and checkpoint.read_pointer(tmp_path, "latest") == newest
    checkpoint.check(newest)
    assert (tmp_path / ".step_00000004.old").exists() == (broken == "sync_directory")


def test_retention_keeps_the_last_ones_and_the_best(tmp_path):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step, keep_last=2, best_step=20 if step >= 20 else None)
    assert checkpoint.all_steps(tmp_path) == [20, 40, 50]
    assert checkpoint.read_pointer(tmp_path, "best").name == "step_00000020"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("state.json", "{", "not JSON"),
        ("state.json", '{"format": 99}', "format 99"),
        ("state.json", '{"format": 1}', "names no checksums"),
        ("optimizer.safetensors", "short", "damaged"),
        ("model.safetensors", None, "damaged"),
        ("config.json", "{ }", "damaged"),
    ],
)
def test_damage_is_named(tmp_path, file, content, said):
    folder = save(tmp_path, 1)
    if content is None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[:-1])
    else:
        (folder / file).write_text(content)
    with pytest.raises(checkpoint.CheckpointError, match=said) as caught:
        checkpoint.check(folder)
    assert str(folder / file) in str(caught.value)


def test_one_wrong_bit_is_found_in_every_file(tmp_path):
    """Lengths and headers are right; only the checksums tell. A digit of state.json would move the schedule."""
    folder = save(tmp_path, 1)
    for file in sorted(folder.iterdir()):
        whole = file.read_bytes()
        if file.name == checkpoint.STATE:
            spoilt = whole.replace(b'"step": 1', b'"step": 3')
        else:
            spoilt = whole[:-1] + bytes([whole[-1] ^ 1])
        assert spoilt != whole
        file.write_bytes(spoilt)
        with pytest.raises(checkpoint.CheckpointError, match=f"{file.name}: damaged .* resume from another"):
            checkpoint.check(folder)
        file.write_bytes(whole)
        checkpoint.check(folder)


def test_a_missing_file_is_named(tmp_path):
    folder = save(tmp_path, 1)
    (folder / checkpoint.OPTIMIZER).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"optimizer.safetensors: unreadable \(No such file"):
        checkpoint.check(folder)


def test_a_folder_without_checkpoints_says_so(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint there"):
        checkpoint.find(tmp_path / "nothing")


def test_state_survives_json_exactly(tmp_path):
    """Floats are part of what must come back bit for bit."""
    number = 0.1 + 0.2
    folder = checkpoint.save(tmp_path, "step_00000001", lambda into: None, {}, {"nats": number}, 1, [])
    assert json.loads((folder / "state.json").read_text())["nats"] == number
