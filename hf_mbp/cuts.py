"""Where to cut rows in an order into groups, so that the groups together take the least time. Pure; knows no torch.

The least time of the first `end` rows is that of the first `start` rows, plus the group `[start, end)`, for the best
`start`. Two observations keep the search for it short, and exact:

* Rows of one length, the longest first: of two starts the later one has the narrower group, which takes less for each
  further row. Once it is better than the earlier one it stays so, and the earlier one is forgotten. A queue of starts
  with the ends from which each is the best finds all cuts in one pass (after Galil and Park, 1992).
* Any rows: a group takes no less than its two parts do without the second one's overhead. So a start from which a cut
  at `k` is as good as none is of no use beyond `k` (after PELT; Killick et al., 2012). Nor is one that a later start
  has overtaken for good. What is left are few starts, and these are compared for a block of ends at a time.

An exact number of groups is asked for by a price: the same search with another overhead for each group makes fewer or
more of them. Where two prices next to each other skip the number, the front of one plan and the back of another are put
together (after Aggarwal, Schieber and Tokuyama, 1994).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import floor as floor_of
from typing import Any

import numpy as np
import numpy.typing as npt

from hf_mbp.arrays import Floats, Ints

BLOCK = 64
"""Ends that are looked at together: enough for arrays to pay, and few against the length of a group."""

GOOD_ENOUGH, CLOSE_ENOUGH = 1.001, 1.01
"""How much more than the least time a plan with an exact number of groups may take. The search ends where it surely is
good enough. For rows of several lengths it can end before that: then close enough is taken, because all that is left is
to search for each smaller number of groups as well, which takes long."""

ROUNDING = 1e-9
"""Times that differ by a smaller part than this are equal."""


@dataclass(frozen=True, kw_only=True)
class SortedRows:
    """Rows in the order in which they are cut, and what groups of them take.

    Those of one length have the longest first; those of several may have any order (see `orders.py`). `sizes` is
    `[rows, parts]`; a group is as wide as the sum of the longest of each part. `fits(rows, width)` says whether a group
    is allowed, which it is if it has a single row, or is part of an allowed one. It takes `rows x time_of_row(width)`,
    which must not fall with the width, and at least `floor`.
    """

    sizes: Ints
    fits: Callable[[Any, Any], Any]
    time_of_row: Callable[[Ints], Floats]
    floor: float = 0.0

    def __len__(self) -> int:
        return len(self.sizes)

    def times(self, rows: Ints, width: Ints) -> Floats:
        """Time of groups without their overhead; infinite where they are not allowed."""
        times = np.maximum(self.floor, rows * self.time_of_row(width))
        return np.where(np.logical_or(self.fits(rows, width), rows == 1), times, np.inf)

    def times_between(self, starts: Ints, ends: Ints) -> Floats:
        """Times of the groups `[start, end)`."""
        sizes = np.concatenate([self.sizes, self.sizes[-1:]])  # so that the end of the last row is an index, too
        longest = np.maximum.reduceat(sizes, np.stack([starts, ends], axis=1).reshape(-1), axis=0)[::2]
        return self.times(ends - starts, longest.sum(axis=1))


def best_cuts(rows: SortedRows, overhead: float) -> list[int]:
    """Positions [0, ..., rows] at which to cut, for the least time of all groups, each with its `overhead`."""
    if not len(rows):
        return [0]
    search = _starts_of_one_length if rows.sizes.shape[1] == 1 else _starts_of_any
    starts = search(rows, overhead)
    cuts = [len(rows)]
    while cuts[-1] > 0:
        cuts.append(int(starts[cuts[-1]]))
    return cuts[::-1]


def time_of_cuts(rows: SortedRows, cuts: list[int], overhead: float) -> float:
    """Time of the groups between cuts, each with its `overhead`; 0 if there are none."""
    starts, ends = np.array(cuts[:-1], dtype=np.int64), np.array(cuts[1:], dtype=np.int64)
    return float((overhead + rows.times_between(starts, ends)).sum()) if len(starts) else 0.0


def _starts_of_one_length(rows: SortedRows, overhead: float) -> list[int]:
    """For each end, where the last group up to there best starts.

    `queue` holds the starts that are, or will be, the best one, and `since` the end from which each is. A start leaves
    in front where the next takes over, and in the back where a later one takes over before it would have its turn.
    """
    num_rows, floor = len(rows), rows.floor
    time_of_row: list[float] = rows.time_of_row(rows.sizes[:, 0]).tolist()
    last_end: list[int] = (np.arange(num_rows) + _most_rows(rows)).tolist()
    best, best_start = [0.0] * (num_rows + 1), [0] * (num_rows + 1)

    def time(start: int, end: int) -> float:
        return best[start] + max(floor, (end - start) * time_of_row[start])

    def take_over(old: int, new: int) -> int:
        """The first end at which `new` is better than `old`, or `old` no longer fits."""
        slope, gained = time_of_row[old], time_of_row[old] - time_of_row[new]
        if time(new, new + 1) < time(old, new + 1):
            return new + 1
        ahead = best[new] - best[old] - (new - old) * slope
        if slope == 0 or (gained == 0 and ahead >= 0):
            return last_end[old] + 1
        as_good = new + max(ahead / gained if gained else 0.0, (ahead + floor) / slope)
        return max(new + 1, floor_of(min(as_good, last_end[old])) + 1)

    queue, since, front = [0], [1], 0
    for end in range(1, num_rows + 1):
        while front + 1 < len(queue) and since[front + 1] <= end:
            front += 1
        best_start[end] = queue[front]
        best[end] = overhead + time(queue[front], end)
        if end == num_rows:
            break
        turn = take_over(queue[-1], end)
        while turn <= since[-1]:
            queue.pop()
            since.pop()
            turn = take_over(queue[-1], end)
        if turn <= num_rows:
            queue.append(end)
            since.append(turn)
    return best_start


def _most_rows(rows: SortedRows) -> Ints:
    """How many rows fit into a group as wide as each row; at least one. By bisection, for all widths at a time."""
    widths, index = np.unique(rows.sizes[:, 0], return_inverse=True)
    fewest, most = np.ones_like(widths), np.full_like(widths, len(rows))
    while (fewest < most).any():
        middle = (fewest + most + 1) // 2
        fits = rows.fits(middle, widths)
        fewest, most = np.where(fits, middle, fewest), np.where(fits, most, middle - 1)
    return fewest[index.reshape(-1)]


def _starts_of_any(rows: SortedRows, overhead: float) -> Ints:
    """The same for rows of any lengths.

    `starts` are those before a block of ends that may still be of use, and `longest` the longest parts from each on;
    `to_come` are the longest parts that any later group can have.
    """
    num_rows = len(rows)
    best, best_start = np.zeros(num_rows + 1), np.zeros(num_rows + 1, dtype=np.int64)
    starts, longest = np.zeros(0, dtype=np.int64), np.zeros((0, rows.sizes.shape[1]), dtype=np.int64)
    no_row = np.zeros((1, longest.shape[1]), dtype=np.int64)
    to_come = np.maximum.accumulate(np.concatenate([no_row, rows.sizes[::-1]]), axis=0)[::-1]
    for block in range(0, num_rows, BLOCK):
        sizes = rows.sizes[block : block + BLOCK]
        inside = block + np.arange(len(sizes))
        starts = np.concatenate([starts, inside])
        longest = np.concatenate([longest, np.zeros_like(sizes)])
        times, longest = _times_in_block(rows, starts, longest, inside)
        ends = slice(block + 1, block + 1 + len(sizes))
        num_before = len(starts) - len(sizes)
        earlier = best[starts[:num_before], None] + times[:num_before]
        best[ends] = overhead + earlier.min(axis=0, initial=np.inf)
        for start, onward in zip(inside.tolist(), times[num_before:], strict=True):
            reached, first = best[start + 1 : ends.stop], start - block
            np.minimum(reached, (best[start] + overhead) + onward[first:], out=reached)
        totals = best[starts, None] + times
        best_start[ends] = starts[totals.argmin(axis=0)]
        of_use = totals[:, -1] - rows.floor < best[ends.stop - 1]
        starts, longest, total = starts[of_use], longest[of_use], totals[of_use, -1]
        most_width = np.maximum(longest, to_come[ends.stop - 1]).sum(axis=1)
        most_total = best[starts] + np.maximum(rows.floor, (ends.stop - 1 - starts) * rows.time_of_row(most_width))
        of_use = ~_is_overtaken(longest.sum(axis=1), total, most_width, most_total)
        starts, longest = starts[of_use], longest[of_use]
    return best_start


def _is_overtaken(width: Ints, total: Floats, most_width: Ints, most_total: Floats) -> npt.NDArray[np.bool_]:
    """Of which starts a later one has at most the width and the total, even if it were as wide as it can ever get.

    It stays so: with each further row the earlier one takes at least as much more. Widths fall from start to start.
    """
    later = np.maximum(
        len(width) - np.searchsorted(most_width[::-1], width, side="right"), np.arange(1, len(width) + 1)
    )
    least = np.minimum.accumulate(np.append(most_total, np.inf)[::-1])[::-1]
    return np.asarray(least[later] <= total)


def _times_in_block(rows: SortedRows, starts: Ints, longest: Ints, inside: Ints) -> tuple[Floats, Ints]:
    """Times of the groups from `starts` to the ends of the rows `inside` a block, and `longest` at the last of them."""
    is_in_group = inside >= starts[:, None]
    num_rows = inside - starts[:, None] + 1
    width, parts = np.zeros_like(num_rows), []
    for part in range(rows.sizes.shape[1]):
        sizes = np.where(is_in_group, rows.sizes[inside, part], 0)
        reach = np.maximum(np.maximum.accumulate(sizes, axis=1), longest[:, part, None])
        width += reach
        parts.append(reach[:, -1])
    times = np.where(is_in_group, rows.times(num_rows, width), np.inf)
    return times, np.stack(parts, axis=1)


class _Plan:
    """Where rows are cut, what the groups take without overheads, and the overhead for which that is the best."""

    def __init__(self, rows: SortedRows, cuts: list[int], overhead: float) -> None:
        self.cuts = np.array(cuts)
        self.times = rows.times_between(self.cuts[:-1], self.cuts[1:])
        self.time = float(self.times.sum())
        self.count = len(self.times)
        self.overhead = overhead

    def bound(self, count: int) -> float:
        """The least that `count` groups can take: with the overheads no less than this plan."""
        return self.time + self.overhead * (self.count - count)


def best_cuts_into(rows: SortedRows, count: int, overhead: float) -> list[int] | None:
    """Positions at which to cut for the least time of `count` groups; `None` if these are too few.

    The time, overheads included, is at most `GOOD_ENOUGH` times the least for rows of one length, and `CLOSE_ENOUGH`
    times for others. `overhead` is what a group costs where the number is free: the search begins there. It goes on
    between a plan of fewer and one of more groups, until one of them, or what is made of both, will do. Every other
    time it tries the overhead at which both are equally good: if nothing is better than both then, it cannot go on. In
    between it guesses, which is faster.
    """

    def priced(price: float) -> _Plan:
        return _Plan(rows, best_cuts(rows, price), price)

    free, single = priced(overhead), _Plan(rows, list(range(len(rows) + 1)), 0.0)
    fewest, most = (free, single) if free.count <= count else (priced(_prohibitive(rows, single.time)), free)
    if count < fewest.count:
        return None
    bound, guesses, may_exceed = max(0.0, free.bound(count)), True, GOOD_ENOUGH
    while fewest.count < count < most.count:
        time, joined = min(_joined(rows, fewest, most, count), _joined(rows, most, fewest, count))
        if time + overhead * count <= may_exceed * (bound + overhead * count):
            return joined
        if may_exceed == CLOSE_ENOUGH:
            return _best_cuts_by_count(rows, count)
        between = priced(_guess(fewest, most, count) if guesses else _balance(fewest, most))
        bound = max(bound, between.bound(count))
        if not guesses and between.bound(fewest.count) >= (1 - ROUNDING) * fewest.time:
            may_exceed = CLOSE_ENOUGH
        else:
            fewest, most = _closer(fewest, most, between, count)
        guesses = not guesses
    found: list[int] = (fewest if fewest.count == count else most).cuts.tolist()
    return found


def _balance(fewest: _Plan, most: _Plan) -> float:
    """The overhead at which two plans are equally good."""
    return (fewest.time - most.time) / (most.count - fewest.count)


def _closer(fewest: _Plan, most: _Plan, between: _Plan, count: int) -> tuple[_Plan, _Plan]:
    """The plans of fewer and of more groups with another one in the place of either."""
    if not fewest.count <= between.count <= most.count:
        return fewest, most
    return (between, most) if between.count <= count else (fewest, between)


def _guess(fewest: _Plan, most: _Plan, count: int) -> float:
    """An overhead between those of two plans: padding falls with 1 / groups, so overheads with its derivative."""
    few, many, wanted = (1 / groups**2 for groups in (fewest.count, most.count, count))
    return most.overhead + (fewest.overhead - most.overhead) * (wanted - many) / (few - many)


def _prohibitive(rows: SortedRows, time_one_by_one: float) -> float:
    """An overhead above anything that one more group can save."""
    widest = rows.sizes.max(axis=0, keepdims=True).sum(axis=1)
    return 1.0 + time_one_by_one + len(rows) * float(rows.time_of_row(widest)[0])


def _joined(rows: SortedRows, front: _Plan, back: _Plan, count: int) -> tuple[float, list[int]]:
    """The best plan of `count` groups that begins as one plan and ends as another, with one group between; its time.

    Of a plan of fewer and one of more groups, some such plan is allowed in one order or the other. Number the groups of
    both, those of the latter as many lower as it may keep more: somewhere a group of the former holds the one of the
    latter that has its number. To swap what follows these two is allowed; for rows of one length, it never takes more.
    """
    num_front = np.arange(max(0, count - 1 - back.count), min(front.count, count - 1) + 1)
    num_back = count - 1 - num_front
    starts, ends = front.cuts[num_front], back.cuts[back.count - num_back]
    before = np.concatenate([[0.0], np.cumsum(front.times)])[num_front]
    after = np.concatenate([[0.0], np.cumsum(back.times[::-1])])[num_back]
    times = np.where(starts < ends, before + rows.times_between(starts, ends) + after, np.inf)
    best = int(times.argmin())
    cuts = [*front.cuts[: num_front[best] + 1].tolist(), *back.cuts[back.count - num_back[best] :].tolist()]
    return float(times[best]), cuts


def _best_cuts_by_count(rows: SortedRows, count: int) -> list[int]:
    """The least time of `count` groups, for each smaller number of groups before: slow, and always exact."""
    num_rows = len(rows)
    best = np.full((count + 1, num_rows + 1), np.inf)
    best_start = np.zeros((count + 1, num_rows + 1), dtype=np.int32)
    best[0, 0] = 0.0
    for start in range(num_rows):
        width = np.maximum.accumulate(rows.sizes[start:], axis=0).sum(axis=1)
        times = rows.times(np.arange(1, num_rows - start + 1), width)
        ends = slice(start + 1, start + 1 + int(np.isfinite(times).sum()))
        totals = best[:-1, start, None] + times[: ends.stop - ends.start]
        is_better = totals < best[1:, ends]
        best[1:, ends][is_better] = totals[is_better]
        best_start[1:, ends][is_better] = start
    cuts = [num_rows]
    for groups in range(count, 0, -1):
        cuts.append(int(best_start[groups, cuts[-1]]))
    return cuts[::-1]
