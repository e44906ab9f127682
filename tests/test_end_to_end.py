"""The whole path by its command lines; every kind of bad input: one line on stderr, status 2, nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import symusic
from miditoolkit import MidiFile

from meloformer.hid import Tokenizer
from meloformer.midi import read_score, write_midi
from tests.conftest import ROOT
from tests.training.small import small_score

TINY = ["--n_layer", "2", "--n_head", "2", "--d_model", "32", "--d_ff", "64", "--max_seq_len", "512"]


def command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeed(script: str, *arguments: object) -> str:
    done = command(script, *arguments)
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """A folder with midi/, shards/, run/ and out/: twenty steps on sixteen small pieces."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "midi" / "Übung 1").mkdir(parents=True)
    for seed in range(16):
        place = folder / "midi" / ("Übung 1" if seed % 2 else ".") / f"piece {seed}.{'MID' if seed % 3 else 'mid'}"
        write_midi(small_score(seed), place)
    (folder / "midi" / "page.mid").write_text("<html>not found</html>")
    succeed("preprocess_data.py", "--input", folder / "midi", "--output", folder / "shards", "--workers", 2)
    options = ["--validation_fraction", "0.2", "--max_steps", "20", "--batch_size", "1", "--save_interval", "10"]
    options += ["--gradient_accumulation_steps", "2", "--learning_rate", "3e-3", "--device", "cpu"]
    succeed("train.py", "--data_dir", folder / "shards", "--output_dir", folder / "run", *options, *TINY)
    options = ["--num_samples", "3", "--bars", "2", "--instruments", "drums,33,piano", "--max_length", "300"]
    options = [word.replace("piano", "Acoustic Grand Piano") for word in options]
    succeed("generate.py", "--checkpoint", folder / "run", "--output", folder / "out", *options, "--plot")
    return folder


def test_a_model_to_pass_on(path, tmp_path):
    """Without the optimizer; it generates, evaluates as the run does, and another run begins from it."""
    exact, half = tmp_path / "exact", tmp_path / "half"
    for folder, more in ((exact, []), (half, ["--half"])):
        done = command("meloformer/export.py", "--checkpoint", path / "run", "--output", folder, *more)
        assert done.returncode == 0 and "MB of weights" in done.stdout, done.stderr
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "state.json"]
    kept = "checkpoints/step_00000020/model.safetensors"
    assert (exact / "model.safetensors").read_bytes() == (path / "run" / kept).read_bytes()
    assert (half / "model.safetensors").stat().st_size < 0.6 * (exact / "model.safetensors").stat().st_size
    succeed("generate.py", "--checkpoint", half, "--output", tmp_path / "out", "--num_samples", 1, "--bars", 1)
    found = {}
    for name, where in (("run", path / "run"), ("exact", exact), ("half", half)):
        succeed("evaluate.py", "--checkpoint", where, "--output", tmp_path / f"{name}.json", "--device", "cpu")
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["nats_per_note"]
    assert found["run"] == found["exact"] != found["half"] == pytest.approx(found["run"], rel=0.01)
    again = command("meloformer/export.py", "--checkpoint", path / "run", "--output", exact)
    assert again.returncode == 2 and "holds a model already" in again.stderr
    resumed = command(
        "train.py",
        "--data_dir",
        path / "shards",
        "--output_dir",
        tmp_path / "next",
        "--resume",
        exact,
        "--max_steps",
        20,
    )
    assert resumed.returncode == 2 and "without its optimizer; begin from it with --init_from" in resumed.stderr


def test_midi_in_a_model_and_new_midi_out(path):
    meta = json.loads((path / "shards" / "meta.json").read_text())
    assert meta["totals"]["pieces"] == 16
    rejected = [json.loads(line) for line in (path / "shards" / "rejected.jsonl").read_text().splitlines()]
    assert [Path(line["path"]).name for line in rejected] == ["page.mid"]

    records = [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0]

    files = sorted((path / "out").glob("*.mid"))
    assert len(files) == len(list((path / "out").glob("*.png"))) == 3
    for file in files:
        score = read_score(file)
        assert sorted(score.instruments.tolist()) == [0, 33, 128]
        assert sum(len(t.notes) for t in symusic.Score(file).tracks) == score.num_notes
        assert sum(len(t.notes) for t in MidiFile(str(file)).instruments) == score.num_notes
        tokenizer = Tokenizer()
        tokenizer.validate(tokenizer.encode(score))


