"""One thread here as well: on a busy machine two that wait for each other are forty times slower."""

from tests.training.conftest import one_thread  # noqa: F401
