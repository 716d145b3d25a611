"""What holds for all tests."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def imports_are_no_garbage() -> Iterator[None]:
    """Trainers begin by collecting garbage, and so does each recovery: what is imported need not be looked at.

    That takes a quarter of the time of tests that train for an instant.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
