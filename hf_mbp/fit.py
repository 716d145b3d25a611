"""Fits what micro-batches of any shape need from a few that were measured, and says how well a held-out one is met."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from hf_mbp.arrays import Floats
from hf_mbp.plan import Budget

SAFETY = 1.2
"""Predicted bytes are raised by this factor, until the device itself is asked: operators allocate scratch memory that
no tracker sees, allocators round up, and fragmentation takes its part."""

Measured: TypeAlias = tuple[int, float, int]
"""Rows, width, and the peak bytes of the activations of a micro-batch."""

TOLERANCE = 1e-9
"""Relative errors that differ by less count as equal."""

TERMS = ((0, 1), (0,), (1,))
"""Which of cells and pairs of positions a fit may use; of equally good ones the first."""


def fit_budget(measured: Sequence[Measured], max_bytes: float) -> Budget:
    """The budget that keeps activations under `max_bytes`, from a few measured shapes.

    The bytes of a shape are taken as `rows x (a x width + b x width^2)`, with what fits best in relative terms and has
    no negative part, and as at least those of the smallest of three shapes or more; then raised until no measured shape
    is predicted too small, and by `SAFETY`. Shapes of one width do not tell cells from pairs: all is then taken to grow
    with cells, which is enough for narrower rows, but too little for much wider ones.

    A constant is no part of the sum on purpose. The peak of a pass is that of one of its moments, and the moments of a
    small micro-batch, when it makes the gradient of an embedding, are others than those of a large one, when it has all
    its activations: a line through both would have too little slope.

    Example:
        >>> fit_budget([(1, 10, 1000), (1, 100, 20000)], max_bytes=10**6).tokens_at(100)
        4166
    """
    plain = _fitted(measured)
    short = max(size / max(float(plain.bytes(rows, width)), TOLERANCE) for rows, width, size in measured)
    factor = SAFETY * max(1.0, short)
    return Budget(
        max_bytes=float(max_bytes),
        bytes_fixed=SAFETY * plain.bytes_fixed,
        bytes_per_cell=factor * plain.bytes_per_cell,
        bytes_per_pair=factor * plain.bytes_per_pair,
    )


def held_out_error(measured: Sequence[Measured], held_out: Measured) -> float:
    """How far, in parts of what it really needs, a shape is from what is fitted to the others."""
    rows, width, size = held_out
    return abs(float(_fitted(measured).bytes(rows, width)) / max(1, size) - 1)


def _fitted(measured: Sequence[Measured]) -> Budget:
    """What fits best, without a cap: with two unknowns the best non-negative solution is the best of those with one
    or none of them zero."""
    *larger, smallest = sorted(measured, key=lambda shape: -shape[0] * shape[1])
    floor = smallest[2] if len(measured) > 2 else 0
    growing = larger if floor else measured
    shapes = np.array([(rows * width, rows * width**2) for rows, width, _ in growing], dtype=np.float64)
    sizes = np.array([max(1, size) for *_, size in growing], dtype=np.float64)
    best, least = np.zeros(2), np.inf
    for terms in TERMS if _widths_differ(growing) else TERMS[1:2]:
        solution = _solution(shapes / sizes[:, None], list(terms))
        error = float(np.abs((shapes * solution).sum(axis=1) / sizes - 1).max())
        if (solution >= 0).all() and error < least - TOLERANCE:
            best, least = solution, error
    return Budget(bytes_fixed=float(floor), bytes_per_cell=float(best[0]), bytes_per_pair=float(best[1]))


def _widths_differ(measured: Sequence[Measured]) -> bool:
    widths = [width for _, width, _ in measured]
    return max(widths) > (1 + TOLERANCE) * min(widths)


def _solution(relative: Floats, terms: list[int]) -> Floats:
    """Least squares of relative errors with only some of the terms, the columns brought to one size.

    By hand: the first call of one of NumPy's own solvers or products has OpenBLAS take 32 MiB of address space, and end
    the process where `RLIMIT_AS` does not leave them in one piece.
    """
    scale = relative[:, terms].max(axis=0)
    solution = np.zeros(relative.shape[1])
    solution[terms] = _least_squares(relative[:, terms] / scale) / scale
    return solution


def _least_squares(columns: Floats) -> Floats:
    """The factors with which one or two columns best add up to ones; zeros for two that are alike."""
    first, last = columns[:, 0], columns[:, -1]
    a, b, c = (first * first).sum(), (first * last).sum(), (last * last).sum()
    if columns.shape[1] == 1:
        return np.array([first.sum() / a])
    determinant = a * c - b * b
    if determinant <= TOLERANCE * a * c:
        return np.zeros(2)
    factors: Floats = np.array([c * first.sum() - b * last.sum(), a * last.sum() - b * first.sum()]) / determinant
    return factors