def test_evaluation_stands_beside_its_baselines(path):
    out = succeed("evaluate.py", "--checkpoint", path / "run", "--device", "cpu")
    result = json.loads((path / "run" / "evaluation.json").read_text())
    assert set(result["baselines"]) == {"unigram", "bigram", "repeat_bar"}
    assert f"{result['nats_per_note']:.3f}" in out
    assert result["nats_per_note"] > 0
    # the same notes with less context, under another name
    options = ["--max_seq_len", "256", "--output", path / "short.json", "--device", "cpu"]
    succeed("evaluate.py", "--checkpoint", path / "run", *options)
    short = json.loads((path / "short.json").read_text())
    assert (short["notes"], short["max_seq_len"]) == (result["notes"], 256)
    assert short["nats_per_note"] != result["nats_per_note"]


def test_what_is_finished_is_not_done_again(path):
    before = (path / "shards" / "meta.json").stat().st_mtime_ns
    again = succeed("preprocess_data.py", "--input", path / "midi", "--output", path / "shards")
    assert "nothing" in again.lower() or "already" in again.lower()
    assert (path / "shards" / "meta.json").stat().st_mtime_ns == before
    resumed = command(
        *("train.py", "--data_dir", path / "shards", "--output_dir", path / "run", "--resume", "auto"),
        *("--validation_fraction", "0.2", "--max_steps", "20", "--batch_size", "1", "--save_interval", "10"),
        *("--gradient_accumulation_steps", "2", "--learning_rate", "3e-3", "--device", "cpu", *TINY),
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "finished" in resumed.stdout


def refused(done: subprocess.CompletedProcess, *words: str) -> None:
    lines = [line for line in done.stderr.splitlines() if line.strip() and "file/s" not in line]  # the progress bar
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def test_bad_input_gets_one_line_and_leaves_nothing(path, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_music").mkdir()
    (tmp_path / "no_music" / "letter.mid").write_text("Dear Sir or Madam")
    out = tmp_path / "out"
    refused(command("preprocess_data.py", "--input", tmp_path / "empty", "--output", out), "empty")
    assert not out.exists()
    refused(command("preprocess_data.py", "--input", tmp_path / "no_music", "--output", out), "letter.mid")
    assert not (out / "meta.json").exists()
    refused(command("preprocess_data.py", "--input", tmp_path / "nowhere", "--output", out), "nowhere")

    refused(command("generate.py", "--checkpoint", tmp_path / "nowhere", "--output", out), "nowhere")
    refused(command("train.py", "--data_dir", tmp_path / "empty", "--output_dir", out), "empty")
    refused(command("train.py", "--data_dir", path / "shards", "--batchsize", "2"), "batch_size")
    refused(command("train.py", "--data_dir", path / "shards", "model.n_layers=2"), "model.n_layer")
    refused(command("train.py", "--data_dir", path / "shards", "--learning_rate", "fast"), "learning_rate")
    typo = tmp_path / "typo.yaml"
    typo.write_text("training:\n  lerning_rate: 3e-4\n")
    refused(command("train.py", "--data_dir", path / "shards", "--config", typo), "typo.yaml", "learning_rate")
    assert not out.exists()


def test_a_shard_of_another_vocabulary_is_refused(path, tmp_path):
    shards = tmp_path / "coarse"
    succeed("preprocess_data.py", "--input", path / "midi", "--output", shards, "--resolution", 12)
    refused(command("evaluate.py", "--checkpoint", path / "run", "--data_dir", shards, "--device", "cpu"), "vocabulary")
    meta = json.loads((shards / "meta.json").read_text())
    meta["vocabulary"]["hash"] = "0" * 16
    (shards / "meta.json").write_text(json.dumps(meta))
    done = command("train.py", "--data_dir", shards, "--output_dir", tmp_path / "run", *TINY)
    refused(done, "vocabulary", "preprocess")
    assert not (tmp_path / "run").exists()
