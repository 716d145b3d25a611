"""Rows of two lengths change to groups that suit them better, one at a time, and only where that saves time."""

from itertools import product
from typing import Any

import numpy as np
import pytest

import pair_orders
from hf_mbp.moves import MOST_MOVED, better_groups
from hf_mbp.plan import Budget, Cost, plan_rows
from tests.test_plan import time_of

CAP = 160


def allowed_time(rows: Any, width: Any) -> Any:
    """Of groups within the cap, and of single rows."""
    return np.where((rows == 1) | (rows * width <= CAP), 20.0 + rows * width, np.inf)


def total(groups: list[list[int]], sizes: np.ndarray) -> float:
    return sum(float(allowed_time(len(group), int(sizes[group].max(axis=0).sum()))) for group in groups)


def all_moves(groups: list[list[int]], *, keeps_number: bool) -> list[list[list[int]]]:
    """The groups after each single move, by hand."""
    moved = []
    rows = [row for group in groups for row in group]
    for row, target in product(rows, range(len(groups) + (not keeps_number))):
        after = [[other for other in group if other != row] for group in [*groups, []]]
        after[target].append(row)
        after = [group for group in after if group]
        if not keeps_number or len(after) == len(groups):
            moved.append(after)
    return moved


@pytest.mark.parametrize("keeps_number", [False, True])
@pytest.mark.parametrize("num_parts", [2, 3])
def test_no_single_move_that_is_left_saves_time(num_parts: int, keeps_number: bool) -> None:
    start = [[0, 1], [2, 3], [4, 5], [6], [7], [8]]
    num_changed = 0
    for seed in range(20):
        sizes = np.random.default_rng(seed).integers(1, 25, (9, num_parts))
        after = better_groups(start, sizes, allowed_time, keeps_number=keeps_number)
        assert sorted(row for group in after for row in group) == list(range(9))
        assert not keeps_number or len(after) == len(start)
        least = min(total(plan, sizes) for plan in all_moves(after, keeps_number=keeps_number))
        assert total(after, sizes) <= min(total(start, sizes), least) + 1e-6
        num_changed += after != start
    assert num_changed > 10


def test_more_rows_than_moves_are_looked_for_stay_where_they_are() -> None:
    sizes = np.random.default_rng(0).integers(1, 25, (MOST_MOVED + 1, 2))
    one_by_one = [[row] for row in range(len(sizes))]
    assert better_groups(one_by_one, sizes, allowed_time, keeps_number=False) is one_by_one
    assert len(better_groups(one_by_one[:-1], sizes[:-1], allowed_time, keeps_number=False)) < MOST_MOVED


def test_plans_of_unrelated_pairs_are_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    cost, budget = pair_orders.cost_on("cuda"), Budget(max_tokens=4096)
    sizes = pair_orders.independent(np.random.default_rng(0), 64)
    for count in (None, 14):
        planned = time_of(plan_rows(sizes, budget, cost, num_micro_batches=count), sizes, cost)
        with monkeypatch.context() as patch:
            patch.setattr("hf_mbp.plan.better_groups", lambda groups, *args, **options: groups)
            cut = time_of(plan_rows(sizes, budget, cost, num_micro_batches=count), sizes, cost)
        assert planned < cut


def test_rows_of_one_length_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cuts are the best there are."""
    monkeypatch.delattr("hf_mbp.plan.better_groups")
    sizes = np.random.default_rng(0).integers(1, 400, (64, 1))
    assert sum(map(len, plan_rows(sizes, Budget(max_tokens=4096), Cost()))) == 64
