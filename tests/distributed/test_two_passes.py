"""On two processes the loss compares the rows of both, and the gradient is that of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import two_pass_worker
from tests.distributed.launching import launch
from tests.helpers import relative_error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    """The outcomes on each of two ranks, from one launch."""
    return launch("two_pass_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("name", "retries"), [("plain", 0), ("first", 1), ("second", 1)])
def test_gradients_are_those_of_one_process(
    name: str, retries: int, ranks: list[dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    whole = two_pass_worker.outcome(tmp_path, "plain")
    assert len(whole["gradients"]) == two_pass_worker.STEPS
    for rank in ranks:
        assert rank[name]["retries"] == retries
        assert rank[name]["losses"] == pytest.approx(whole["losses"], rel=1e-6)
        for own, expected in zip(rank[name]["gradients"], whole["gradients"], strict=True):
            assert relative_error(expected, own) < 1e-10
