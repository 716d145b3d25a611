"""Spoils what is right: bytes, texts and values, a little at a time and at random."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, 5e-324),
    *(float("inf"), float("-inf"), float("nan")),
    *("", " ", "x", "no", "0", "-1", "1e999", "nan", "\0", "é", "\ud800", "a\nb", "/", "..", "{}", "x" * 5000),
    *([], {}, [[]], [None], [{}], {"": None}, {"a": {"b": []}}, ["a", 1, None], {"version": 99}),
)
"""What stands where something else should: other types, the ends of ranges, texts that no file system takes."""

ODD_WORDS: tuple[bytes, ...] = (
    *(b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\n", b"\n\n", b"\t", b"\\", b'"', b"'", b","),
    *(b"[", b"]", b"{", b"}", b":", b"null", b"true", b"NaN", b"Infinity", b"1e999", b"-", b"\xe2\x80\xa8", b"\\ud800"),
)
"""Pieces that files are broken with: other encodings, marks of JSON and CSV, numbers that are none."""

MOST_SPOILED = 4
"""Changes at once. With more, little is left of what was right, and all is refused by the first thing that looks."""

DEEP = 3000
"""Brackets in each other: three times what Python descends."""

LARGE = 1 << 20
"""Bytes that no input grows beyond."""


def spoiled_bytes(random: Random, data: bytes, words: Sequence[bytes] = ODD_WORDS) -> bytes:
    """Some bytes with a few changes."""
    for _ in range(random.randint(1, MOST_SPOILED)):
        data = _spoiled_once(random, data, words)[:LARGE]
    return data


def _spoiled_once(random: Random, data: bytes, words: Sequence[bytes]) -> bytes:
    start, end = sorted(random.randrange(len(data) + 1) for _ in range(2))
    end = min(end, start + random.choice([1, 4, 16, 256]))
    part = data[start:end]
    way = random.randrange(9)
    if way == 0:
        part = bytes(byte ^ (1 << random.randrange(8)) for byte in part)
    elif way == 1:
        part = b""
    elif way == 2:
        part *= random.choice([2, 3, 50])
    elif way == 3:
        part = random.randbytes(random.choice([1, 3, 20]))
    elif way == 4:
        return data[:start]
    elif way == 5:
        return data[:start] + data[end:] + part
    elif way == 6 and random.randrange(4) == 0:
        opening, closing = random.choice([(b"[", b"]"), (b'{"a":', b"}"), (b"(", b")")])
        part = opening * DEEP + part + closing * DEEP
    else:
        part = random.choice(words)
    return data[:start] + part + data[end:]


def spoiled_value(random: Random, value: Any) -> Any:
    """A tree of dictionaries and lists, as JSON has it, with a few changes."""
    value = copy.deepcopy(value)
    for _ in range(random.randint(1, MOST_SPOILED)):
        places = list(_places(value))
        if not places:
            return random.choice(ODD_VALUES)
        _spoil_place(random, *random.choice(places))
    return random.choice(ODD_VALUES) if random.randrange(50) == 0 else value


def _places(value: Any) -> Any:
    """All the places in a tree: containers with the keys or indices in them."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def _spoil_place(random: Random, container: Any, key: Any) -> None:
    way = random.randrange(8)
    if way == 0:
        del container[key]
    elif way == 1 and isinstance(container, dict):
        container[random.choice(["", "x", str(key) + " ", str(key).upper(), "version"])] = container.pop(key)
    elif way == 2:
        container[key] = random.choice(([container[key]], {"a": container[key]}, str(container[key])))
    elif way == 3 and isinstance(container[key], (int, float)):
        container[key] = container[key] * random.choice((-1, 0, 1000, 1e-9, 1e300))
    else:
        container[key] = copy.deepcopy(random.choice(ODD_VALUES))
