"""The orders of rows in which groups of neighbours waste little. Pure; knows no torch.

Rows of one length are sorted by it: no other groups are better. Rows of several lengths, which are padded separately,
have no such order. A group pads little if its rows are near each other in all lengths, so they are put on a curve that
goes through all places and leaves none before it has been everywhere near it (Hilbert, 1891). If lengths depend on each
other, as in translation, rows sorted by their longer part are often better, or, of few rows, what is on the curve seen
from the opposite corner. So these three are compared, and, of very few rows, the orders by each part.
"""

from itertools import pairwise

import numpy as np

from hf_mbp.arrays import Ints

MOST_COMPARED = 2048
"""Rows of several lengths up to which all orders are tried: three plans of so many take as long as one of 8,192 rows.
Of more rows only the curve is: it was the best then in all cases that `scripts/pair_orders.py` simulates."""

FEW = 16
"""Rows up to which the orders by each part are tried: of unrelated lengths these are the best now and then, the
fewer the rows the more often."""

MOST_BITS = 62
"""Of a place on the curve, in all parts together."""


def orders_of(sizes: Ints) -> list[Ints]:
    """Orders of the rows, one of which is to be cut into groups, for `sizes` `[rows, parts]`."""
    if sizes.shape[1] == 1 or not len(sizes):
        return [np.argsort(-sizes[:, 0], kind="stable")]
    from_the_longest = _along_curve(sizes.max(axis=0) - sizes)
    if len(sizes) > MOST_COMPARED:
        return [from_the_longest]
    by_longer_part = np.lexsort((-sizes.sum(axis=1), -sizes.max(axis=1)))
    by_each_part = [np.argsort(-part, kind="stable") for part in sizes.T] if len(sizes) <= FEW else []
    return [*by_each_part, by_longer_part, from_the_longest, _along_curve(sizes - sizes.min(axis=0))]


def _along_curve(places: Ints) -> Ints:
    """The order in which the curve comes to places `[rows, parts]`, none of which is negative.

    After the program of Skilling (Programming the Hilbert curve, 2004): coordinates become digits of the distance from
    the start, the turns of the curve are undone from its largest to its smallest.
    """
    num_bits = int(places.max()).bit_length()
    kept_bits = min(num_bits, MOST_BITS // places.shape[1])
    parts = list((places >> (num_bits - kept_bits)).T.copy())
    for bit in reversed(range(1, kept_bits)):
        below = (1 << bit) - 1
        for part in parts:
            is_far = part >> bit & 1 == 1
            swapped = np.where(is_far, 0, (parts[0] ^ part) & below)
            parts[0] ^= np.where(is_far, below, swapped)
            part ^= swapped
    for before, part in pairwise(parts):
        part ^= before
    flipped = np.zeros_like(parts[0])
    for bit in range(1, kept_bits):
        flipped ^= np.where(parts[-1] >> bit & 1 == 1, (1 << bit) - 1, 0)
    distance = np.zeros_like(flipped)
    for bit in reversed(range(kept_bits)):
        for part in parts:
            distance = distance << 1 | (part ^ flipped) >> bit & 1
    return np.argsort(distance, kind="stable")
