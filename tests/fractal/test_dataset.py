"""Which crop is which row: a pure function, within bounds, every held-out column once; lists that cannot be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from meloformer.data.loader import batches, steps_in
from meloformer.errors import UserError
from meloformer.fractal.config import FractalData
from meloformer.fractal.dataset import RollCorpus, RollPlan, read_list
from meloformer.fractal.roll import write_roll

WIDTHS = {"train": [40, 96, 150, 300], "valid": [70, 128]}


def random_roll(width: int, seed: int) -> np.ndarray:
    """Sounds in its last column, so that a MIDI file keeps its width."""
    rng = np.random.default_rng(seed)
    roll = np.where(rng.random((128, width)) < 0.05, rng.integers(1, 128, (128, width)), 0).astype(np.uint8)
    roll[64, -1] = 100
    return roll


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rolls")
    for name, widths in WIDTHS.items():
        for i, width in enumerate(widths):
            write_roll(random_roll(width, width), folder / f"{name}{i}.mid")
        (folder / f"{name}.txt").write_text("".join(f"{name}{i}.mid\n" for i in range(len(widths))))
    return folder


@pytest.fixture
def data(folder) -> FractalData:
    return FractalData(
        train_data=str(folder / "train.txt"), val_data=str(folder / "valid.txt"), crop_length=64, augment_factor=3
    )


def test_rows_are_a_pure_function_of_seed_and_epoch(data):
    one, other = (RollPlan(RollCorpus(data), data, seed=5, epoch=2) for _ in range(2))
    assert one.num_rows == 12
    for row in (7, 0, 11):  # in any order
        a, b = one.row(row), other.row(row)
        assert a[1] == b[1] and all(np.array_equal(a[0][name], b[0][name]) for name in a[0])
    for seed, epoch in ((5, 3), (6, 2)):
        plan = RollPlan(RollCorpus(data), data, seed, epoch)
        assert [plan.row(i)[1] for i in range(12)] != [one.row(i)[1] for i in range(12)]
        assert not {int(plan.row(i)[0]["key"]) for i in range(12)} & {int(one.row(i)[0]["key"]) for i in range(12)}


def test_a_training_row_is_the_crop_it_says_moved_and_padded(data):
    corpus = RollCorpus(data)
    for epoch in range(4):
        plan = RollPlan(corpus, data, seed=1, epoch=epoch)
        for row in range(plan.num_rows):
            arrays, (crop,) = plan.row(row)
            piece = [path.name for path in corpus.paths].index(crop.name)
            expected = np.zeros((128, 64), np.uint8)
            for pitch in range(128):
                if 0 <= pitch + crop.shift < 128:
                    expected[pitch + crop.shift, : crop.last - crop.first] = corpus.roll(piece)[
                        pitch, crop.first : crop.last
                    ]
            assert np.array_equal(arrays["roll"], expected)
            assert arrays["valid"].tolist() == [True] * (crop.last - crop.first) + [False] * (
                64 - crop.last + crop.first
            )
            assert crop.last - crop.first == min(64, corpus.widths[piece])


def test_crops_and_shifts_are_uniform(data):
    """Over 200 epochs each of the 4 pieces has 600 crops; piece 1 has 33 places, and there are 7 shifts."""
    corpus = RollCorpus(data)
    crops = [
        plan.row(i)[1][0] for epoch in range(200) for plan in [RollPlan(corpus, data, 0, epoch)] for i in range(12)
    ]
    names, counts = np.unique([crop.name for crop in crops], return_counts=True)
    assert len(names) == 4 and (counts == 600).all()
    places = np.bincount([crop.first for crop in crops if crop.name == "train1.mid"])
    assert len(places) == 33 and places.min() >= 4 and places.max() <= 40  # 18 expected
    shifts, counts = np.unique([crop.shift for crop in crops], return_counts=True)
    assert shifts.tolist() == list(range(-3, 4)) and counts.min() > 270 and counts.max() < 420  # 343 expected


def test_validation_tiles_hold_each_column_once_and_do_not_change(data):
    corpus = RollCorpus(data)
    plan = RollPlan(corpus, data, seed=3, epoch=7, split="validation")
    assert [str(plan.row(i)[1][0]) for i in range(plan.num_rows)] == [
        "valid0.mid columns 0-64",
        "valid0.mid columns 64-70",
        "valid1.mid columns 0-64",
        "valid1.mid columns 64-128",
    ]
    rows = [plan.row(i)[0] for i in range(4)]
    joined = np.concatenate([row["roll"][:, row["valid"]] for row in rows], axis=1)
    assert np.array_equal(joined, np.concatenate([corpus.roll(4), corpus.roll(5)], axis=1))
    first = RollPlan(corpus, data, split="validation")
    assert [int(row["key"]) for row in rows] == [int(first.row(i)[0]["key"]) for i in range(4)]
    assert len({int(row["key"]) for row in rows}) == 4


def test_training_pieces_can_be_tiled_too(data):
    corpus = RollCorpus(data)
    plan = RollPlan(corpus, data, seed=3, epoch=7, augment=False)
    assert plan.num_rows == 1 + 2 + 3 + 5
    assert sum(int(plan.row(i)[0]["valid"].sum()) for i in range(plan.num_rows)) == sum(WIDTHS["train"])


def test_steps_resume_anywhere_and_are_shared_out_among_ranks(data):
    plan = RollPlan(RollCorpus(data), data, seed=0, epoch=0)
    whole = list(batches(plan, 0, rows_per_step=8, micro_batch=4, num_workers=2))
    assert len(whole) == steps_in(plan, 8) == 2
    (resumed,) = batches(plan, 1, rows_per_step=8, micro_batch=4)
    for name in ("roll", "valid", "key"):
        assert np.array_equal(whole[1].micro_batches[0][name], resumed.micro_batches[0][name])
    last = resumed.micro_batches[1]  # 12 rows: the second half of the second step is padding
    assert last["roll"].shape == (4, 128, 64) and last["key"].shape == (4,) and not last["valid"].any()
    ranks = [next(batches(plan, 0, 8, rank, 2, micro_batch=4)).micro_batches[0]["key"] for rank in (0, 1)]
    both = np.concatenate([batch["key"] for batch in whole[0].micro_batches])
    assert sorted(np.concatenate(ranks)) == sorted(both)


def test_without_the_cache_the_rows_are_the_same(data):
    cached = RollCorpus(data)
    data = replace(data, cache_in_memory=False)
    corpus = RollCorpus(data)
    assert corpus._rolls is None and corpus.hash == cached.hash
    for row in range(4):
        a, b = (RollPlan(c, data, 0, 0).row(row)[0]["roll"] for c in (corpus, cached))
        assert np.array_equal(a, b)


def test_a_file_that_changes_under_an_uncached_run_is_one_line(data, folder, tmp_path):
    for i in range(2):
        write_roll(random_roll(80, i), tmp_path / f"{i}.mid")
    (tmp_path / "list.txt").write_text("0.mid\n1.mid\n")
    corpus = RollCorpus(replace(data, train_data=str(tmp_path / "list.txt"), cache_in_memory=False))
    write_roll(random_roll(81, 0), tmp_path / "0.mid")
    with pytest.raises(UserError, match=r"0\.mid: has changed since the run began"):
        corpus.roll(0)


def test_the_hash_is_of_the_music_and_of_the_split(data, folder):
    hashes = {
        RollCorpus(data).hash,
        RollCorpus(replace(data, val_data=None)).hash,
        RollCorpus(replace(data, val_data=data.train_data)).hash,
    }
    assert len(hashes) == 3
    assert (
        RollCorpus(replace(data, crop_length=128, augment_factor=1)).hash in hashes
    )  # settings are compared elsewhere


def test_without_a_validation_list_nothing_is_held_out(data):
    data = replace(data, val_data=None)
    assert RollPlan(RollCorpus(data), data, split="validation").num_rows == 0


# --- lists ------------------------------------------------------------------------------------------------------


def test_paths_are_read_from_the_list_s_folder_then_from_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    (tmp_path / "list.txt").write_text("\n  here.mid \n\ntrain0.mid\n")
    (tmp_path / "here.mid").touch()
    assert read_list(tmp_path / "list.txt", "train_data") == [tmp_path / "here.mid", Path("train0.mid")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--train_data .*list.txt: No such file or directory; give a text file"),
        (b"", r"--train_data .*list.txt: is empty; write the path"),
        (b" \n\n", r"is empty; write the path"),
        (b"MThd\0\0\0\6", r"is no text file"),
        (b"a.mid\nnowhere/b.mid\n", r"line 2: nowhere/b.mid: no such file"),
        (b"a.mid\n", r"none of its 1 file can be used; .*a.mid"),
    ],
)
def test_a_list_that_cannot_be_used_is_one_line(tmp_path, data, content, message):
    if content is not None:
        (tmp_path / "list.txt").write_bytes(content)
    (tmp_path / "a.mid").write_bytes(b"not MIDI")
    with pytest.raises(UserError, match=message) as caught:
        RollCorpus(replace(data, train_data=str(tmp_path / "list.txt")))
    assert "\n" not in str(caught.value)


def test_a_bad_file_is_left_out_and_named(tmp_path, data, folder):
    (tmp_path / "bad.mid").write_bytes(b"not MIDI")
    write_roll(np.zeros((128, 64), np.uint8), tmp_path / "silent.mid")
    (tmp_path / "list.txt").write_text(f"bad.mid\n{folder / 'train0.mid'}\nsilent.mid\n")
    corpus = RollCorpus(replace(data, train_data=str(tmp_path / "list.txt")))
    assert corpus.pieces["train"].tolist() == [0] and corpus.pieces["validation"].tolist() == [1, 2]
    assert len(corpus.refused) == 2 and "bad.mid" in corpus.refused[0] and "no pitched notes" in corpus.refused[1]
