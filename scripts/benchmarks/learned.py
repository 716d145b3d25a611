"""What a model has learned: its loss over the rows that it was trained on."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.rows import Rows, pad

ROWS = 8
"""At once, of like length; the loss does not depend on it but for rounding."""


@torch.no_grad()
def loss_over(model: Any, rows: Rows) -> float:
    """Mean over all items, in plain PyTorch, float32 and without dropout."""
    model.eval()
    device = next(model.parameters()).device
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    total = items = 0.0
    for start in range(0, len(rows), ROWS):
        inputs = {key: value.to(device) for key, value in pad(by_length[start : start + ROWS]).items()}
        count = num_items(inputs["labels"])
        total += float(model(**inputs).loss) * count
        items += count
    return total / items


def num_items(labels: torch.Tensor) -> int:
    """What a mean is over: rows, or tokens that have a token before them."""
    return len(labels) if labels.ndim == 1 else int((labels[:, 1:] != -100).sum())
