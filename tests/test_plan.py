"""Plans are optimal, complete and within the cap; compared with a search through all plans there are."""

import warnings
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mbp import plan_micro_batches
from hf_mbp.orders import orders_of
from hf_mbp.plan import Budget, Cost, Layout, as_sizes, plan_rows, round_up
from tests.examples import examples

quick = examples(60)

COSTS = [
    Cost(),
    Cost(overhead=0),
    Cost(overhead=7.5, cell=0.5, attention=0.25),
    Cost(overhead=1000),
    Cost(overhead=2, floor=15),
]
short_lengths = st.lists(st.integers(0, 12), min_size=1, max_size=6)
long_lengths = st.lists(st.integers(0, 600), max_size=120)
pairs = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put the items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for index, group in enumerate(smaller):
            yield [*smaller[:index], [first, *group], *smaller[index + 1 :]]


def contiguous_groups(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut the items, in their order."""
    for cuts in range(2 ** (len(items) - 1)):
        ends = [end for end in range(1, len(items)) if cuts >> (end - 1) & 1]
        yield [items[start:end] for start, end in pairwise([0, *ends, len(items)])]


def width_of(group: list[int], sizes: np.ndarray) -> int:
    return max(1, int(sizes[group].max(axis=0).sum()))


def is_allowed(group: list[int], sizes: np.ndarray, budget: Budget) -> bool:
    rows, width = len(group), width_of(group, sizes)
    in_tokens = budget.max_tokens is None or rows * width <= budget.max_tokens
    needed = rows * (budget.bytes_per_cell * width + budget.bytes_per_pair * width**2)
    return rows == 1 or (in_tokens and (budget.max_bytes is None or needed <= budget.max_bytes))


def time_of(plan: list[list[int]], sizes: np.ndarray, cost: Cost) -> float:
    """The modelled time, written out."""
    shapes = [(len(group), width_of(group, sizes)) for group in plan]
    return sum(cost.overhead + max(cost.floor, r * w * cost.cell + r * w * w * cost.attention) for r, w in shapes)


def cheapest(plans: Iterator[list[list[int]]], sizes: np.ndarray, budget: Budget, cost: Cost) -> dict[int, float]:
    """The least time of the plans within the budget, for each number of micro-batches."""
    best: dict[int, float] = {}
    for plan in plans:
        if all(is_allowed(group, sizes, budget) for group in plan):
            best[len(plan)] = min(best.get(len(plan), np.inf), time_of(plan, sizes, cost))
    return best


def quiet_plan(lengths: Sequence[Any], max_tokens: int, **kwargs: Any) -> list[list[int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plan_micro_batches(lengths, max_tokens, **kwargs)


# Optimal


@pytest.mark.parametrize("cost", COSTS)
@given(lengths=short_lengths, max_tokens=st.integers(1, 50))
@quick
def test_no_partition_is_cheaper(cost: Cost, lengths: list[int], max_tokens: int) -> None:
    sizes, budget = as_sizes(lengths), Budget(max_tokens=max_tokens)
    best = cheapest(partitions(list(range(len(lengths)))), sizes, budget, cost)
    plan = plan_rows(sizes, budget, cost)
    assert time_of(plan, sizes, cost) == pytest.approx(min(best.values()))


@pytest.mark.parametrize("cost", COSTS)
@given(lengths=short_lengths, max_tokens=st.integers(1, 50))
@quick
def test_no_partition_into_as_many_is_cheaper(cost: Cost, lengths: list[int], max_tokens: int) -> None:
    sizes, budget = as_sizes(lengths), Budget(max_tokens=max_tokens)
    best = cheapest(partitions(list(range(len(lengths)))), sizes, budget, cost)
    for count in range(1, len(lengths) + 1):
        if count not in best:
            with pytest.raises(ValueError, match=f"num_micro_batches={count} is too few: {len(lengths)} rows"):
                plan_rows(sizes, budget, cost, num_micro_batches=count)
            continue
        plan = plan_rows(sizes, budget, cost, num_micro_batches=count)
        assert len(plan) == count
        assert best[count] <= time_of(plan, sizes, cost) * (1 + 1e-9) <= best[count] * 1.001 * (1 + 1e-9)


def test_no_partition_of_seven_rows_is_cheaper() -> None:
    sizes, budget = as_sizes([9, 1, 30, 8, 8, 2, 29]), Budget(max_tokens=64)
    for cost in COSTS:
        best = cheapest(partitions(list(range(7))), sizes, budget, cost)
        assert time_of(plan_rows(sizes, budget, cost), sizes, cost) == pytest.approx(min(best.values()))


@pytest.mark.parametrize("cost", COSTS)
@given(
    lengths=short_lengths,
    max_bytes=st.integers(1, 3000),
    per_cell=st.sampled_from([0.0, 1.0, 7.5]),
    per_pair=st.sampled_from([0.0, 0.5, 4.0]),
    max_tokens=st.none() | st.integers(1, 50),
)
@quick
def test_no_partition_within_the_bytes_is_cheaper(
    cost: Cost, lengths: list[int], max_bytes: int, per_cell: float, per_pair: float, max_tokens: int | None
) -> None:
    sizes = as_sizes(lengths)
    budget = Budget(max_tokens=max_tokens, max_bytes=max_bytes, bytes_per_cell=per_cell, bytes_per_pair=per_pair)
    best = cheapest(partitions(list(range(len(lengths)))), sizes, budget, cost)
    plan = plan_rows(sizes, budget, cost)
    assert all(is_allowed(group, sizes, budget) for group in plan)
    assert time_of(plan, sizes, cost) == pytest.approx(min(best.values()))


@pytest.mark.parametrize("cost", COSTS)
@given(lengths=pairs, max_tokens=st.integers(1, 80))
@quick
def test_no_cut_of_pairs_sorted_by_the_longer_part_is_cheaper(
    cost: Cost, lengths: list[tuple[int, int]], max_tokens: int
) -> None:
    sizes, budget = as_sizes(lengths), Budget(max_tokens=max_tokens)
    order = sorted(range(len(lengths)), key=lambda index: (-int(sizes[index].max()), -int(sizes[index].sum())))
    best = cheapest(contiguous_groups(order), sizes, budget, cost)
    plan = plan_rows(sizes, budget, cost)
    assert all(is_allowed(group, sizes, budget) for group in plan)
    assert time_of(plan, sizes, cost) <= min(best.values()) * (1 + 1e-9)
    for count, least in best.items():
        exact = plan_rows(sizes, budget, cost, num_micro_batches=count)
        assert len(exact) == count
        assert all(is_allowed(group, sizes, budget) for group in exact)
        assert time_of(exact, sizes, cost) <= least * 1.01 * (1 + 1e-9)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("num_parts", [1, 2])
def test_no_cut_is_cheaper_in_widths_that_the_collator_rounds_up(cost: Cost, multiple: int, num_parts: int) -> None:
    """Rows are padded to multiples, as tensor cores or compiled shapes want them, and planned as they are padded."""
    for seed in range(8):
        lengths = np.random.default_rng(seed).integers(1, 200, (9, num_parts))
        rounded, budget = round_up(lengths, multiple), Budget(max_tokens=900)

        def padded_time(plan: list[list[int]], lengths: np.ndarray = lengths) -> float:
            """The widths written out: each part padded to the next multiple of its longest row."""
            widths = [
                sum(-(-int(part) // multiple) * multiple for part in lengths[group].max(axis=0)) for group in plan
            ]
            works = [len(g) * (w * cost.cell + w * w * cost.attention) for g, w in zip(plan, widths, strict=True)]
            assert all(len(g) == 1 or len(g) * w <= 900 for g, w in zip(plan, widths, strict=True))
            return sum(cost.overhead + max(cost.floor, work) for work in works)

        plans = chain.from_iterable(contiguous_groups(order.tolist()) for order in orders_of(rounded))
        best = cheapest(plans, rounded, budget, cost)
        time, least = padded_time(plan_rows(rounded, budget, cost)), min(best.values())
        assert time == pytest.approx(least) or (num_parts == 2 and time < least)


def test_rounded_widths_are_planned_otherwise_than_lengths() -> None:
    """Where rows end in one bucket there is nothing to gain by splitting them."""
    sizes, budget, cost = as_sizes([64, 40, 33]), Budget(max_tokens=1000), Cost(overhead=5)
    assert plan_rows(sizes, budget, cost) == [[0], [1], [2]]
    assert plan_rows(round_up(sizes, 64), budget, cost) == [[0, 1, 2]]


def test_public_function_uses_the_default_cost() -> None:
    lengths = [30, 29, 28, 4, 3, 3, 2]
    sizes, budget = as_sizes(lengths), Budget(max_tokens=1000)
    best = cheapest(partitions(list(range(7))), sizes, budget, Cost())
    plan = plan_micro_batches(lengths, 1000)
    assert time_of(plan, sizes, Cost()) == pytest.approx(min(best.values()))
    assert plan == [[0, 1, 2], [3, 4, 5, 6]]


def test_overhead_decides_between_padding_and_splitting() -> None:
    sizes, budget = as_sizes([10, 5]), Budget(max_tokens=100)
    assert plan_rows(sizes, budget, Cost(overhead=4.9)) == [[0], [1]]
    assert plan_rows(sizes, budget, Cost(overhead=5.1)) == [[0, 1]]


def test_attention_makes_width_dearer() -> None:
    sizes, budget = as_sizes([10, 5]), Budget(max_tokens=100)
    assert plan_rows(sizes, budget, Cost(overhead=50)) == [[0, 1]]
    assert plan_rows(sizes, budget, Cost(overhead=50, attention=1)) == [[0], [1]]


def test_rows_below_the_floor_run_together() -> None:
    sizes, budget = as_sizes([10, 5, 5, 1]), Budget(max_tokens=100)
    assert plan_rows(sizes, budget, Cost(overhead=0)) == [[0], [1, 2], [3]]
    assert plan_rows(sizes, budget, Cost(overhead=0, floor=30)) == [[0, 1, 2, 3]]
    assert plan_rows(sizes, budget, Cost(overhead=0, floor=10)) == [[0], [1, 2, 3]]


# Complete, within the cap, in order


@given(lengths=long_lengths, max_tokens=st.integers(1, 4000))
@quick
def test_every_index_exactly_once(lengths: list[int], max_tokens: int) -> None:
    plan = quiet_plan(lengths, max_tokens)
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    assert all(plan)


@given(lengths=long_lengths, max_tokens=st.integers(1, 4000))
@quick
def test_cap_is_respected_but_for_a_single_longer_row(lengths: list[int], max_tokens: int) -> None:
    for group in quiet_plan(lengths, max_tokens):
        width = max(1, *(lengths[index] for index in group)) if len(group) > 1 else lengths[group[0]]
        assert len(group) * width <= max_tokens or (len(group) == 1 and width > max_tokens)


@given(lengths=long_lengths, max_tokens=st.integers(1, 4000))
@quick
def test_longest_first(lengths: list[int], max_tokens: int) -> None:
    planned = [lengths[index] for group in quiet_plan(lengths, max_tokens) for index in group]
    assert planned == sorted(lengths, reverse=True)


@given(lengths=long_lengths, max_tokens=st.integers(1, 4000))
@quick
def test_same_lengths_give_the_same_plan(lengths: list[int], max_tokens: int) -> None:
    assert quiet_plan(lengths, max_tokens) == quiet_plan(np.array(lengths, dtype=np.int64), max_tokens)


@given(lengths=long_lengths.filter(bool), max_tokens=st.integers(1, 4000), data=st.data())
@quick
def test_exactly_as_many_as_asked_for(lengths: list[int], max_tokens: int, data: st.DataObject) -> None:
    fewest_possible = len(quiet_plan(lengths, max_tokens))
    count = data.draw(st.integers(fewest_possible, len(lengths)))
    plan = quiet_plan(lengths, max_tokens, num_micro_batches=count)
    assert len(plan) == count
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= max_tokens for group in plan)


@given(lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), max_size=80), cap=st.integers(1, 4000))
@quick
def test_pairs_are_complete_within_the_cap_and_longest_first(lengths: list[tuple[int, int]], cap: int) -> None:
    plan = quiet_plan(lengths, cap)
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    for group in plan:
        width = max(lengths[i][0] for i in group) + max(lengths[i][1] for i in group)
        assert len(group) == 1 or len(group) * width <= cap
    widths = [width_of(group, as_sizes(lengths)) for group in plan]
    assert widths == sorted(widths, reverse=True)


def test_no_more_cells_are_put_together_than_the_cost_holds_for() -> None:
    cost = Cost(overhead=1e6, most_cells=100.0)
    plan = plan_rows(as_sizes([20] * 12 + [150, 7]), Budget(), cost)
    shapes = [(len(group), max(([20] * 12 + [150, 7])[index] for index in group)) for group in plan]
    assert shapes[0] == (1, 150), "a row alone is run whatever it costs"
    assert all(rows * width <= 100 for rows, width in shapes[1:])
    assert len(plan) == 4
    assert len(plan_rows(as_sizes([20] * 12), Budget(), Cost(overhead=1e6))) == 1


def test_equal_rows_keep_their_order() -> None:
    assert plan_micro_batches([5] * 7, max_tokens=1000) == [[0, 1, 2, 3, 4, 5, 6]]


def test_no_rows_no_micro_batches() -> None:
    assert plan_micro_batches([], max_tokens=8) == []


def test_an_empty_row_fills_a_cell() -> None:
    plan = plan_micro_batches([0] * 10, max_tokens=4)
    assert max(map(len, plan)) <= 4
    assert plan_micro_batches([(0, 0)] * 5, max_tokens=5, num_micro_batches=1) == [[0, 1, 2, 3, 4]]


def test_each_row_alone_when_as_many_as_rows_are_asked_for() -> None:
    assert plan_micro_batches([4, 9, 1], max_tokens=100, num_micro_batches=3) == [[1], [0], [2]]


# Rows that are too long


def test_one_warning_names_the_length_of_the_longest_row() -> None:
    with pytest.warns(UserWarning, match="A row of 1,200 tokens is longer than the budget of 100 tokens") as record:
        plan = plan_micro_batches([3, 1200, 900, 4], max_tokens=100)
    (warning,) = record
    assert warning.filename == __file__
    assert plan == [[1], [2], [3, 0]]


def test_both_parts_of_a_pair_count_for_its_length() -> None:
    with pytest.warns(UserWarning, match="A row of 110 tokens"):
        assert plan_micro_batches([(60, 50), (3, 3)], max_tokens=100) == [[0], [1]]


def test_a_row_as_long_as_the_cap_is_not_too_long() -> None:
    assert plan_micro_batches([100, 1], max_tokens=100) == [[0], [1]]


# Mistakes


@pytest.mark.parametrize("value", [0, -5, 1.5, "100", None, True])
def test_max_tokens_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match=r"max_tokens must be a positive integer.*got .*Write for example max_tokens="):
        plan_micro_batches([1, 2], max_tokens=value)


def test_max_tokens_may_be_a_numpy_integer() -> None:
    assert plan_micro_batches([2, 2], max_tokens=np.int64(4)) == [[0, 1]]


@pytest.mark.parametrize("count", [0, -1, 3])
def test_impossible_number_of_micro_batches(count: int) -> None:
    with pytest.raises(ValueError, match=f"num_micro_batches={count} is impossible for 2 rows: every micro"):
        plan_micro_batches([1, 2], max_tokens=8, num_micro_batches=count)


@pytest.mark.parametrize("count", [1.5, True, "2"])
def test_number_of_micro_batches_must_be_an_integer(count: Any) -> None:
    with pytest.raises(ValueError, match="num_micro_batches"):
        plan_micro_batches([1, 2], max_tokens=8, num_micro_batches=count)


def test_no_rows_cannot_make_a_micro_batch() -> None:
    with pytest.raises(ValueError, match="num_micro_batches=1 is impossible for 0 rows"):
        plan_micro_batches([], max_tokens=8, num_micro_batches=1)


def test_too_few_micro_batches_for_the_cap() -> None:
    with pytest.raises(ValueError, match=r"num_micro_batches=1 is too few: 3 rows need more .*max_tokens=10"):
        plan_micro_batches([5, 5, 5], max_tokens=10, num_micro_batches=1)


@pytest.mark.parametrize("lengths", [[1, -1], [1.0], ["a"], [None], [(3, -2)], [(3, 1.5)]])
def test_lengths_must_be_integers_and_not_negative(lengths: Any) -> None:
    with pytest.raises(ValueError, match="Row lengths must be integers and not negative"):
        plan_micro_batches(lengths, max_tokens=8)


def test_rows_must_have_as_many_parts() -> None:
    with pytest.raises(ValueError, match="same number of lengths"):
        plan_micro_batches([(3, 4), 5], max_tokens=8)


# Value objects


@pytest.mark.parametrize("name", ["overhead", "cell", "attention", "floor"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_cost_refuses_what_falls(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Cost.{name} must not be negative, got {value}"):
        Cost(**{name: value})


def test_cost_is_a_sum_of_three_parts() -> None:
    cost = Cost(overhead=5, cell=2, attention=0.5)
    assert cost(np.array([1, 3]), np.array([4, 10])).tolist() == [5 + 8 + 8, 5 + 60 + 150]


def test_cost_of_cells_is_at_least_the_floor() -> None:
    cost = Cost(overhead=5, cell=2, floor=30)
    assert cost(np.array([1, 3]), np.array([4, 10])).tolist() == [5 + 30, 5 + 60]


@pytest.mark.parametrize("name", ["max_bytes", "bytes_per_cell", "bytes_per_pair"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_budget_refuses_negative_bytes(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Budget.{name} must not be negative, got {value}"):
        Budget(**{name: value})


@pytest.mark.parametrize("value", [0, 2.0, True])
def test_budget_refuses_bad_tokens(value: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens must be a positive integer"):
        Budget(max_tokens=value)


@given(
    rows=st.integers(1, 100),
    width=st.integers(1, 1000),
    max_tokens=st.none() | st.integers(1, 50_000),
    max_bytes=st.none() | st.integers(1, 10**7),
    per_cell=st.integers(0, 100),
    per_pair=st.integers(0, 3),
)
@quick
def test_budget_fits_what_it_has_tokens_for(
    rows: int, width: int, max_tokens: int | None, max_bytes: int | None, per_cell: int, per_pair: int
) -> None:
    budget = Budget(max_tokens=max_tokens, max_bytes=max_bytes, bytes_per_cell=per_cell, bytes_per_pair=per_pair)
    is_limited = max_tokens is not None or (max_bytes is not None and per_cell + per_pair > 0)
    if is_limited:
        assert bool(budget.fits(rows, width)) == (rows * width <= budget.tokens_at(width))
    else:
        assert budget.fits(rows, width)
        assert budget.tokens_at(width) == 0


def test_budget_answers_for_arrays() -> None:
    budget = Budget(max_tokens=100, max_bytes=900, bytes_per_cell=2, bytes_per_pair=0.5)
    assert budget.fits(np.array([1, 10, 3, 3]), np.array([10, 10, 20, 30])).tolist() == [True, True, True, False]
    assert budget.bytes(3, 20) == 3 * (2 * 20 + 0.5 * 400)


def test_budget_of_bytes_narrows_with_width() -> None:
    budget = Budget(max_bytes=12_000, bytes_per_cell=10, bytes_per_pair=1)
    assert [budget.tokens_at(width) for width in (2, 10, 110)] == [1000, 600, 100]


@given(st.lists(st.integers(0, 1000), max_size=20), st.none() | st.integers(1, 64))
@quick
def test_rounding_up_to_a_multiple(lengths: list[int], multiple: int | None) -> None:
    rounded = round_up(np.array(lengths, dtype=np.int64), multiple).tolist()
    step = multiple or 1
    assert rounded == [next(n for n in range(length, length + step) if n % step == 0) for length in lengths]


# How rows lie in memory


@pytest.mark.parametrize(
    ("layout", "cells", "shape"),
    [
        (Layout.PADDED, 3 * 9, (3, 9)),
        (Layout.SEGMENTS, 9 + 4 + 2, (3, 5)),
        (Layout.ONE_ROW, 9 + 4 + 2, (1, 15)),
    ],
)
def test_rows_end_to_end_take_their_tokens_and_padded_ones_the_longest(
    layout: Layout, cells: int, shape: tuple[int, int]
) -> None:
    assert layout.cells(as_sizes([9, 4, 2])) == cells
    assert layout.shape(3, cells) == shape


def test_parts_are_padded_each_to_its_longest() -> None:
    assert Layout.PADDED.cells(as_sizes([(9, 1), (4, 6)])) == 2 * (9 + 6)
