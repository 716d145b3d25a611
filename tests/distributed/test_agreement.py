"""What ranks have to agree on, and what they must not have in common."""

from typing import Any

import pytest
import torch

from tests.distributed.agreement_worker import FREE
from tests.distributed.launching import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("agreement_worker", tmp_path_factory.mktemp("ranks"))


def test_all_have_the_budget_of_the_one_with_the_least_memory(ranks: list[Any]) -> None:
    budgets = [rank["budget"] for rank in ranks]
    assert budgets[0]["max_bytes"] == budgets[1]["max_bytes"] < min(FREE)


def test_each_draws_random_masks_of_its_own(ranks: list[Any]) -> None:
    one, other = (rank["labels"] for rank in ranks)
    assert [part.shape for part in one] == [part.shape for part in other]
    assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
