"""Entities in a sequence of tags, and how many of them were found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

OUTSIDE = "O"

Entity = tuple[str, int, int]  # kind, first word, behind the last word


def are_entity_tags(names: Iterable[str]) -> bool:
    """Whether tags mark entities: some are ``B-KIND`` or ``I-KIND``, and all others are ``O``."""
    names = set(names) - {OUTSIDE}
    return bool(names) and all(name[:2] in ("B-", "I-") and len(name) > 2 for name in names)


def entities(tags: Sequence[str]) -> set[Entity]:
    """Return the entities of one sequence of tags.

    An entity starts with ``B-KIND``, or with an ``I-KIND`` that follows no tag of its kind, and goes on as long as
    ``I-KIND`` follows: tags that begin each entity with B and tags that do so only between neighbours are both read.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [('LOC', 3, 4), ('LOC', 4, 5), ('PER', 0, 2)]
    """
    starts = [
        index
        for index, (before, tag) in enumerate(pairwise([OUTSIDE, *tags]))
        if tag != OUTSIDE and (tag.startswith("B-") or before[2:] != tag[2:])
    ]
    return {(tags[start][2:], start, _end(tags, start)) for start in starts}


def _end(tags: Sequence[str], start: int) -> int:
    inside = "I-" + tags[start][2:]
    return next((index for index in range(start + 1, len(tags)) if tags[index] != inside), len(tags))


def entity_f1(predictions: Iterable[Sequence[str]], references: Iterable[Sequence[str]]) -> float:
    """Return F1 over the entities of all sequences together, as the CoNLL-2003 shared task defines it.

    An entity counts as found if kind, first and last word are those of the reference. With precision the share of the
    predicted entities that are in the reference, and recall the share of the reference's that were predicted, F1 is
    their harmonic mean, 2 x found / (predicted + in the reference); it is 0 where there are neither.

    >>> entity_f1([["B-PER", "O", "B-LOC"]], [["B-PER", "O", "O"]])
    0.6666666666666666
    """
    found = total = 0
    for predicted, expected in zip(predictions, references, strict=True):
        ours, theirs = entities(predicted), entities(expected)
        found += len(ours & theirs)
        total += len(ours) + len(theirs)
    return 2 * found / total if total else 0.0
