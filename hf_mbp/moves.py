"""Single rows that are better off in another group, for few rows of several lengths. Pure; knows no torch.

Rows of several lengths have no order in which groups of neighbours are always the best (see `orders.py`). What the
order missed is found one row at a time: of all rows and all groups, the move that saves most is made, until none saves.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from hf_mbp.arrays import Floats, Ints

MOST_MOVED = 64
"""Rows up to which moves are looked for: what they save hardly grows beyond, but the time to find them does, with the
cube of the rows; from some milliseconds for so many to a second for 1,024."""

WORTH_IT = 1e-9
"""Part of the time of all groups that a move has to save: more than rounding does."""


def better_groups(
    groups: list[list[int]], sizes: Ints, time: Callable[[Any, Any], Any], *, keeps_number: bool
) -> list[list[int]]:
    """The groups after all moves that save time; the same if there are none.

    Args:
        groups: row indices of each group, every row in one.
        sizes: of the rows, `[rows, parts]`; a group is as wide as the sum of the longest of each part.
        time: of groups, by their rows and their width; infinite if they are not allowed, which one of a single row
            always is.
        keeps_number: whether there have to be as many groups as before. Else rows may leave for a group of their own,
            and the last one its group.

    Example:
        >>> sizes = np.array([(9, 1), (9, 9), (1, 9), (1, 9)])
        >>> better_groups([[0], [1, 2, 3]], sizes, lambda rows, width: 1.0 + rows * width, keeps_number=True)
        [[0, 1], [2, 3]]
    """
    if not 0 < len(sizes) <= MOST_MOVED:
        return groups
    group_of = np.empty(len(sizes), dtype=np.int64)
    for number, members in enumerate(groups):
        group_of[members] = number
    num_groups = len(groups) + (not keeps_number)
    while True:
        saved = _saved_by_moves(group_of, num_groups, sizes, time, keeps_number)
        row, group = np.unravel_index(saved.argmax(), saved.shape)
        if not saved[row, group] > 0:
            return [rows.tolist() for number in range(num_groups) if len(rows := np.flatnonzero(group_of == number))]
        group_of[row] = group


def _saved_by_moves(
    group_of: Ints, num_groups: int, sizes: Ints, time: Callable[[Any, Any], Any], keeps_number: bool
) -> Floats:
    """Time that each move saves, `[rows, groups]`; 0 where it saves none, or must not be made."""
    num_rows = np.bincount(group_of, minlength=num_groups)
    longest, left = _longest_of_groups(group_of, num_groups, sizes)
    now = _time_of(num_rows, longest.sum(axis=1), time)
    without = _time_of(num_rows[group_of] - 1, left.sum(axis=1), time)
    joined = np.maximum(sizes[:, None], longest).sum(axis=2)
    with_row = _time_of(np.broadcast_to(num_rows + 1, joined.shape), joined, time)
    saved = (now[group_of] - without)[:, None] + now - with_row
    saved[np.arange(len(sizes)), group_of] = 0
    if keeps_number:
        saved[num_rows[group_of] == 1] = 0
    return np.where(saved > WORTH_IT * now.sum(), saved, 0.0)


def _longest_of_groups(group_of: Ints, num_groups: int, sizes: Ints) -> tuple[Ints, Ints]:
    """The longest parts of each group, `[groups, parts]`, and, for each row, of the others in its group."""
    longest = np.zeros((num_groups, sizes.shape[1]), dtype=np.int64)
    np.maximum.at(longest, group_of, sizes)
    left = np.empty_like(sizes)
    for part in range(sizes.shape[1]):
        is_longest = sizes[:, part] == longest[group_of, part]
        is_only_one = is_longest & (np.bincount(group_of[is_longest], minlength=num_groups)[group_of] == 1)
        second = np.zeros(num_groups, dtype=np.int64)
        np.maximum.at(second, group_of[~is_longest], sizes[~is_longest, part])
        left[:, part] = np.where(is_only_one, second[group_of], longest[group_of, part])
    return longest, left


def _time_of(num_rows: Ints, width: Ints, time: Callable[[Any, Any], Any]) -> Floats:
    """Time of groups, some of which may have no rows and take none."""
    return np.where(num_rows == 0, 0.0, time(np.maximum(num_rows, 1), width))
