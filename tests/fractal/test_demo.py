"""The last page of `make demo-fractal`, and the lists that it trains on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from meloformer.errors import UserError
from meloformer.fractal.dataset import read_list
from meloformer.fractal.demo import summary
from meloformer.fractal.lists import write_lists
from meloformer.midi import Score, Track, note_table, write_midi


def test_the_page_puts_the_model_beside_the_unigram_entropy_and_names_the_files(tmp_path):
    evaluation = {"nats_per_cell": 0.1, "unigram_nats_per_cell": 0.25}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    entry = {"file": "a.mid", "files": ["a.mid", "a.png", "a.gif"], "notes": 120, "sounding_share": 0.031}
    (tmp_path / "generation.json").write_text(json.dumps({"runs": [{"samples": [entry]}]}))
    page = summary(tmp_path, tmp_path)
    assert "0.1000" in page and "0.2500" in page and "0.40 of it" in page
    assert "120 notes,  3.1% sounds" in page
    assert all(str(tmp_path / f"a.{suffix}") in page for suffix in ("mid", "png", "gif"))


@pytest.mark.parametrize("text", [None, "{", "[]", '{"nats_per_cell": 0.1}', '{"nats_per_cell": null}'])
def test_without_an_evaluation_one_line_says_how_to_get_it(tmp_path, text):
    if text is not None:
        (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(UserError, match=r"write it with evaluate.py --checkpoint") as caught:
        summary(tmp_path, tmp_path)
    assert "\n" not in str(caught.value)


# --- lists ------------------------------------------------------------------------------------------------------


def tune(seed: int, up: int = 0) -> Score:
    rng = np.random.default_rng(seed)
    rows = [(0, 240 * i, 240, int(p) + up, 90) for i, p in enumerate(rng.integers(50, 70, 16 * 8))]
    return Score(480, [Track(0)], note_table(rows))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Nine tunes, one of them also a third higher, and a file that is no music."""
    (tmp_path / "midi").mkdir()
    for i in range(9):
        write_midi(tune(i), tmp_path / "midi" / f"{i}.mid")
    write_midi(tune(4, up=4), tmp_path / "midi" / "copy.mid")
    (tmp_path / "midi" / "bad.mid").write_bytes(b"no")
    return tmp_path


def test_both_lists_hold_every_readable_file_once_and_copies_together(folder, capsys):
    for seed in range(3):
        sizes = write_lists(str(folder / "midi"), folder / "lists", 0.3, seed)
        lists = {name: [p.name for p in read_list(folder / "lists" / name, "train_data")] for name in sizes}
        assert sorted(lists["train.txt"] + lists["valid.txt"]) == [*(f"{i}.mid" for i in range(9)), "copy.mid"]
        assert all(lists.values()) and sizes == {name: len(files) for name, files in lists.items()}
        assert any({"4.mid", "copy.mid"} <= set(files) for files in lists.values())
    assert "left out bad.mid" in capsys.readouterr().err


def test_the_lists_are_read_from_anywhere(folder, monkeypatch):
    monkeypatch.chdir(folder / "midi")
    write_lists(".", Path("../lists"), 0.3)
    monkeypatch.chdir("/")
    assert all(path.is_file() for path in read_list(folder / "lists" / "train.txt", "train_data"))


@pytest.mark.parametrize(
    ("fraction", "message"), [(0.0, r"--validation_fraction is 0.0, must be above 0"), (1.0, r"below 1")]
)
def test_a_fraction_that_holds_out_none_or_all_is_one_line(folder, fraction, message):
    with pytest.raises(UserError, match=message):
        write_lists(str(folder / "midi"), folder / "lists", fraction)
    assert not (folder / "lists").exists()
