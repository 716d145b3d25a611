"""From measurements to medians, spreads and ratios."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median
from typing import Any

from benchmarks.contestants import BASELINE, LIMIT

Record = dict[str, Any]
"""The fields of an order and of its measurement."""


def summary(records: list[Record]) -> list[Record]:
    """An entry for each contestant in each place (workload and shape), in the order in which they ran.

    Ratios are between measurements of the same repetition, so that what slows the machine for a while slows both.
    """
    keys = dict.fromkeys((r["workload"], r["shape"], r["contestant"]) for r in records)
    return [_entry(key, records) for key in keys]


def _entry(key: tuple[str, str, str], records: list[Record]) -> Record:
    workload, shape, contestant = key
    place = [r for r in records if (r["workload"], r["shape"]) == (workload, shape)]
    own = [r for r in place if r["contestant"] == contestant]
    entry: Record = {"workload": workload, "size": own[0]["size"], "shape": shape, "contestant": contestant}
    if errors := [r["error"] for r in own if r["error"]]:
        return {**entry, "error": errors[0]}
    pairs, beside_limit = _pairs(own, place, BASELINE), _pairs(own, place, LIMIT)
    return {
        **entry,
        "error": "",
        "tokens_per_second": spread(tokens_per_second(r) for r in own),
        "speed_ratio": spread(tokens_per_second(r) / tokens_per_second(base) for r, base in pairs),
        "share_of_limit": spread(tokens_per_second(r) / tokens_per_second(limit) for r, limit in beside_limit),
        "padding_fraction": median(1 - r["tokens"] / r["cells"] for r in own),
        "micro_batches_per_step": median(r["micro_batches"] / r["steps"] for r in own),
        "peak_bytes": spread(r["peak_bytes"] for r in own),
        "memory_ratio": spread(r["peak_bytes"] / base["peak_bytes"] for r, base in pairs if base["peak_bytes"]),
        "flops_per_second": spread(r["flops"] / r["seconds"] for r in own),
        "held_bytes": spread(r["base_bytes"] + r["peak_bytes"] for r in own),
        "loss": spread(r["loss"] for r in own),
        "setup_seconds": spread(r["setup_seconds"] for r in own),
    }


def tokens_per_second(record: Record) -> float:
    """Tokens that are not padding, a second."""
    return float(record["tokens"] / record["seconds"])


def _pairs(own: list[Record], place: list[Record], other: str) -> list[tuple[Record, Record]]:
    """Measurements of a contestant, each with that of another one in the same repetition."""
    others = [record for record in place if record["contestant"] == other and not record["error"]]
    return [(record, base) for record in own for base in others if base["repetition"] == record["repetition"]]


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and extremes; `None` where there is nothing.

    Example:
        >>> spread([3, 1, 2])
        {'median': 2, 'min': 1, 'max': 3}
    """
    numbers = list(values)
    return {"median": median(numbers), "min": min(numbers), "max": max(numbers)} if numbers else None
