"""Numbers of rolls that can be counted by hand, and the verdict on sets that differ in one of them."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.fractal import statistics
from meloformer.fractal.roll import write_roll


def roll_of(*notes: tuple[int, int, int], width: int = 32) -> np.ndarray:
    roll = np.zeros((128, width), dtype=np.uint8)
    for pitch, first, last in notes:
        roll[pitch, first:last] = 90
    return roll


def test_measures_by_hand():
    found = statistics.measure(roll_of((60, 0, 4), (72, 8, 16), (60, 16, 17)))
    assert found == {"sounding": 13 / (128 * 32), "onsets": 1.5, "range": 12.0}
    assert statistics.measure(roll_of()) == {"sounding": 0.0, "onsets": 0.0, "range": 0.0}


def test_real_windows_leave_out_silence_and_the_short_rest():
    roll = roll_of((60, 0, 4), (62, 70, 90), width=100)
    parts = statistics.windows(roll, 32)
    assert len(parts) == 2 and np.array_equal(parts[0], roll[:, :32]) and np.array_equal(parts[1], roll[:, 64:96])


def test_what_lies_outside_and_what_is_silent_or_full_is_counted():
    real = [roll_of((60, 0, 8), (64 + i, 8, 16)) for i in range(4)]
    generated = [roll_of((60, 0, 8), (65, 8, 16)), roll_of(), np.full((128, 32), 90, np.uint8)]
    result = statistics.compare(generated, real)
    assert (result["silent"], result["full"]) == (1, 1)
    assert [result["measures"][name]["generated_inside"] for name in statistics.MEASURES] == [1, 1, 1]
    assert all(found["generated_median_inside"] for found in result["measures"].values())
    assert "3 generated rolls, 4 windows of held-out ones, 32 columns each: 1 silent, 1 full" in statistics.page(result)


def test_other_real_rolls_take_the_same_test():
    """Of 100 generated rolls 88 were inside, which looked like a fault of the model: of real ones it was 89 of 100."""
    real = [roll_of((60, 0, 8), (64 + i, 8, 16)) for i in range(4)]
    control = [roll_of((60, 0, 8), (90, 8, 16)), roll_of((60, 0, 8), (66, 8, 16))]
    result = statistics.compare(real[:1], real, control)
    assert result["control_windows"] == 2
    assert [found["control_inside"] for found in result["measures"].values()] == [2, 2, 1]
    assert result["measures"]["range"]["control"][-1] == 30.0
    assert "control    50.0% of 2 inside" in statistics.page(result)
    assert "control" not in statistics.page(statistics.compare(real[:1], real))


def test_the_command_reads_what_generate_wrote(tmp_path, monkeypatch, capsys):
    """The report states the columns: a roll that ends in silence is as wide as it was."""
    (tmp_path / "out").mkdir()
    write_roll(roll_of((60, 0, 4)), tmp_path / "out" / "a.mid")
    write_roll(roll_of((60, 30, 32)), tmp_path / "out" / "old.mid")  # of no run that finished
    report = {"runs": [{"samples": [{"file": "a.mid", "columns": 32}]}]}
    (tmp_path / "out" / "generation.json").write_text(json.dumps(report))
    write_roll(roll_of((60, 0, 8), (70, 8, 96), width=96), tmp_path / "real.mid")
    (tmp_path / "real.txt").write_text("real.mid\n")
    words = ["--generated", tmp_path / "out", "--real", tmp_path / "real.txt", "--output", tmp_path / "s.json"]
    words += ["--control", tmp_path / "real.txt"]
    monkeypatch.setattr(sys, "argv", ["statistics", *map(str, words)])
    statistics.main()
    result = json.loads((tmp_path / "s.json").read_text())
    assert (result["generated_rolls"], result["real_windows"], result["width"]) == (1, 3, 32)
    assert result["control_windows"] == 3 and result["measures"]["range"]["control_inside"] == 3
    assert result["measures"]["sounding"]["generated"][2] == pytest.approx(4 / (128 * 32), abs=1e-5)
    assert statistics.page(result) in capsys.readouterr().out


def test_an_empty_folder_and_short_pieces_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no generation.json and no .mid file there"):
        statistics.read_generated(tmp_path, None)
    write_roll(roll_of((60, 0, 8)), tmp_path / "a.mid")
    (tmp_path / "list.txt").write_text("a.mid\n")
    with pytest.raises(UserError, match=r"none of its files has 32 columns that sound; lower --width"):
        statistics.read_real(tmp_path / "list.txt", 32)
