"""Row lengths: drawn, of the recipes' texts, and of texts of which only the lengths are kept."""

from __future__ import annotations

import json
import lzma
import re
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"

LENGTHS = DATA / "lengths.json"
"""Written by `scripts/prepare_lengths.py`."""


def lognormal(count: int, mean: float, sigma: float, low: int, high: int) -> list[int]:
    """Lengths like those of texts: many short, a few long."""
    random = np.random.default_rng(0)
    return [int(length) for length in np.clip(random.lognormal(mean, sigma, count), low, high)]


def of_texts(file: str, field: str, count: int) -> list[int]:
    """Of the first texts of a recipe's data, clipped to 8..256."""
    with lzma.open(DATA / file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)[field] for _, line in zip(range(count), lines, strict=False)]
    return [min(256, max(8, count_tokens(text))) for text in texts]


def of_functions(count: int, longest: int) -> list[int]:
    """Of functions of the Python standard library with their docstrings, cut at `longest`."""
    return [min(longest, length) for length in _kept("functions")[:count]]


def of_documents(count: int, share: float) -> list[int]:
    """Of documents of the Brown corpus, the first `share` of each, so that they vary as whole ones do."""
    return [round(length * share) for length in _kept("brown")[:count]]


def count_tokens(text: str) -> int:
    """Words and punctuation marks.

    Example:
        >>> count_tokens("def answer(): return 42")
        7
    """
    return len(re.findall(r"\w+|[^\w\s]", text))


def _kept(name: str) -> list[int]:
    lengths: list[int] = json.loads(LENGTHS.read_text(encoding="utf-8"))[name]["lengths"]
    return lengths
