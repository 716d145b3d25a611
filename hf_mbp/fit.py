"""Fits what micro-batches of any shape need from a few that were measured, and says how well a held-out one is met."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from hf_mbp.plan import Budget, Floats

SAFETY = 1.2
"""Predicted bytes are raised by this factor, until the device itself is asked: operators allocate scratch memory that
no tracker sees, allocators round up, and fragmentation takes its part."""

Measured: TypeAlias = tuple[int, float, int]
"""Rows, width, and the peak bytes of the activations of a micro-batch."""

TOLERANCE = 1e-9
"""Relative errors that differ by less count as equal."""

TERMS = ((1, 2), (1,), (2,), (0, 1, 2), (0, 1), (0, 2))
"""Which of fixed bytes, bytes a cell and bytes a pair a fit may have; of equally good ones the first, so that what does
not grow is only found where several numbers of rows show it: counting it as growing is the safe side."""


def fit_budget(measured: Sequence[Measured], max_bytes: float) -> Budget:
    """The budget that keeps activations under `max_bytes`, from a few measured shapes.

    The bytes of a shape are taken as `fixed + rows x (a x width + b x width^2)`, with what fits best in relative terms
    and has no negative part; then raised until no measured shape is predicted too small, and by `SAFETY`.

    Example:
        >>> fit_budget([(1, 10, 1000), (1, 100, 20000)], max_bytes=10**6).tokens_at(100)
        4166
    """
    fixed, per_cell, per_pair = _fitted(measured)
    plain = Budget(bytes_fixed=fixed, bytes_per_cell=per_cell, bytes_per_pair=per_pair)
    short = max(size / max(plain.bytes(rows, width), TOLERANCE) for rows, width, size in measured)
    factor = SAFETY * max(1.0, short)
    return Budget(
        max_bytes=float(max_bytes),
        bytes_fixed=factor * fixed,
        bytes_per_cell=factor * per_cell,
        bytes_per_pair=factor * per_pair,
    )


def held_out_error(measured: Sequence[Measured], held_out: Measured) -> float:
    """How far, in parts of what it really needs, a shape is from what is fitted to the others."""
    fixed, per_cell, per_pair = _fitted(measured)
    rows, width, size = held_out
    predicted = Budget(bytes_fixed=fixed, bytes_per_cell=per_cell, bytes_per_pair=per_pair).bytes(rows, width)
    return abs(float(predicted) / max(1, size) - 1)


def _fitted(measured: Sequence[Measured]) -> tuple[float, float, float]:
    """Fixed bytes, bytes a cell and bytes a pair, none negative: the least squares of relative errors.

    With three unknowns the best non-negative solution is the best of those with some of them zero.
    """
    shapes = np.array([(1, rows * width, rows * width**2) for rows, width, _ in measured], dtype=np.float64)
    sizes = np.array([max(1, size) for *_, size in measured], dtype=np.float64)
    best, least = np.zeros(3), np.inf
    for terms in TERMS:
        if len(terms) > len(measured):
            continue
        solution = _solution(shapes / sizes[:, None], list(terms))
        error = float(np.abs(shapes @ solution / sizes - 1).max())
        if (solution >= 0).all() and error < least - TOLERANCE:
            best, least = solution, error
    return float(best[0]), float(best[1]), float(best[2])


def _solution(relative: Floats, terms: list[int]) -> Floats:
    """Least squares with only some of the terms, the columns brought to one size."""
    scale = relative[:, terms].max(axis=0)
    values = np.linalg.lstsq(relative[:, terms] / scale, np.ones(len(relative)), rcond=None)[0]
    solution = np.zeros(relative.shape[1])
    solution[terms] = values / scale
    return solution
