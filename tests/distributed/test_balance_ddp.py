"""Two processes whose rows are dealt by their cost train as one process does, and the slower one has less to do."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import balance_worker
from tests.distributed.launching import launch
from tests.helpers import relative_error


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    """The outcomes on each of two ranks, from one launch."""
    return launch("balance_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("balance", [False, True])
def test_weights_are_those_of_one_process(
    balance: bool, accumulation: int, ranks: list[dict[Any, dict[str, Any]]], tmp_path: Path
) -> None:
    whole = balance_worker.outcome(tmp_path, balance=balance, accumulation=1)
    own = [rank[balance, accumulation] for rank in ranks]
    for rank in own:
        assert relative_error(whole["weights"], rank["weights"]) < 1e-6
    together = [sorted(one + other) for one, other in zip(*(rank["lengths"] for rank in own), strict=True)]
    assert together == [sorted(step) for step in whole["lengths"]]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_slower_rank_costs_less(accumulation: int, ranks: list[dict[Any, dict[str, Any]]]) -> None:
    def most_cells(balance: bool) -> int:
        """Padded cells of the rank that has more, of all steps."""
        steps = zip(*(rank[balance, accumulation]["lengths"] for rank in ranks), strict=True)
        return sum(max(len(lengths) * max(lengths) for lengths in step) for step in steps)

    assert most_cells(balance=True) < 0.6 * most_cells(balance=False)


def test_a_rank_with_a_single_row_checks_exactness_on_others(ranks: list[dict[Any, dict[str, Any]]]) -> None:
    own = [rank["long row"] for rank in ranks]
    assert [rank["rows"] for rank in own] == [1, 15]
    for rank in own:
        (said,) = rank["check"]
        assert said.startswith("Checked to be exact")
