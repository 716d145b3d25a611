"""The check before the first step when FSDP2 shards the model: all ranks run it together, each on its own rows."""

from typing import Any

import pytest
import torch

from tests.distributed.launching import launch


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("check_worker", tmp_path_factory.mktemp("ranks"))


def test_it_compares_sharded_gradients(ranks: list[Any]) -> None:
    errors = [rank["report"]["error"] for rank in ranks]
    assert errors[0] == errors[1]
    assert 0 < errors[0] < 1e-12  # in float64; 0 would be a comparison of something with itself
    for rank in ranks:
        whole, split = rank["report"]["losses"]
        assert whole == pytest.approx(split, rel=1e-12)


def test_what_is_not_exact_is_refused_on_all_ranks(ranks: list[Any]) -> None:
    for rank in ranks:
        assert "Splitting the batch changes the gradient" in rank["refusal"]
        assert "in one process" in rank["refusal"]


def test_a_rank_with_a_single_row_keeps_none_from_comparing(ranks: list[Any]) -> None:
    assert [rank["long row"][0] for rank in ranks] == [1 + 8, 7]  # the one that it was dealt, and the first of the data
    assert all(rank["long row"][1].startswith("Checked to be exact") for rank in ranks)


def test_it_leaves_no_trace(ranks: list[Any]) -> None:
    """Of dropout either, whose random numbers go on as if nothing had been."""
    for rank in ranks:
        assert all(torch.equal(rank["checked"][name], weight) for name, weight in rank["unchecked"].items())
