"""One small corpus for the whole room."""

import pytest

from tests.data.music import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """24 pieces of 12 bars in 3 shards."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), shard_size=10)
