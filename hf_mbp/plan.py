"""Plans the micro-batches of one mini-batch: which rows run together. Pure; knows no torch.

A micro-batch of rows whose lengths differ is padded to its longest row, so it costs `rows x width` cells. Sorting the
rows by length and cutting the sorted list into contiguous groups gives, for any group sizes, the smallest widths
possible. What is left to choose is where to cut, so that the plan is the cheapest among those that respect the budget;
see `cuts.py`. Where rows have two lengths, several orders are cut (see `orders.py`), single rows change to groups that
suit them better (see `moves.py`), and the cheapest plan is taken.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from fractions import Fraction
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from hf_mbp.arrays import Floats, Ints
from hf_mbp.cuts import SortedRows, best_cuts, best_cuts_into
from hf_mbp.moves import better_groups
from hf_mbp.orders import orders_of

Size: TypeAlias = int | tuple[int, ...]
"""Length of a row, or its lengths where parts are padded separately: (source, target) of an encoder-decoder."""


class Layout(Enum):
    """How the rows of a micro-batch lie in memory.

    `PADDED` to the longest, `[rows, width]`; or end to end, `[1, tokens]`. Then attention works on one row after the
    other (`SEGMENTS`: flash attention), so that each takes what it takes alone, or on all pairs of tokens, of which it
    uses few (`ONE_ROW`: attention with a mask), so that they take what one row as long as all of them takes.
    """

    PADDED = "padded"
    SEGMENTS = "segments"
    ONE_ROW = "one row"

    def cells(self, sizes: Ints) -> int:
        """Cells of a micro-batch of rows of `sizes`, `[rows, parts]`."""
        padded = len(sizes) * int(sizes.max(axis=0).sum())
        return padded if self is Layout.PADDED else int(sizes.sum())

    def shape(self, num_rows: int, cells: int) -> tuple[int, Fraction]:
        """Rows and width that `num_rows` rows with so many cells count as, of which `Budget` knows the bytes.

        Of segments of unlike lengths that is the mean width, which leaves out some pairs of positions: those are
        counted where the lengths are known, in `plan_segments`.
        """
        rows = 1 if self is Layout.ONE_ROW else num_rows
        return rows, Fraction(cells, rows)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Modelled time of a micro-batch, in units of the time of one cell.

    `overhead` is what a micro-batch costs whatever its size (kernel launches, adding gradients to parameters), `cell`
    what each padded token costs, and `attention` what each pair of positions in a row costs. The planner minimises
    the sum over the micro-batches. What cells and pairs cost together counts as at least `floor`: a device that waits
    for its host to launch kernels could compute as much meanwhile. Beyond `most_cells`, if given, a micro-batch costs
    more than this, and none with several rows is made.
    """

    overhead: float = 32.0
    cell: float = 1.0
    attention: float = 0.0
    floor: float = 0.0
    most_cells: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and not value >= 0:
                raise ValueError(f"Cost.{name} must not be negative, got {value!r}.")

    def __call__(self, rows: Ints | Floats, width: Ints | Floats) -> Floats:
        """Modelled time of micro-batches of `rows` rows padded to `width`."""
        return np.asarray(self.overhead + np.maximum(self.floor, rows * self.of_row(width)), dtype=np.float64)

    def of_row(self, width: Ints | Floats) -> Floats:
        """Modelled time of what one row adds to a micro-batch padded to `width`, but for the floor."""
        return np.asarray(width * (self.cell + self.attention * width), dtype=np.float64)

    def holds_for(self, rows: Any, width: Any) -> Any:
        """Whether micro-batches `[rows, width]` cost what is modelled, and not more."""
        return True if self.most_cells is None else rows * width <= self.most_cells


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The cap on a micro-batch: a number of cells, a number of bytes, or both.

    `max_tokens` caps `rows x width`. `max_bytes` caps the memory that the activations of a micro-batch are expected to
    need: `rows x (bytes_per_cell x width + bytes_per_pair x width^2)`, and at least `bytes_fixed`.
    """

    max_tokens: int | None = None
    max_bytes: float | None = None
    bytes_fixed: float = 0.0
    bytes_per_cell: float = 0.0
    bytes_per_pair: float = 0.0

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_max_tokens(self.max_tokens, "max_tokens")
        for name in ("max_bytes", "bytes_fixed", "bytes_per_cell", "bytes_per_pair"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"Budget.{name} must not be negative, got {value!r}.")

    def bytes(self, rows: Any, width: Any) -> Any:
        """Bytes that the activations of a micro-batch `[rows, width]` are expected to need."""
        return np.maximum(self.bytes_fixed, rows * self.bytes_of_row(width))

    def bytes_of_row(self, width: Any) -> Any:
        """Bytes that one more row of a width adds."""
        return self.bytes_per_cell * width + self.bytes_per_pair * width**2

    def fits(self, rows: Any, width: Any) -> Any:
        """Whether micro-batches `[rows, width]` respect the cap; for numbers or arrays."""
        in_tokens = rows * width <= self.max_tokens if self.max_tokens is not None else True
        in_bytes = self.bytes(rows, width) <= self.max_bytes if self.max_bytes is not None else True
        return np.logical_and(in_tokens, in_bytes)

    def tokens_at(self, width: int) -> int:
        """The most cells a micro-batch of rows of `width` tokens may have; 0 if nothing limits it."""
        caps = [] if self.max_tokens is None else [self.max_tokens]
        per_cell = self.bytes_per_cell + self.bytes_per_pair * width
        if self.max_bytes is not None and per_cell > 0:
            caps.append(int(self.max_bytes / per_cell))
        return min(caps, default=0)


def check_max_tokens(value: Any, name: str) -> None:
    """Raises `ValueError` unless `value` is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(
            f"{name} must be a positive integer, the padded tokens (rows x width) one micro-batch may have, "
            f"got {value!r}. Write for example {name}=8192."
        )


