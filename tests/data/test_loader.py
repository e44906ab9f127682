"""Batches: the plan's rows, dealt out to steps and ranks, whoever asks and from wherever."""

from types import SimpleNamespace

import numpy as np
import pytest

from meloformer.config import DataConfig
from meloformer.data import RowPlan, batches, num_targets, steps_in
from meloformer.data.loader import rows_of
from meloformer.hid.rows import SEGMENT_FIELDS, TOKEN_FIELDS


@pytest.fixture(scope="module")
def plan(corpus):
    plan = RowPlan(corpus, DataConfig(data_dir=str(corpus.path), max_seq_len=700, validation_fraction=0.2))
    assert plan.num_rows % 4, "the last step should be uneven"
    return plan


def flat(steps) -> list[dict]:
    return [batch for step in steps for batch in step.micro_batches]


def assert_equal(a: list[dict], b: list[dict]) -> None:
    assert len(a) == len(b)
    for one, two in zip(a, b):
        for name in one:
            np.testing.assert_array_equal(one[name], two[name])


def test_shapes_are_the_same_in_every_batch(plan):
    steps = list(batches(plan, rows_per_step=4, micro_batch=2))
    assert [step.index for step in steps] == list(range(steps_in(plan, 4)))
    for step in steps:
        assert len(step.micro_batches) == 2
        for batch, documents in zip(step.micro_batches, step.documents, strict=True):
            assert set(batch) == {*TOKEN_FIELDS, *SEGMENT_FIELDS} and len(documents) == 2
            assert all(batch[name].shape == (2, 700) for name in TOKEN_FIELDS)
            assert all(batch[name].shape == (2, plan.data.max_segments) for name in SEGMENT_FIELDS)
            for row, origin in zip(batch["document"], documents):
                assert row.max() + 1 == len(origin)
        assert step.num_targets == sum(num_targets(batch) for batch in step.micro_batches) > 0


def test_rows_come_in_the_plans_order_and_padding_at_the_end(plan):
    rows = [row for batch in flat(batches(plan, rows_per_step=4)) for row in batch["tokens"]]
    for number in range(plan.num_rows):
        np.testing.assert_array_equal(rows[number], plan.row(number)[0]["tokens"])
    padding = rows[plan.num_rows :]
    assert len(padding) == -plan.num_rows % 4
    assert not any(row.any() for row in padding)
    assert (flat(batches(plan, rows_per_step=4))[-1]["targets"] == -1).all()


def test_starting_at_a_step_needs_nothing_of_the_steps_before(plan):
    everything = flat(batches(plan, rows_per_step=4, micro_batch=4))
    assert_equal(flat(batches(plan, 3, rows_per_step=4, micro_batch=4)), everything[3:])
    assert flat(batches(plan, steps_in(plan, 4), rows_per_step=4)) == []


def test_two_ranks_together_see_what_one_sees(plan):
    one = list(batches(plan, rows_per_step=4, micro_batch=2))
    ranks = [list(batches(plan, rows_per_step=4, rank=rank, world_size=2, micro_batch=1)) for rank in range(2)]
    for alone, *shared in zip(one, *ranks, strict=True):
        assert all(len(step.micro_batches) == 2 for step in shared)
        rows = [[b["tokens"][0] for b in step.micro_batches] for step in shared]
        dealt = [rows[i % 2][i // 2] for i in range(4)]
        np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in alone.micro_batches]), dealt)
        assert sum(step.num_targets for step in shared) == alone.num_targets


def test_an_uneven_last_step_is_shared_out():
    plan = SimpleNamespace(num_rows=10)
    assert [rows_of(plan, 1, 8, rank, 4) for rank in range(4)] == [[8, -1], [9, -1], [-1, -1], [-1, -1]]
    rows = [row for step in range(2) for rank in range(4) for row in rows_of(plan, step, 8, rank, 4)]
    assert sorted(row for row in rows if row >= 0) == list(range(10))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(plan, num_workers):
    assert_equal(
        flat(batches(plan, rows_per_step=4, micro_batch=2, num_workers=num_workers)),
        flat(batches(plan, rows_per_step=4, micro_batch=2)),
    )


def test_a_loop_that_stops_early_leaves_no_worker_behind(plan):
    import threading

    steps = batches(plan, rows_per_step=4, num_workers=2)
    next(steps)
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_an_error_in_a_worker_reaches_the_loop(plan, monkeypatch):
    def broken(row):
        raise OSError("the disk is gone")

    monkeypatch.setattr(plan, "row", broken)
    with pytest.raises(OSError, match="the disk is gone"):
        list(batches(plan, rows_per_step=4, num_workers=2))


def test_what_cannot_be_dealt_out_is_refused(plan):
    with pytest.raises(ValueError, match="multiple of world_size"):
        next(batches(plan, rows_per_step=6, world_size=2, micro_batch=2))
    with pytest.raises(ValueError, match="rank is 2"):
        next(batches(plan, rows_per_step=4, rank=2, world_size=2))
