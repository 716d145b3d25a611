"""Fits the cost model of the planner to times that were measured, and says how well it predicts them. Pure.

Times are noisy: other programs run, kernels are compiled, memory is tidied up. So few constants are fitted, to the
least sum of absolute errors relative to what was measured, of which a few slow micro-batches are a small part. A third
of the micro-batches is held out to judge the constants by; they are taken only if they predict these well, and better
than the modelled ones do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from hf_mbp.arrays import Floats
from hf_mbp.plan import Cost

FEWEST = 8
"""Micro-batches from which on constants are fitted: twice as many as there can be constants."""

HELD_OUT = 3
"""One in so many is not fitted to, but predicted: of the fewest, three."""

LEAST_SPREAD = 1.5
"""How many times more the larger micro-batches must compute than the smaller ones, or be wider, for their times to tell
the constants apart."""

FLAT_SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of the micro-batches, the smallest ones, that may all take the floor; the rest has to show the slope."""

WORTH_A_FLOOR = 0.9
"""A floor is taken if it brings errors below this share of those without one: noise alone would fit one, too."""

MOST_ERROR = 0.25
"""Median error above which times tell more about other programs than about micro-batches. On a machine with four times
as many busy programs as cores it was 45 %, and constants came out at half and at none of their values."""

WORTH_IT = 0.9
"""Measured constants are taken if they bring the error below this share of the modelled ones'."""

ROUNDS = 30
LEAST_ERROR = 1e-3
"""Rounds in which least squares are weighted anew to become least absolute errors, and the relative error up to which
squares stay squares. What adds less than that to any of the times counts as nothing."""


