"""A model to pass on is the one that was saved, and a mistake is one line. That it generates and evaluates:
test_end_to_end.py."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from meloformer import export as command
from meloformer.data import demo_corpus
from meloformer.errors import UserError
from meloformer.export import export
from meloformer.training import checkpoint, plot


@pytest.fixture
def run(tmp_path):
    """A run's folder with one checkpoint, of a model of eight weights."""

    def save_model(folder):
        save_file({"weight": torch.arange(8.0)}, folder / checkpoint.MODEL)
        (folder / "config.json").write_text(json.dumps({"format": 1, "max_seq_len": 512}))

    state = {"config": {"data": {"data_dir": "shards"}}}
    checkpoint.save(tmp_path / "run" / "checkpoints", "step_00000001", save_model, {}, state, 1, [1])
    return tmp_path / "run"


def spoil(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("again", [False, True])
def test_damage_is_not_given_checksums_of_its_own(run, tmp_path, file, again):
    """One bit, in a checkpoint or in an export that is exported again: the new folder vouched for it."""
    source, output = run / "checkpoints" / "step_00000001", tmp_path / "out"
    if again:
        source = tmp_path / "first"
        export(str(run), source)
    export(str(source), tmp_path / "whole")
    spoil(source / file)
    with pytest.raises(UserError, match=f"{file}: damaged .* take another checkpoint"):
        export(str(source), output)
    assert not output.exists()


def test_an_export_without_the_checksum_of_its_config_is_read(run, tmp_path):
    """As earlier ones were written; and the optimizer's file may be missing, it stays behind anyway."""
    (run / "checkpoints" / "step_00000001" / checkpoint.OPTIMIZER).unlink()
    export(str(run), tmp_path / "first")
    state = json.loads((tmp_path / "first" / "state.json").read_text())
    del state["sha256"]["config.json"]
    state["sha256"]["state.json"] = checkpoint.state_checksum(state)
    (tmp_path / "first" / "state.json").write_text(json.dumps(state))
    assert export(str(tmp_path / "first"), tmp_path / "second") > 0


@pytest.mark.parametrize("length", [-5, 0, 15])
def test_a_model_cannot_be_told_to_write_nothing(run, tmp_path, length):
    with pytest.raises(UserError, match=f"--max_seq_len is {length}, must be at least 16"):
        export(str(run), tmp_path / "out", max_seq_len=length)
    export(str(run), tmp_path / "out", max_seq_len=16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_seq_len"] == 16


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        (command, ["--checkpoint", "a", "--output", "b", "--max_seq_len", "long"], "invalid int value: 'long'"),
        (plot, [], "RUN"),
        (demo_corpus, ["--corpus", "chopin"], "invalid choice: 'chopin'"),
    ],
)
def test_a_wrong_flag_is_one_line(monkeypatch, module, words, said):
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(UserError, match=said) as caught:
        module.main()
    assert "\n" not in str(caught.value) and str(caught.value).endswith("--help lists every flag")
