"""Sizes of memory as people write and read them."""

from typing import Any

import pytest
import torch

from hf_mbp.byte_sizes import format_bytes, parse_memory_limit
from tests.examples import examples

quick = examples(100)

CPU = torch.device("cpu")
KILO = 1000  # elements of float32: 4,000 bytes


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, None),
        (0.8, 0.8),
        ("0.8", 0.8),
        (".5", 0.5),
        (1, 1.0),
        (1.0, 1.0),
        ("20GiB", 20 * 2**30),
        ("20 gib", 20 * 2**30),
        ("20Gi", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("20G", 20 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("0.5GB", 5 * 10**8),
        ("500 KB", 500_000),
        ("1TiB", 2**40),
        ("1B", 1),
        ("1234567", 1234567),
        (10**9, 10**9),
        (1e9, 10**9),
        (" 7 MB ", 7 * 10**6),
    ],
)
def test_sizes_and_fractions(value: Any, limit: Any) -> None:
    parsed = parse_memory_limit(value)
    assert parsed == limit
    assert type(parsed) is type(limit)


@pytest.mark.parametrize(
    "value",
    [
        "much",
        "",
        "GiB",
        "20iB",
        "20 GiBs",
        "20PiB",
        "-1GiB",
        -0.5,
        0,
        "0",
        "0GiB",
        "0.2B",
        "1,5GiB",
        True,
        20,
        1.5,
        float("nan"),
        float("inf"),
        "1e400GiB",
        "1e400",
    ],
)
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is neither a size nor a fraction") as error:
        parse_memory_limit(value)
    assert f"memory_limit={value!r}" in str(error.value)
    assert 'Write for example memory_limit="20GiB"' in str(error.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
