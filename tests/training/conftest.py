"""One small corpus for all of these tests, and one thread."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meloformer.config import Config
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_config(corpus_dir, tmp_path):
    """make_config("run", max_steps=6, ..): small_config with its run in tmp_path."""

    def make(run: str = "run", **given) -> Config:
        return small_config(corpus_dir, tmp_path / run, **given)

    return make


@pytest.fixture(autouse=True)
def one_thread():
    """The machine's cores are shared, and the order of sums depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