@dataclass(frozen=True, kw_only=True)
class Timed:
    """A micro-batch of `rows` rows padded to `width` took so many `seconds`, forward and backward."""

    rows: int
    width: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The cost that plans are made with, and what it was found from.

    Attributes:
        cost: as measured, or as modelled where measuring did not help.
        num_micro_batches: that were measured.
        error: median of the relative errors of its predictions of those that it was not fitted to; `None` if there
            were too few, or too much alike.
        modelled_error: the same of the modelled cost.
        why_modelled: why it is as modelled; empty if it is as measured.
    """

    cost: Cost
    num_micro_batches: int = 0
    error: float | None = None
    modelled_error: float | None = None
    why_modelled: str = ""

    def described(self, modelled: Cost) -> str:
        """What was found out, in one line; `modelled` is the cost to compare with."""
        if self.why_modelled:
            return f"plans stay with the modelled cost of micro-batches: {self.why_modelled}."
        floor = f", and at least {self.cost.floor:,.0f} ({modelled.floor:,.0f})" if modelled.floor else ""
        return (
            f"plans follow the cost of {self.num_micro_batches:,} micro-batches that were measured, predicted within "
            f"{self.error:.1%} (median; by the modelled cost {self.modelled_error:.1%}). In units of a token's, a "
            f"micro-batch costs {self.cost.overhead:,.0f} by itself (modelled {modelled.overhead:,.0f}), a pair of "
            f"positions {self.cost.attention:.2g} ({modelled.attention:.2g}){floor}."
        )


def calibrated(timed: Sequence[Timed], modelled: Cost) -> Calibration:
    """The cost that the times tell; as modelled, where they do not tell it or do not speak for it."""
    timed = [one for one in timed if one.seconds > 0]
    as_modelled = Calibration(cost=modelled, num_micro_batches=len(timed))
    if len(timed) < FEWEST:
        few = f"{len(timed):,} micro-batches were measured, {FEWEST} are the least"
        return replace(as_modelled, why_modelled=few)
    all_times = _Times.of(timed)
    is_held_out = np.random.default_rng(0).permutation(len(timed)) % HELD_OUT == 0
    others, held_out = all_times.part(~is_held_out), all_times.part(is_held_out)
    tried, fitted = _fitted(others, modelled), _fitted(all_times, modelled)
    if tried is None or fitted is None:
        alike = (
            f"the {len(timed):,} micro-batches that were measured do not tell what one costs by itself from what its "
            "tokens cost"
        )
        return replace(as_modelled, why_modelled=alike)
    error, modelled_error = (_median_error(cost, others, held_out) for cost in (tried, modelled))
    if error <= min(MOST_ERROR, WORTH_IT * modelled_error):
        return Calibration(cost=fitted, num_micro_batches=len(timed), error=error, modelled_error=modelled_error)
    why = (
        f"it predicts the {len(timed):,} micro-batches that were measured within {modelled_error:.1%} (median), and "
        f"constants fitted to them within {error:.1%}, which is {_verdict(error)}"
    )
    return replace(as_modelled, error=modelled_error, modelled_error=modelled_error, why_modelled=why)


def _verdict(error: float) -> str:
    return "hardly better" if error <= MOST_ERROR else "far off, as where other programs run beside"


class _Times(NamedTuple):
    """Micro-batches as arrays, `[micro-batches]`."""

    rows: Floats
    width: Floats
    seconds: Floats

    @classmethod
    def of(cls, timed: Sequence[Timed]) -> "_Times":
        columns = np.array([(one.rows, one.width, one.seconds) for one in timed], dtype=np.float64).T
        return cls(*columns)

    def part(self, chosen: Any) -> "_Times":
        return _Times(self.rows[chosen], self.width[chosen], self.seconds[chosen])


def _median_error(cost: Cost, known: _Times, asked: _Times) -> float:
    """Of the times of some micro-batches, predicted by a cost whose unit of time is found from others."""
    unit = np.median(known.seconds / cost(known.rows, known.width))
    return float(np.median(np.abs(unit * cost(asked.rows, asked.width) / asked.seconds - 1)))


def _spread(values: Floats) -> float:
    """How many times larger the large ones are than the small ones, a few of either aside."""
    small, large = np.quantile(values, (0.1, 0.9))
    return float(large / small)


def _fitted(times: _Times, modelled: Cost) -> Cost | None:
    """The cost with the least sum of absolute relative errors; `None` where no cost of a micro-batch by itself shows.

    A floor only where one is modelled: the smallest micro-batches, some share of all, are then taken to cost it.
    """
    work = times.rows * modelled.of_row(times.width)
    best, least = None, np.inf
    for share in FLAT_SHARES if modelled.floor else FLAT_SHARES[:1]:
        is_flat = work < np.quantile(work, share)
        if _spread(work[~is_flat]) < LEAST_SPREAD or (fit := _fit(times, work, is_flat, modelled)) is None:
            continue
        cost, unit = fit
        error = float(np.abs(unit * cost(times.rows, times.width) / times.seconds - 1).sum())
        if error < least * (WORTH_A_FLOOR if cost.floor else 1):
            best, least = cost, error
    return best


def _fit(times: _Times, work: Floats, is_flat: Any, modelled: Cost) -> tuple[Cost, float] | None:
    """A cost and its unit of time in seconds; pairs cost as modelled, in cells, unless widths tell what they cost."""
    if _spread(times.width[~is_flat]) >= LEAST_SPREAD:
        cells = times.rows * times.width
        overhead, floor, cell, pair = _solution([cells, cells * times.width], is_flat, times.seconds)
        if cell > 0 and overhead + floor > 0:
            fitted = replace(modelled, overhead=overhead / cell, attention=pair / cell, floor=floor / cell)
            return fitted, cell
    overhead, floor, unit = _solution([work], is_flat, times.seconds)
    if unit > 0 and overhead + floor > 0:
        return replace(modelled, overhead=overhead / unit, floor=floor / unit), unit
    return None


def _solution(terms: list[Floats], is_flat: Any, seconds: Floats) -> list[float]:
    """Seconds of each micro-batch, further ones of the flat, and those of a unit of each term in the others."""
    columns = [np.ones(len(seconds)), is_flat.astype(np.float64), *(np.where(is_flat, 0, term) for term in terms)]
    return _least_absolute(np.stack(columns, axis=1) / seconds[:, None])


def _least_absolute(relative: Floats) -> list[float]:
    """The factors, none negative, with which the columns add up to one in every row, but for the least sum of absolute
    errors: weighted least squares, again and again, each row weighted by one over its error."""
    weights = np.ones(len(relative))
    for _ in range(ROUNDS):
        factors = _least_squares(relative * weights[:, None], weights)
        weights = np.maximum(np.abs(relative @ factors - 1), LEAST_ERROR) ** -0.5
    is_noise = relative.max(axis=0) * factors < LEAST_ERROR
    return [float(factor) for factor in np.where(is_noise, 0, factors)]


def _least_squares(columns: Floats, target: Floats) -> Floats:
    """The best factors, none negative: the best of those that some of the columns get without that condition."""
    scale = np.maximum(np.abs(columns).max(axis=0), np.finfo(np.float64).tiny)
    best, least = np.zeros(columns.shape[1]), np.inf
    used = [index for index in range(columns.shape[1]) if columns[:, index].any()]
    for count in range(1, len(used) + 1):
        for chosen in map(list, combinations(used, count)):
            values = np.linalg.lstsq(columns[:, chosen] / scale[chosen], target, rcond=None)[0]
            error = float(np.square(columns[:, chosen] @ (values / scale[chosen]) - target).sum())
            if (values >= 0).all() and error < least:
                best, least = np.zeros(columns.shape[1]), error
                best[chosen] = values / scale[chosen]
    return best
