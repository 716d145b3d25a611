"""Cuts are the best of all; compared with the plain dynamic programme, which tries every start for every end."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mbp import cuts as cuts_module
from hf_mbp.cuts import CLOSE_ENOUGH, GOOD_ENOUGH, SortedRows, best_cuts, best_cuts_into
from hf_mbp.plan import Budget, Cost
from tests.examples import examples

quick = examples(80)

numbers_of_rows = st.sampled_from([1, 2, 3, 7, 12, 40, 65, 130, 300])
costs = st.builds(
    Cost,
    overhead=st.sampled_from([0.0, 1.0, 32.0, 700.0, 1e5]),
    cell=st.sampled_from([0.0, 0.5, 1.0, 1.0]),
    attention=st.sampled_from([0.0, 0.003, 1.0]),
    floor=st.sampled_from([0.0, 0.0, 3.0, 60.0, 1500.0]),
)
budgets = st.builds(
    Budget,
    max_tokens=st.none() | st.integers(1, 20_000),
    max_bytes=st.none() | st.floats(1, 1e5),
    bytes_fixed=st.sampled_from([0.0, 0.0, 5e3]),
    bytes_per_cell=st.sampled_from([0.0, 1.5, 7.0]),
    bytes_per_pair=st.sampled_from([0.0, 0.1]),
)


def make_rows(number: int, num_parts: int, longest: int, seed: int, budget: Budget, cost: Cost) -> SortedRows:
    sizes = np.random.default_rng(seed).integers(1, longest + 1, (number, num_parts))
    if num_parts == 1 or seed % 2:  # those of several parts may have any order
        sizes = sizes[np.argsort(-sizes.sum(axis=1), kind="stable")]
    return SortedRows(sizes=sizes, fits=budget.fits, time_of_row=cost.of_row, floor=cost.floor)


rows_with_cost = st.builds(
    lambda number, num_parts, longest, seed, budget, cost: (
        make_rows(number, num_parts, longest, seed, budget, cost),
        budget,
        cost,
    ),
    numbers_of_rows,
    st.integers(1, 3),
    st.sampled_from([1, 3, 20, 500]),
    st.integers(0, 10**6),
    budgets,
    costs,
)


def costs_of_groups(rows: SortedRows, budget: Budget, cost: Cost) -> np.ndarray:
    """What each group `[start, end)` costs, written out; infinite where it is not allowed."""
    num_rows = len(rows)
    table = np.full((num_rows + 1, num_rows + 1), np.inf)
    for start in range(num_rows):
        width = np.maximum.accumulate(rows.sizes[start:], axis=0).sum(axis=1)
        number = np.arange(1, len(width) + 1)
        work = number * (cost.cell * width + cost.attention * width**2)
        allowed = np.asarray(budget.fits(number, width)) | (number == 1)
        table[start, start + 1 :] = np.where(allowed, cost.overhead + np.maximum(cost.floor, work), np.inf)
    return table


def least_cost(table: np.ndarray) -> float:
    best = np.zeros(len(table))
    for end in range(1, len(table)):
        best[end] = (best[:end] + table[:end, end]).min()
    return float(best[-1])


def least_costs_by_count(table: np.ndarray, most: int) -> list[float]:
    best, least = np.where(np.arange(len(table)) == 0, 0.0, np.inf), []
    for _ in range(most):
        best = (best[:, None] + table).min(axis=0)
        least.append(float(best[-1]))
    return least


def cost_of_cuts(cuts: list[int], table: np.ndarray) -> float:
    assert cuts[0] == 0
    assert cuts[-1] == len(table) - 1
    return float(sum(table[start, end] for start, end in pairwise(cuts)))


@given(rows_with_cost)
@quick
def test_no_other_cuts_are_cheaper(case: tuple[SortedRows, Budget, Cost]) -> None:
    rows, budget, cost = case
    table = costs_of_groups(rows, budget, cost)
    assert cost_of_cuts(best_cuts(rows, cost.overhead), table) == pytest.approx(least_cost(table), rel=1e-9)


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("cost", [Cost(), Cost(overhead=5000, attention=0.001), Cost(overhead=40, floor=4000)])
@pytest.mark.parametrize("max_tokens", [600, 4096, 10**6])
def test_no_other_cuts_of_many_rows_are_cheaper(num_parts: int, cost: Cost, max_tokens: int) -> None:
    budget = Budget(max_tokens=max_tokens)
    sizes = np.clip(np.random.default_rng(5).lognormal(4.2, 0.8, (600, num_parts)), 8, 512).astype(np.int64)
    sizes = sizes[np.argsort(-sizes.sum(axis=1), kind="stable")]
    rows = SortedRows(sizes=sizes, fits=budget.fits, time_of_row=cost.of_row, floor=cost.floor)
    table = costs_of_groups(rows, budget, cost)
    cuts = best_cuts(rows, cost.overhead)
    assert len(cuts) > 3
    assert cost_of_cuts(cuts, table) == pytest.approx(least_cost(table), rel=1e-9)


def test_both_searches_agree_about_rows_of_one_length() -> None:
    for seed in range(40):
        cost = Cost(overhead=[0, 5, 400][seed % 3], floor=[0, 90][seed % 2])
        budget = Budget(max_tokens=[50, 900, 9000][seed // 2 % 3])
        one = make_rows(200, 1, 60, seed, budget, cost)
        two = SortedRows(
            sizes=np.column_stack([one.sizes, np.zeros_like(one.sizes)]),
            fits=one.fits,
            time_of_row=one.time_of_row,
            floor=one.floor,
        )
        table = costs_of_groups(one, budget, cost)
        costs = [cost_of_cuts(best_cuts(rows, cost.overhead), table) for rows in (one, two)]
        assert costs[0] == pytest.approx(costs[1], rel=1e-12)


# An exact number of groups


@given(rows_with_cost, st.data())
@quick
def test_an_exact_number_costs_hardly_more_than_the_least(
    case: tuple[SortedRows, Budget, Cost], data: st.DataObject
) -> None:
    rows, budget, cost = case
    count = data.draw(st.integers(1, min(len(rows), 60)))
    table = costs_of_groups(rows, budget, cost)
    least = least_costs_by_count(table, count)[-1]
    cuts = best_cuts_into(rows, count, cost.overhead)
    if np.isinf(least):
        assert cuts is None
        return
    assert cuts is not None
    assert len(cuts) == count + 1
    may_exceed = GOOD_ENOUGH if rows.sizes.shape[1] == 1 else CLOSE_ENOUGH
    assert least * (1 - 1e-9) <= cost_of_cuts(cuts, table) <= least * may_exceed * (1 + 1e-9)


def test_each_number_from_the_fewest_to_all_rows_is_met() -> None:
    for num_parts in (1, 2):
        cost, budget = Cost(overhead=20), Budget(max_tokens=300)
        rows = make_rows(90, num_parts, 40, 3, budget, cost)
        table = costs_of_groups(rows, budget, cost)
        least = least_costs_by_count(table, 90)
        fewest = int(np.isfinite(least).argmax()) + 1
        assert fewest > 1
        assert best_cuts_into(rows, fewest - 1, cost.overhead) is None
        for count in range(fewest, 91):
            cuts = best_cuts_into(rows, count, cost.overhead)
            assert cuts is not None
            assert len(cuts) == count + 1
            assert cost_of_cuts(cuts, table) <= least[count - 1] * CLOSE_ENOUGH


def test_without_allowance_rows_of_one_length_take_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two plans are joined to is the best itself; nothing is left to the slow search."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the slow search was needed")

    monkeypatch.setattr(cuts_module, "GOOD_ENOUGH", 1 + 1e-9)
    monkeypatch.setattr(cuts_module, "CLOSE_ENOUGH", 1 + 2e-9)
    monkeypatch.setattr(cuts_module, "_best_cuts_by_count", refuse)
    for seed in range(12):
        cost, budget = Cost(overhead=30, floor=[0, 100][seed % 2]), Budget(max_tokens=[80, 700, 9000][seed % 3])
        rows = make_rows(30, 1, [2, 9, 60][seed // 3 % 3], seed, budget, cost)
        table = costs_of_groups(rows, budget, cost)
        for count, least in enumerate(least_costs_by_count(table, 30), start=1):
            cuts = best_cuts_into(rows, count, cost.overhead)
            assert (cuts is None) == np.isinf(least)
            if cuts is not None:
                assert cost_of_cuts(cuts, table) == pytest.approx(least, rel=1e-8)


def test_without_allowance_rows_of_two_lengths_take_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the slow search stands in where no overhead leads to the number."""
    slow, calls = cuts_module._best_cuts_by_count, []

    def noted(rows: SortedRows, count: int) -> list[int]:
        calls.append(count)
        return slow(rows, count)

    monkeypatch.setattr(cuts_module, "GOOD_ENOUGH", 1.0)
    monkeypatch.setattr(cuts_module, "CLOSE_ENOUGH", 1 + 1e-9)
    monkeypatch.setattr(cuts_module, "_best_cuts_by_count", noted)
    for seed in range(6):
        cost, budget = Cost(overhead=30), Budget(max_tokens=[200, 9000][seed % 2])
        rows = make_rows(30, 2, 20, seed, budget, cost)
        table = costs_of_groups(rows, budget, cost)
        for count, least in enumerate(least_costs_by_count(table, 30), start=1):
            cuts = best_cuts_into(rows, count, cost.overhead)
            assert (cuts is None) == np.isinf(least)
            if cuts is not None:
                assert len(cuts) == count + 1
                assert cost_of_cuts(cuts, table) == pytest.approx(least, rel=1e-8)
    assert calls


# Work and memory


def count_compared(rows: SortedRows, overhead: float) -> int:
    """Groups whose time is computed."""
    seen = 0

    def time_of_row(width: np.ndarray) -> np.ndarray:
        nonlocal seen
        seen += width.size
        return rows.time_of_row(width)

    best_cuts(SortedRows(sizes=rows.sizes, fits=rows.fits, time_of_row=time_of_row, floor=rows.floor), overhead)
    return seen


def test_few_of_all_groups_are_looked_at() -> None:
    """All would be 2 million; memory grows with the groups of a block, and so with the rows."""
    budget, cost = Budget(max_tokens=10**6), Cost()
    assert count_compared(make_rows(2000, 1, 500, 0, budget, cost), cost.overhead) == 2000
    assert count_compared(make_rows(2000, 2, 500, 0, budget, cost), cost.overhead) < 300_000
