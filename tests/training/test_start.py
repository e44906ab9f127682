"""Where a run goes on from, when its folder is not as its last save left it."""

from __future__ import annotations

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from meloformer.errors import UserError
from meloformer.training import checkpoint, run
from meloformer.training.loop import train
from tests.training.processes import records


@pytest.fixture
def finished(make_config):
    """(config, checkpoints folder) of a run of three checkpoints, at 2, 4 and 6."""
    config = make_config(max_steps=6, save_interval=2, val_interval=100, keep_last=5, resume="auto", num_workers=0)
    train(config)
    return config, Path(config.training.output_dir) / "checkpoints"


@pytest.mark.parametrize("gone", ["step_00000006", "latest", "latest and a file", "nothing but .old"])
def test_auto_never_begins_at_0_where_there_are_checkpoints(finished, capsys, gone):
    """A checkpoint was said to be damaged, its folder was removed, and the same command began at 0: the next save then
    removed the others. So did a copy without the pointer."""
    config, checkpoints = finished
    before = records(config)
    if gone == "nothing but .old":  # a kill while the only checkpoint was saved again
        for step in (2, 4):
            shutil.rmtree(checkpoints / f"step_{step:08d}")
        (checkpoints / "step_00000006").rename(checkpoints / ".step_00000006.old")
    elif gone == "step_00000006":
        shutil.rmtree(checkpoints / gone)
    else:
        (checkpoints / "latest").unlink()
        if gone == "latest and a file":
            (checkpoints / "step_00000006" / checkpoint.OPTIMIZER).unlink()
    capsys.readouterr()
    train(config)
    said = capsys.readouterr().out
    if gone in ("latest", "nothing but .old"):
        assert "finished, at step 6 of 6" in said
    else:
        assert f"resuming {checkpoints / 'step_00000004'}" in said
        assert ("passed over: " in said) == (gone == "latest and a file")
        assert records(config) == before and checkpoint.all_steps(checkpoints) == [2, 4, 6]


@pytest.mark.parametrize("left", ["torn folders", "a pointer"])
def test_auto_refuses_where_nothing_whole_is_left(finished, left):
    config, checkpoints = finished
    for folder in checkpoint.all_folders(checkpoints).values():
        if left == "torn folders":
            (folder / checkpoint.MODEL).unlink()
        else:
            shutil.rmtree(folder)
    if left == "torn folders":
        (checkpoints / "latest").unlink()
    said = "none of its 3 checkpoints is whole" if left == "torn folders" else "names a checkpoint that is not there"
    with pytest.raises(UserError, match=said):
        train(config)


def in_between(monkeypatch, act):
    """Let another process do something just before this one has the lock."""
    real = run.locked

    @contextmanager
    def late(folder):
        act()
        with real(folder):
            yield

    monkeypatch.setattr(run, "locked", late)


def test_the_last_save_of_a_job_that_was_requeued_is_seen(finished, monkeypatch, capsys):
    """The start was chosen before the lock, and not looked at again: what the old job saved meanwhile was lost."""
    config, checkpoints = finished
    for step in (4, 6):
        (checkpoints / f"step_{step:08d}").rename(checkpoints / f"later_{step}")
    checkpoint.write_pointer(checkpoints, "latest", 2)

    def last_save():
        for step in (4, 6):
            (checkpoints / f"later_{step}").rename(checkpoints / f"step_{step:08d}")
        checkpoint.write_pointer(checkpoints, "latest", 6)

    in_between(monkeypatch, last_save)
    capsys.readouterr()
    train(config)
    assert "finished, at step 6 of 6" in capsys.readouterr().out


def test_a_run_that_began_meanwhile_is_not_begun_again(finished, make_config, monkeypatch):
    _, checkpoints = finished
    new = make_config("new", max_steps=6, resume="auto")
    in_between(monkeypatch, lambda: shutil.copytree(checkpoints, Path(new.training.output_dir) / "checkpoints"))
    with pytest.raises(UserError, match="holds a run; go on with --resume auto"):
        train(new)
    assert checkpoint.all_steps(Path(new.training.output_dir) / "checkpoints") == [2, 4, 6]
