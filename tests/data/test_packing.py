"""The plan of rows: the same everywhere, complete, within both budgets, and never the same music on both sides."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meloformer.config import DataConfig
from meloformer.data import Corpus, RowPlan
from meloformer.data.augment import Augmentation, Deferral
from meloformer.data.packing import PIECE_TOO_LONG, SKIP_REASONS, WINDOW_DTYPE, pack, split_pieces
from meloformer.data.windows import BAR_TOO_LONG
from meloformer.errors import UserError
from meloformer.hid import Tokenizer
from tests.data.music import make_corpus


def data(corpus, **changes) -> DataConfig:
    """Rows of 700 tokens: most pieces of the small corpus are cut in two or three."""
    return DataConfig(**{"data_dir": str(corpus.path), "max_seq_len": 700, "validation_fraction": 0.2, **changes})


def same(a: dict, b: dict) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_plan_depends_on_nothing_but_its_arguments(corpus):
    config = data(corpus)
    one, two = RowPlan(corpus, config, 5, 3), RowPlan(Corpus(corpus.path), config, 5, 3)
    np.testing.assert_array_equal(one.windows, two.windows)
    assert one.num_rows == two.num_rows > 20
    order = range(one.num_rows)
    first = {row: one.row(row)[0] for row in order}
    assert all(same(first[row], two.row(row)[0]) for row in reversed(order)), "rows do not depend on rows made before"
    for other in (RowPlan(corpus, config, 5, 4), RowPlan(corpus, config, 6, 3)):
        assert not np.array_equal(one.windows["piece"], other.windows["piece"])


def test_every_bar_of_every_piece_is_used_once_an_epoch(corpus):
    config = data(corpus)
    pieces = split_pieces(corpus, config)[0]
    for epoch in range(3):
        for split in ("train", "validation"):
            plan = RowPlan(corpus, config, 0, epoch, split)
            used = Counter()
            for row in range(plan.num_rows):
                for document in plan.row(row)[1]:
                    used.update((document.piece, bar) for bar in range(document.first_bar, document.last_bar))
            expected = {(p, bar) for p in pieces[split] for bar in range(corpus.index["num_bars"][p])}
            assert set(used) == expected and set(used.values()) == {1} and not plan.skipped


def test_first_cuts_move_from_epoch_to_epoch(corpus):
    def cuts(epoch: int) -> set:
        windows = RowPlan(corpus, data(corpus), 0, epoch).windows
        return {(int(w["piece"]), int(w["last_bar"])) for w in windows if w["ordinal"] == 0}

    seen = [cuts(epoch) for epoch in range(6)]
    assert len(set.union(*seen)) > 3 * len(seen[0])


def test_rows_hold_what_was_planned(corpus):
    config = data(corpus)
    tokenizer = Tokenizer(corpus.vocabulary)
    plan = RowPlan(corpus, config)
    kinds = Counter()
    for number in range(plan.num_rows):
        row, documents = plan.row(number)
        windows = plan.windows[slice(*plan.window_range(number))]
        assert windows["tokens"].sum() <= config.max_seq_len and windows["segments"].sum() <= config.max_segments
        assert row["tokens"].shape == (700,) and row["segment_start"].shape == (config.max_segments,)
        for i, (window, document) in enumerate(zip(windows, documents, strict=True)):
            tokens = row["tokens"][row["document"] == i]
            tokenizer.validate(tokens)
            assert len(tokens) <= window["tokens"], "a document outgrew its reservation"
            assert (row["segment_document"] == i).sum() <= window["segments"]
            kinds[document.augmentation.deferral] += 1
    assert set(kinds) == set(Deferral)
    assert plan.fill["tokens"] > 0.75


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 20)), max_size=60))
def test_packing_keeps_both_budgets_and_every_window(sizes):
    windows = np.zeros(len(sizes), dtype=WINDOW_DTYPE)
    windows["tokens"], windows["segments"] = np.array(sizes, dtype=np.int32).reshape(-1, 2).T
    rows = pack(windows, np.arange(len(sizes)), 100, 20)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert windows["tokens"][row].sum() <= 100 and windows["segments"][row].sum() <= 20
    half_empty = sum(windows["tokens"][row].sum() <= 50 and windows["segments"][row].sum() <= 10 for row in rows)
    assert half_empty <= 1, "two half-empty rows would have fitted in one"


def test_validation_is_never_varied(corpus):
    config = data(corpus)
    one, two = RowPlan(corpus, config, 0, 0, "validation"), RowPlan(corpus, config, 9, 7, "validation")
    np.testing.assert_array_equal(one.windows, two.windows)
    nothing = Augmentation()
    for row in range(one.num_rows):
        arrays, documents = one.row(row)
        assert same(arrays, two.row(row)[0])
        for document in documents:
            assert document.augmentation.transpose == nothing.transpose and not len(document.augmentation.cells)
        assert corpus.vocabulary.MASK not in arrays["tokens"]


def test_the_training_split_can_be_read_plain(corpus):
    plan = RowPlan(corpus, data(corpus), 3, 5, "train", augment=False)
    np.testing.assert_array_equal(plan.windows, RowPlan(corpus, data(corpus), augment=False).windows)
    assert not plan.windows["deferral"].any()


# --- the split ------------------------------------------------------------------------------------------------


def recluster(corpus, clusters) -> Corpus:
    other = Corpus(corpus.path)
    other.index = {**other.index, "cluster": np.asarray(clusters, dtype=np.uint64)}
    return other


def test_a_cluster_lies_on_one_side(corpus):
    clustered = recluster(corpus, np.arange(24) // 3)
    for seed in range(10):
        pieces, _ = split_pieces(clustered, data(corpus, validation_seed=seed, validation_fraction=0.4))
        sides = [set((pieces[side] // 3).tolist()) for side in ("train", "validation")]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(8))
        assert len(pieces["train"]) + len(pieces["validation"]) == 24


def test_a_piece_keeps_its_side_when_the_corpus_grows(corpus, tmp_path):
    """The split is by hash, never by order: held-out music stays held out."""
    larger = make_corpus(tmp_path, seeds=range(24, -1, -1), num_bars=12)
    config = data(corpus, validation_fraction=0.4)

    def held_out(c: Corpus) -> set:
        return {int(h) for h in c.index["content_hash"][split_pieces(c, config)[0]["validation"]]}

    old = held_out(corpus)
    assert old <= held_out(larger) and len(held_out(larger) - old) <= 1


@pytest.mark.parametrize("fraction", [1e-9, 0.999999])
def test_both_sides_have_something_however_small_the_corpus(corpus, fraction):
    pieces, _ = split_pieces(corpus, data(corpus, validation_fraction=fraction))
    assert min(len(pieces["train"]), len(pieces["validation"])) == 1


def test_nothing_is_held_out_on_request(corpus):
    config = data(corpus, validation_fraction=0.0)
    assert len(split_pieces(corpus, config)[0]["train"]) == 24
    assert RowPlan(corpus, config, split="validation").num_rows == 0


def test_one_cluster_cannot_be_split(corpus):
    with pytest.raises(UserError, match=r"near-duplicates of one another.*--validation_fraction 0"):
        split_pieces(recluster(corpus, np.zeros(24)), data(corpus))


# --- what is skipped ------------------------------------------------------------------------------------------


def test_pieces_with_more_bars_than_max_bars_are_skipped_and_counted(corpus):
    longest = int(corpus.index["num_bars"].max())
    other = Corpus(corpus.path)
    bars = other.index["num_bars"].copy()
    bars[:3] = longest + 1
    other.index = {**other.index, "num_bars": bars}
    plan = RowPlan(other, data(corpus, max_bars=longest))
    assert plan.skipped == {PIECE_TOO_LONG: 3} and PIECE_TOO_LONG in SKIP_REASONS
    assert not set(plan.windows["piece"].tolist()) & {0, 1, 2}
    with pytest.raises(UserError, match=r"data.max_bars is 2: every piece"):
        split_pieces(corpus, data(corpus, max_bars=2))


def test_bars_that_fit_no_row_are_skipped_and_counted(corpus):
    plan = RowPlan(corpus, data(corpus, max_seq_len=100))
    assert plan.skipped[BAR_TOO_LONG] > 0
    assert (plan.windows["tokens"] <= 100).all()


def test_max_samples_takes_the_same_pieces_of_the_training_split(corpus):
    everything = split_pieces(corpus, data(corpus))[0]
    few, fewer = (split_pieces(corpus, data(corpus, max_samples=n))[0] for n in (6, 3))
    assert len(few["train"]) == 6 and set(fewer["train"]) < set(few["train"]) < set(everything["train"])
    np.testing.assert_array_equal(few["validation"], everything["validation"])
    assert set(few["train"]) != set(everything["train"][:6]), "by hash, not by order"


def test_deferral_can_be_turned_off(corpus):
    off = {f"defer_{name}_probability": 0.0 for name in ("rectangle", "continuation", "track", "scattered")}
    plan = RowPlan(corpus, data(corpus, **off))
    assert all(corpus.vocabulary.MASK not in plan.row(row)[0]["tokens"] for row in range(plan.num_rows))
    deferred = RowPlan(corpus, replace(data(corpus), defer_rectangle_probability=0.3))
    assert any(corpus.vocabulary.MASK in deferred.row(row)[0]["tokens"] for row in range(deferred.num_rows))
