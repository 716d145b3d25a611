"""50 steps of AdamW end at the weights of a plain loop, for any budget, accumulation and number of processes."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import launch
from tests.distributed.trajectories import (
    BUDGETS,
    CELLS,
    MAX_NORM,
    STEPS,
    all_rows,
    by_plain_loop,
    by_trainer,
    difference,
    model_in_float32,
)

TOLERANCE = 1e-6
"""Absolute, for weights of the order of 1 in float32, which rounds them at 6e-8."""

plain = cache(by_plain_loop)


def assert_same_trajectory(outcome: dict[str, Any]) -> None:
    assert len(outcome["norms"]) == STEPS
    assert outcome["norms"] == pytest.approx(plain()["norms"], rel=1e-5)
    assert difference(plain(), outcome) < TOLERANCE


def test_the_plain_loop_is_worth_comparing_with() -> None:
    """Some steps are clipped and some are not, weights move, and budgets split steps differently."""
    clipped = sum(norm > MAX_NORM for norm in plain()["norms"])
    assert 5 < clipped < STEPS - 5
    untrained = {"weights": {name: weight.detach() for name, weight in model_in_float32().named_parameters()}}
    assert difference(untrained, plain()) > 1e4 * TOLERANCE
    longest = max(len(row["input_ids"]) for row in all_rows())
    assert BUDGETS[0] < longest < BUDGETS[1] < 16 * longest < BUDGETS[2]


@pytest.mark.parametrize(("accumulation", "budget"), CELLS)
@pytest.mark.filterwarnings("ignore:A row of 30 tokens is longer than the budget of 24:UserWarning")
def test_one_process(accumulation: int, budget: int, tmp_path: Path) -> None:
    assert_same_trajectory(by_trainer(tmp_path, 1, accumulation, budget))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes(processes: int, tmp_path: Path, subtests: pytest.Subtests) -> None:
    ranks = launch("trajectory_worker", tmp_path, ranks=processes)
    for cell in CELLS:
        with subtests.test(f"accumulation {cell[0]}, budget {cell[1]}"):
            for rank in ranks:
                assert_same_trajectory(rank[cell])
