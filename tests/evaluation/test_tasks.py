"""What counts in a task is what stands in its fills."""

from __future__ import annotations

import numpy as np
import pytest

from meloformer.config import DataConfig
from meloformer.data import Corpus
from meloformer.evaluation.likelihood import split_batches
from meloformer.evaluation.tasks import TASKS, Tasks, only_fills
from meloformer.hid import Family
from meloformer.model import MeloFormer
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return small_config(write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("run"))


def test_targets_are_those_of_the_fills(config):
    corpus = Corpus(config.data.data_dir)
    plans = Tasks(corpus, config.data).plans
    assert list(plans) == list(TASKS)
    for plan in plans.values():
        some = 0
        for batch in split_batches(plan, 2):
            kept = only_fills(batch)["targets"] >= 0
            for row in range(2):
                for document in np.unique(batch["document"][row][batch["document"][row] >= 0]):
                    mine = batch["document"][row] == document
                    types = batch["type"][row][mine]
                    in_fill = np.cumsum(types == Family.FILL) > 0
                    expected = in_fill & (batch["targets"][row][mine] >= 0)
                    assert kept[row][mine].tolist() == expected.tolist()
                    some += int(expected.sum())
            assert not kept[batch["document"] < 0].any()
            assert np.array_equal(batch["targets"][kept], only_fills(batch)["targets"][kept])
        assert some


def test_each_task_has_its_number_and_processes_add_up(config):
    """Two processes' shares, added, are what one finds alone; and asking again gives the same."""
    corpus = Corpus(config.data.data_dir)
    model = MeloFormer(config.model, corpus.vocabulary)
    tasks = Tasks(corpus, config.data)
    alone = tasks.evaluate(model, 2, 8)
    assert alone.keys() == set(TASKS) and all(value > 1 for value in alone.values())
    assert Tasks(corpus, config.data).evaluate(model, 2, 8) == alone

    kept = []
    tasks.evaluate(model, 2, 8, rank=0, world_size=2, sum_arrays=lambda *arrays: kept.append(arrays) or list(arrays))

    def add(*arrays):
        return [a + b for a, b in zip(arrays, kept.pop(0))]

    both = tasks.evaluate(model, 2, 8, rank=1, world_size=2, sum_arrays=add)
    assert both == pytest.approx(alone, rel=1e-5)


def test_no_task_is_left_out():
    named = {name for name in vars(DataConfig(data_dir="x")) if name.startswith("defer_")}
    assert named == {f"defer_{task}_probability" for task in TASKS}
