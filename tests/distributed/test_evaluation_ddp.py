"""Two processes evaluate in micro-batches, and get what stock gets in as many processes."""

from typing import Any

import pytest
import torch

from tests.distributed.evaluation_worker import HEADS, TRL
from tests.distributed.launching import launch
from tests.test_evaluation import BUDGET, TIMES


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return launch("evaluation_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", HEADS)
def test_predictions_and_metrics_are_those_of_stock(name: str, ranks: list[Any]) -> None:
    for rank in ranks:
        whole, split = rank["heads"][f"{name} Trainer"], rank["heads"][f"{name} MBPTrainer"]
        names = [key for key in whole["metrics"] if not key.endswith(TIMES)]
        assert {key: split["metrics"][key] for key in names} == {
            key: pytest.approx(whole["metrics"][key], rel=1e-6) for key in names
        }
        assert torch.equal(split["labels"], whole["labels"])
        assert len(whole["labels"]) == 29
        assert split["predictions"].shape == whole["predictions"].shape
        counted = whole["labels"] != -100
        if whole["predictions"].dtype == torch.int64:  # picked at a token, compared with the label of the next one
            counted[:, :-1] = counted[:, 1:].clone()
            counted[:, -1] = False
        torch.testing.assert_close(split["predictions"][counted], whole["predictions"][counted], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_ranks_run_equally_often(name: str, ranks: list[Any]) -> None:
    """The short rows of rank 1 would need one micro-batch."""
    busy, idle = (rank["heads"][f"{name} MBPTrainer"]["shapes"] for rank in ranks)
    assert len(busy) == len(idle) > 8
    assert max(rows * width for rows, width in busy) <= BUDGET


@pytest.mark.parametrize("name", TRL)
def test_what_trl_logs_is_what_it_logs_unsplit(name: str, ranks: list[Any]) -> None:
    for rank in ranks:
        whole, split = rank["trl"][f"{name} False"], rank["trl"][f"{name} True"]
        names = [key for key in whole if "per_second" not in key and "time" not in key]
        assert {key: split[key] for key in names} == {
            key: pytest.approx(whole[key], rel=1e-6, abs=1e-7) for key in names
        }