def plan_micro_batches(
    lengths: Sequence[Size], max_tokens: int, *, num_micro_batches: int | None = None
) -> list[list[int]]:
    """Splits the rows of a mini-batch into micro-batches of at most `max_tokens` cells.

    Every index is used exactly once, and the micro-batch with the longest rows comes first, so that the worst case
    for memory is met at once. Among all plans that respect the cap the one with the smallest modelled time is taken
    (see `Cost`), so a micro-batch may have fewer cells than it could; where rows have two lengths, the best that is
    found by cutting some orders, and by moving single rows. A row that alone is longer than `max_tokens` runs by
    itself.

    Args:
        lengths: tokens of each row; a tuple `(source, target)` where two parts are padded separately.
        max_tokens: cap on the cells, `rows x width`, of a micro-batch.
        num_micro_batches: ask for exactly that many. The modelled time is then at most 0.1 % above the smallest, or
            1 % above that of the best cuts of the orders tried where rows have two lengths.

    Returns:
        The row indices of each micro-batch.

    Raises:
        ValueError: an argument is out of range, or `num_micro_batches` cannot be met.

    Example:
        >>> plan_micro_batches([3, 50, 4, 48, 5], max_tokens=100)
        [[1, 3], [4, 2, 0]]
        >>> plan_micro_batches([3, 50, 4, 48, 5], max_tokens=100, num_micro_batches=3)
        [[1], [3], [4, 2, 0]]

    After the token budget of fairseq's `--max-tokens`; for contiguous groups of sorted rows see "Scheduling
    micro-batches" in `docs/how_it_works.md`.
    """
    check_max_tokens(max_tokens, "max_tokens")
    sizes = as_sizes(lengths)
    longest = int(sizes.sum(axis=1).max(initial=0))
    if longest > max_tokens:
        warnings.warn(too_long_message(longest, max_tokens), stacklevel=2)
    return plan_rows(sizes, Budget(max_tokens=int(max_tokens)), Cost(), num_micro_batches=num_micro_batches)


def too_long_message(length: int, max_tokens: int) -> str:
    """What to tell the user about a row that is longer than the budget."""
    return (
        f"A row of {length:,} tokens is longer than the budget of {max_tokens:,} tokens a micro-batch: it runs by "
        "itself, uncut. If it does not fit the device, shorten such rows or raise the budget."
    )


def as_sizes(lengths: Sequence[Size]) -> Ints:
    """Row lengths as an array `[rows, parts]`; an empty row still fills one cell.

    Raises:
        ValueError: a length is negative or not an integer, or rows have different numbers of parts.
    """
    rows = [length if isinstance(length, tuple) else (length,) for length in lengths]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("All rows must have the same number of lengths.")
    sizes = np.array(rows, dtype=object).reshape(len(rows), len(rows[0]) if rows else 1)
    if not all(isinstance(part, (int, np.integer)) and part >= 0 for part in sizes.flat):
        odd = next(part for part in sizes.flat if not isinstance(part, (int, np.integer)) or part < 0)
        raise ValueError(f"Row lengths must be integers and not negative; row_length returned {odd!r}.")
    sizes = sizes.astype(np.int64)
    if sizes.size:
        sizes[:, 0] += sizes.sum(axis=1) == 0
    return sizes


