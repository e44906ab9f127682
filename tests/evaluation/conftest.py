"""A finished run to evaluate."""

from __future__ import annotations

import pytest
import torch

from meloformer.training.loop import train
from tests.training.small import small_config, write_corpus


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a finished run of two steps."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(write_corpus(folder), folder / "run", max_steps=2)
    train(config)
    return config
