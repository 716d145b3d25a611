"""Sizes of memory as people write and read them. Knows no torch."""

import re
from math import inf

SMALLEST_LIMIT = 2**20
"""Bytes below which a number without a unit is taken for a slip: memory_limit=20 hardly means 20 bytes."""

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_memory_limit(value: float | str | None) -> float | int | None:
    """A memory limit as a fraction (float, up to 1) or a number of bytes (int).

    Raises:
        ValueError: `value` is neither.

    Example:
        >>> parse_memory_limit("20GiB"), parse_memory_limit("500 MB"), parse_memory_limit("0.8")
        (21474836480, 500000000, 0.8)
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:E[+-]?[0-9]+)?)\s*(?:([KMGT]I?|)B?)\s*", str(value).upper())
    if match:
        number, size = float(match[1]), float(match[1]) * _UNITS[match[2]]
        has_unit = not match[0].strip()[-1].isdigit()
        if 0 < number <= 1 and not has_unit:
            return number
        if (1 if has_unit else SMALLEST_LIMIT) <= size < inf:
            return int(size)
    raise ValueError(
        f"memory_limit={value!r} is neither a size nor a fraction of the device's memory. Write for example "
        'memory_limit="20GiB", or memory_limit=0.8 for 80 % of the memory.'
    )


def format_bytes(size: float) -> str:
    """A size for people.

    Example:
        >>> format_bytes(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")