def round_up(sizes: Ints, multiple: int | None) -> Ints:
    """Lengths as a collator with `pad_to_multiple_of=multiple` pads them."""
    return sizes if not multiple else -(-sizes // multiple) * multiple


def plan_rows(sizes: Ints, budget: Budget, cost: Cost, *, num_micro_batches: int | None = None) -> list[list[int]]:
    """The cheapest plan for rows of the given `sizes` `[rows, parts]`; see `plan_micro_batches`."""
    if num_micro_batches is not None:
        _check_count(num_micro_batches, len(sizes))
    plans = [_groups_in_order(order, sizes, budget, cost, num_micro_batches) for order in orders_of(sizes)]
    possible = [groups for groups in plans if groups is not None]
    if not possible:
        raise ValueError(
            f"num_micro_batches={num_micro_batches} is too few: {len(sizes)} rows need more micro-batches to "
            f"respect {budget}."
        )
    groups = min(possible, key=lambda groups: _time_of(groups, sizes, cost))
    return sorted(groups, key=lambda group: -int(sizes[group].max(axis=0).sum()))


def _time_of(groups: list[list[int]], sizes: Ints, cost: Cost) -> float:
    """Modelled time of micro-batches."""
    width = np.array([sizes[group].max(axis=0).sum() for group in groups])
    return float(cost(np.array([len(group) for group in groups]), width).sum())


def _fits(budget: Budget, cost: Cost) -> Callable[[Any, Any], Any]:
    """Whether micro-batches of several rows respect the cap and cost what is modelled."""
    return lambda rows, width: np.logical_and(budget.fits(rows, width), cost.holds_for(rows, width))


def _allowed(budget: Budget, cost: Cost) -> Callable[[Any, Any], Any]:
    """Modelled time of micro-batches; infinite where there must be none."""
    fits = _fits(budget, cost)
    return lambda rows, width: np.where(np.logical_or(rows == 1, fits(rows, width)), cost(rows, width), np.inf)


def _groups_in_order(
    order: Ints, sizes: Ints, budget: Budget, cost: Cost, num_micro_batches: int | None
) -> list[list[int]] | None:
    """Groups of rows that are neighbours in an order, but for the few that are better off elsewhere.

    `None` if so few groups are not possible.
    """
    rows = SortedRows(sizes=sizes[order], fits=_fits(budget, cost), time_of_row=cost.of_row, floor=cost.floor)
    if num_micro_batches is None:
        cuts = best_cuts(rows, cost.overhead)
    else:
        exactly = best_cuts_into(rows, int(num_micro_batches), cost.overhead)
        if exactly is None:
            return None
        cuts = exactly
    groups = [order[start:end].tolist() for start, end in pairwise(cuts)]
    if sizes.shape[1] == 1:
        return groups
    return better_groups(groups, sizes, _allowed(budget, cost), keeps_number=num_micro_batches is not None)


def planned_groups(
    layout: Layout, sizes: Ints, budget: Budget, cost: Cost, *, num_micro_batches: int | None = None
) -> list[list[int]]:
    """Rows of each micro-batch, for rows of the given `sizes` `[rows, parts]` that are laid so.

    Rows that lie end to end as one are planned as if they were padded: how few of them fit is seen when they lie there.
    """
    if layout is Layout.SEGMENTS:
        return plan_segments(sizes, budget, num_micro_batches=num_micro_batches)
    return plan_rows(sizes, budget, cost, num_micro_batches=num_micro_batches)


def plan_segments(sizes: Ints, budget: Budget, *, num_micro_batches: int | None = None) -> list[list[int]]:
    """Micro-batches of rows that lie end to end, each taking what it takes alone: as few as the budget allows.

    Without padding no grouping costs more than another, but for what each micro-batch costs whatever its size. So the
    rows, the longest first, fill one micro-batch after the other. A row that alone is too long has one for itself.

    Args:
        sizes: of the rows, `[rows, parts]`.
        budget: for the sum of what the rows of a micro-batch take.
        num_micro_batches: at least so many, by halving the largest.
    """
    lengths = sizes.sum(axis=1)
    order = np.argsort(-lengths, kind="stable")
    tokens = np.cumsum(lengths[order])
    sums: list[tuple[Any, float | None]] = [(tokens, budget.max_tokens)]
    if budget.max_bytes is not None:
        sums += [(np.cumsum(budget.bytes_of_row(lengths[order])), budget.max_bytes)]
    cuts = [0]
    while cuts[-1] < len(order):
        cuts.append(max(cuts[-1] + 1, min(_last_within(total, cuts[-1], cap) for total, cap in sums)))
    for _ in range(len(cuts) - 1, num_micro_batches or 0):
        cuts = sorted([*cuts, _middle_of_largest(cuts, tokens)])
    return [order[start:end].tolist() for start, end in pairwise(cuts)]


def _last_within(total: Any, start: int, cap: float | None) -> int:
    """Where a group from `start` on has to end, of which `total` is what it and all rows before take."""
    before = total[start - 1] if start else 0
    return len(total) if cap is None else int(np.searchsorted(total, before + cap, side="right"))


def _middle_of_largest(cuts: list[int], tokens: Ints) -> int:
    """Where to halve the group with most tokens, of those with several rows."""
    ends = np.concatenate([[0], tokens])
    several = [(start, end) for start, end in pairwise(cuts) if end - start > 1]
    start, end = max(several, key=lambda group: ends[group[1]] - ends[group[0]])
    return (start + end) // 2


def _check_count(num_micro_batches: Any, num_rows: int) -> None:
    if isinstance(num_micro_batches, bool) or not isinstance(num_micro_batches, (int, np.integer)):
        raise ValueError(f"num_micro_batches must be an integer, got {num_micro_batches!r}.")
    if not 1 <= num_micro_batches <= num_rows:
        raise ValueError(
            f"num_micro_batches={num_micro_batches} is impossible for {num_rows} rows: every micro-batch needs a row."
        )
