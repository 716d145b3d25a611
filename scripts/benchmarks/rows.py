"""Rows of tokens from which something can be learned in a few steps, and how they are padded."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

Rows = list[dict[str, Any]]

PADDING, FIRST_WORD = 0, 5
"""Token that pads, and the first of those that rows are made of."""

CLASSES = 2


def rows_to_classify(lengths: list[int], vocabulary: int) -> Rows:
    """Random tokens after a word that tells the class; a model learns it in a few steps."""
    random = np.random.default_rng(0)
    rows = []
    for length in lengths:
        ids, label = random.integers(FIRST_WORD, vocabulary, length), int(random.integers(CLASSES))
        ids[0] = FIRST_WORD + label
        rows.append({"input_ids": ids.tolist(), "labels": label})
    return rows


def rows_to_continue(lengths: list[int], vocabulary: int) -> Rows:
    """Tokens as frequent as the words of a text are, the second of every two told by the first.

    The frequencies are what a language model learns in a few steps.
    """
    random = np.random.default_rng(0)
    words = vocabulary - FIRST_WORD
    frequencies = 1 / (np.arange(words) + 10.0)  # Zipf's law, in Mandelbrot's form
    frequencies /= frequencies.sum()
    rows = []
    for length in lengths:
        ids = random.choice(words, length, p=frequencies)
        ids[1::2] = (ids[: length // 2 * 2 : 2] + 1) % words
        rows.append({"input_ids": (FIRST_WORD + ids).tolist()})
    return rows


def pad(rows: Rows) -> dict[str, torch.Tensor]:
    """Pads with zeros to the longest row; where rows have no labels, their tokens are the labels."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    has_labels = "labels" in rows[0]
    labels = torch.tensor([row["labels"] for row in rows]) if has_labels else ids.masked_fill(ids == PADDING, -100)
    return {"input_ids": ids, "attention_mask": (ids != PADDING).long(), "labels": labels}
