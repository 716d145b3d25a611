"""Deals the rows of a mini-batch to ranks so that none waits long for another. Pure; knows no torch.

Which rank runs which row makes no difference to the gradient, as each micro-batch weighs its items over those of all
ranks. So the rows are sorted by length, as for micro-batches, and the sorted rows cut into one contiguous run for each
rank: few long rows for the first, many short ones for the last. The cuts are where the costliest run costs least.

Equally many rows for each rank would balance their tokens, too, but not what they take: every rank would get some of
the longest rows, and pad to them.
"""

from itertools import pairwise

import numpy as np

from hf_mbp.plan import Cost, Ints


def deal(lengths: Ints, num_ranks: int, cost: Cost) -> list[Ints]:
    """Which rows each rank runs, every row once, so that the costliest rank costs least.

    A rank costs what its rows would as a single micro-batch, padded to the longest; no other runs of the sorted rows
    have a smaller maximum. Every rank has a row, if there are as many.

    Args:
        lengths: tokens of each row of the mini-batch, `[rows]`.
        num_ranks: how many share them.
        cost: of which the cells and the pairs of positions count; the overhead is the same for all.

    Returns:
        Ascending indices of the rows of each rank.

    Example:
        >>> [rows.tolist() for rows in deal(np.array([3, 60, 4, 48, 5, 9, 7, 50]), 3, Cost())]
        [[1], [3, 7], [0, 2, 4, 5, 6]]
    """
    order = np.argsort(-lengths, kind="stable")
    cuts = _cuts(_row_costs(lengths[order], cost), min(num_ranks, len(lengths)))
    runs = [np.sort(order[start:end]) for start, end in pairwise(cuts)]
    return runs + [order[:0]] * (num_ranks - len(runs))


def _row_costs(lengths: Ints, cost: Cost) -> list[int]:
    """What a row of each length costs, in whole numbers, so that ranks on unlike machines cut at the same places."""
    widths = np.maximum(lengths, 1)
    costs = np.rint(widths * (cost.cell + cost.attention * widths))
    return [max(1, int(value)) for value in costs]


def _cuts(costs: list[int], num_runs: int) -> list[int]:
    """Positions [0, ..., rows] at which to cut rows that get no costlier; the least cap is found by halving."""
    if not num_runs:
        return [0]
    low, high = max(costs[0], -(-sum(costs) // num_runs)), costs[0] * len(costs)
    while low < high:
        cap = (low + high) // 2
        if _filled(costs, num_runs, cap)[-1] == len(costs):
            high = cap
        else:
            low = cap + 1
    return _filled(costs, num_runs, high)


def _filled(costs: list[int], num_runs: int, cap: int) -> list[int]:
    """The cuts if each run takes as many rows as `cap` allows, at least one, and leaves one for each run that follows.

    If the cap is too small, the last cut is short of all rows.
    """
    cuts = [0]
    for later in reversed(range(num_runs)):
        left = len(costs) - cuts[-1] - later
        cuts.append(cuts[-1] + min(cap // costs[cuts[-1]], left))
    return cuts
