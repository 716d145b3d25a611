"""Rows of two lengths are put into orders in which neighbours are alike, and planned in the best of them."""

from itertools import product

import numpy as np
import pytest

import pair_orders
from hf_mbp.cuts import SortedRows, best_cuts
from hf_mbp.orders import MOST_COMPARED, orders_of
from hf_mbp.plan import Budget, Cost, as_sizes, plan_rows
from marked_table import table_in
from tests.test_plan import partitions, time_of

BUDGET = Budget(max_tokens=1000)


def shuffled_grid(side: int, num_parts: int) -> np.ndarray:
    places = np.array(list(product(range(1, side + 1), repeat=num_parts)))
    return np.random.default_rng(0).permutation(places)


@pytest.mark.parametrize(("side", "num_parts"), [(2, 2), (8, 2), (64, 2), (8, 3), (4, 4)])
def test_neighbours_on_the_curve_are_neighbours_in_space(side: int, num_parts: int) -> None:
    sizes = shuffled_grid(side, num_parts)
    for order in orders_of(sizes)[-2:]:
        steps = np.abs(np.diff(sizes[order], axis=0)).sum(axis=1)
        assert (steps == 1).all()
        assert sorted(order.tolist()) == list(range(len(sizes)))


def test_parts_that_are_alike_or_constant_are_sorted_by_the_curve() -> None:
    lengths = np.random.default_rng(0).integers(1, 400, MOST_COMPARED + 1)
    for sizes in (np.stack([lengths, lengths]), np.stack([lengths, np.full_like(lengths, 37)]), lengths[None]):
        (order,) = orders_of(sizes.T)
        assert lengths[order].tolist() == sorted(lengths.tolist(), reverse=True)


def test_huge_lengths_have_places_on_the_curve() -> None:
    sizes = np.random.default_rng(0).integers(2**40, 2**41, (50, 3))
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders_of(sizes))


@pytest.mark.parametrize("lengths", pair_orders.LENGTHS)
def test_few_groupings_of_few_pairs_are_cheaper(lengths: str) -> None:
    """Compared with all ways to group them."""
    excess = []
    for seed in range(40):
        sizes = pair_orders.LENGTHS[lengths](np.random.default_rng(seed), 6)
        cost = Cost(overhead=float(sizes.sum(axis=1).mean()))
        best = pair_orders.least_time(sizes, cost)
        excess.append(time_of(plan_rows(sizes, pair_orders.BUDGET, cost), sizes, cost) / best - 1)
    assert min(excess) > -1e-9
    assert max(excess) < 0.01


def test_the_simulation_finds_the_best_of_all_groupings() -> None:
    cost = Cost(overhead=40)
    for seed in range(5):
        sizes = np.random.default_rng(seed).integers(1, 50, (6, 2))
        expected = min(time_of(plan, sizes, cost) for plan in partitions(list(range(6))))
        assert pair_orders.least_time(sizes, cost) == pytest.approx(expected)


@pytest.mark.parametrize("num_rows", [512, MOST_COMPARED + 1])
@pytest.mark.parametrize(("lengths", "saved"), [("translation", 0.01), ("summarisation", 0.02), ("independent", 0.15)])
def test_many_pairs_are_cheaper_than_sorted_by_their_sum(num_rows: int, lengths: str, saved: float) -> None:
    cost = pair_orders.cost_on("cuda")
    sizes = pair_orders.LENGTHS[lengths](np.random.default_rng(0), num_rows)
    by_sum = pair_orders.time_in_order(sizes, cost, pair_orders.by_sum(sizes))
    assert time_of(plan_rows(sizes, pair_orders.BUDGET, cost), sizes, cost) < (1 - saved) * by_sum


def test_a_number_that_only_some_orders_allow_is_met() -> None:
    """Two groups within the cap there are by the longer part only, or only along the curve."""
    seen = set()
    for seed in range(300):
        sizes, budget = np.random.default_rng(seed).integers(1, 30, (5, 2)), Budget(max_tokens=90)
        fewest = [len(best_cuts(_rows(sizes[order], budget), 1e6)) - 1 for order in orders_of(sizes)]
        assert len(plan_rows(sizes, budget, Cost(), num_micro_batches=min(fewest))) == min(fewest)
        seen.add(fewest.index(min(fewest)) if len(set(fewest)) > 1 else None)
    assert len(seen) > 2


def _rows(sizes: np.ndarray, budget: Budget) -> SortedRows:
    return SortedRows(sizes=sizes, fits=budget.fits, time_of_row=Cost().of_row)


def test_no_rows_have_an_order() -> None:
    assert [order.tolist() for order in orders_of(as_sizes([]))] == [[]]
    assert plan_rows(np.zeros((0, 2), dtype=np.int64), BUDGET, Cost()) == []


def test_the_page_has_the_tables() -> None:
    lines = table_in(pair_orders.PAGE, "pairs").splitlines()
    assert lines[:2] == pair_orders.HEADER.splitlines()
    assert len(lines) == 2 + len(pair_orders.LENGTHS) * len(pair_orders.DEVICES) * len(pair_orders.NUM_ROWS)
    assert pair_orders.line("translation", "cpu", 64) in lines
    few = table_in(pair_orders.PAGE, "few pairs").splitlines()
    assert few[:2] == pair_orders.FEW_HEADER.splitlines()
    assert pair_orders.few_lines("translation", trials=2)[0].startswith("| translation | the sum | ")
