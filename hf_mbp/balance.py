"""Deals the rows of a mini-batch to ranks so that the slowest has as little to do as can be. Pure; knows no torch.

Which rank runs which row makes no difference to the gradient, as each micro-batch weighs its items over those of all
ranks. So the rows are sorted by length, as for micro-batches, and dealt in one of two ways:

* In runs, where a rank needs only a few micro-batches: each rank gets neighbours in the sorted order, few long rows the
  first, many short ones the last. Equally many rows for each would not help: every rank would have some of the longest
  rows, and pad the others to them.
* In turns, back and forth, where a micro-batch costs so little beside its rows that a rank runs many, with little
  padding in each: all ranks have rows of all lengths, and so micro-batches of the same widths.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from hf_mbp.arrays import Ints
from hf_mbp.plan import Cost

Dealing: TypeAlias = Callable[[Ints, int], list[Ints]]
"""Lengths of rows, and a number of ranks, to the indices of the rows of each."""

MANY_IN_LOCKSTEP, MANY = 20, 100
"""How many times what a micro-batch costs by itself a rank's rows cost, from where on they are dealt in turns.

Where ranks wait for each other after each micro-batch, a compromise: as `python scripts/rank_balance.py --many` shows
for 16 and 64 rows for each of 8 and 64 ranks, turns are better from 15 to 50 times on; at 20 a step in runs takes from
0.91 to 1.12 of one in turns. Where they wait once a step, runs are better by far (at 20 from 0.74 to 0.88), and then
hardly any more: at 100 from 0.89 to 0.98, and 1.08 for 2 ranks."""


def deal(lengths: Ints, num_ranks: int, cost: Cost, *, in_lockstep: bool) -> list[Ints]:
    """Which rows each rank runs, every row once; every rank has one, if there are as many.

    Args:
        lengths: tokens of each row of the mini-batch, `[rows]`; of all its parts together.
        num_ranks: how many share them.
        cost: of micro-batches.
        in_lockstep: whether ranks wait for each other after each micro-batch, and not at the end of the step alone.

    Returns:
        Ascending indices of the rows of each rank.

    Example:
        >>> lengths = np.array([3, 60, 4, 48, 5, 9, 7, 50])
        >>> [rows.tolist() for rows in deal(lengths, 3, Cost(overhead=100), in_lockstep=True)]
        [[1], [3, 7], [0, 2, 4, 5, 6]]
        >>> [rows.tolist() for rows in deal(lengths, 3, Cost(overhead=1), in_lockstep=True)]
        [[1, 2, 4], [0, 6, 7], [3, 5]]
    """
    order = np.argsort(-lengths, kind="stable")
    costs = row_costs(lengths[order], cost)
    many = (MANY_IN_LOCKSTEP if in_lockstep else MANY) * (cost.overhead + cost.floor)
    is_many = sum(costs) > many * num_ranks
    ranks = in_turns(len(costs), num_ranks) if is_many else in_runs(costs, num_ranks)
    return [np.sort(order[ranks == rank]) for rank in range(num_ranks)]


def row_costs(lengths: Ints, cost: Cost) -> list[int]:
    """What a row of each length costs, in whole numbers, so that ranks on unlike machines deal alike."""
    widths = np.maximum(lengths, 1)
    costs = np.rint(widths * (cost.cell + cost.attention * widths))
    return [max(1, int(value)) for value in costs]


def in_turns(num_rows: int, num_ranks: int) -> Ints:
    """The rank of each row: 0, 1, 2, 2, 1, 0, 0, 1, ..."""
    turns, positions = np.divmod(np.arange(num_rows), num_ranks)
    return np.where(turns % 2, num_ranks - 1 - positions, positions)


def in_runs(costs: list[int], num_ranks: int) -> Ints:
    """The rank of each row, none of which is costlier than the one before it.

    A rank costs what its rows would as one micro-batch, padded to the longest: no other assignment has a smaller
    maximum. That is found by halving.
    """
    num_runs = min(num_ranks, len(costs))
    low, high = max(costs, default=0), sum(costs[:1]) * len(costs)
    while low < high:
        cap = (low + high) // 2
        if _filled(costs, num_runs, cap)[-1] == len(costs):
            high = cap
        else:
            low = cap + 1
    sizes = [end - start for start, end in pairwise(_filled(costs, num_runs, high))]
    return np.repeat(np.arange(num_runs), sizes)


def _filled(costs: list[int], num_runs: int, cap: int) -> list[int]:
    """The ends of runs that take as many rows as `cap` allows, at least one, and leave one for each run that follows.

    If the cap is too small, the last one is short of all rows.
    """
    ends = [0]
    for later in reversed(range(num_runs)):
        left = len(costs) - ends[-1] - later
        ends.append(ends[-1] + min(cap // costs[ends[-1]], left))
    return ends
