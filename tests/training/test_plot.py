"""Curves are drawn from what a run has logged so far, and a mistake is one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.training.loop import train
from meloformer.training.plot import column, plot, read_metrics, smooth
from tests.conftest import ROOT


def test_runs_are_drawn_alone_and_side_by_side(make_config, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    runs = []
    for name in ("one", "other"):
        config = make_config(name, max_steps=4, val_interval=2)
        train(config)
        runs.append(Path(config.training.output_dir))
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a run that is going on
    for chosen in (runs[:1], runs):
        plot(chosen, tmp_path / "curves.png")
        picture = image.imread(tmp_path / "curves.png")
        assert picture.shape[:2] == (880, 1430) and np.ptp(picture[..., :3]) > 0.5


def test_a_run_of_one_line_is_seen(tmp_path, monkeypatch):
    """One point makes no line: two panels were empty, a number hung out of the third."""
    pytest.importorskip("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    drawn = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda canvas, buffer: drawn.append(canvas))
    train_line = {"kind": "train", "step": 10, "loss": 3.0, "lr": 1e-5, "grad_norm": 0.5}
    types = {"T": {"nats_per_token": 1.0}, "structure": {"nats_per_token": 0.5}}
    validations = [{"kind": "validation", "step": s, "nats_per_note": 5 - s / 5, "by_type": types} for s in (5, 10)]
    lines = [json.dumps(record) for record in (train_line, *validations)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    plot([tmp_path], tmp_path / "curves.png")
    canvas = drawn[0]
    canvas.draw()
    loss, held_out, types, rate, norm = canvas.figure.axes
    for ax in (loss, rate, norm):
        assert any(line.get_marker() == "." for line in ax.lines)
    assert all(ax.get_xlabel() == "step" for ax in (loss, held_out, types, rate))
    assert rate.yaxis.get_offset_text().get_text() == ""
    (best,) = held_out.texts
    box, inside = best.get_window_extent(), held_out.get_window_extent()
    assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
    assert [text.get_text() for text in types.get_legend().get_texts()] == ["onset", "structure"]


def test_skipped_updates_leave_a_gap_in_the_loss_only():
    records = [{"step": 1, "loss": 2.0, "lr": 0.1}, {"step": 2, "loss": None, "lr": 0.2}]
    assert [values.tolist() for values in column(records, "loss")] == [[1], [2.0]]
    assert column(records, "lr")[0].tolist() == [1, 2]


def test_smoothing_keeps_ends_and_level():
    values = np.linspace(3, 1, 400)
    assert np.allclose(smooth(values), values)
    noisy = values + np.random.default_rng(0).normal(0, 0.1, 400)
    assert np.abs(smooth(noisy) - values)[20:-20].max() < np.abs(noisy - values).max() / 2


def test_what_is_no_run_is_said_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "meloformer.training.plot", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{tmp_path}: no run there" in done.stderr and "give the folder of a run" in done.stderr
    with pytest.raises(UserError, match="nope: no run there"):  # it was "--output nope/curves.png", never given
        plot([tmp_path / "nope"], tmp_path / "nope" / "curves.png")
    (tmp_path / "metrics.jsonl").write_text("hello\n{}\n")
    with pytest.raises(UserError, match="line 1 is no record"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "\xe4"}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl: no record of a run, byte 10 is not text"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no step yet"):
        read_metrics(tmp_path)
