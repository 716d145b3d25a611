"""Model FLOPs: what forward and backward of rows without padding need, and what a device could do."""

from __future__ import annotations

from typing import Any

import torch

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, from the data sheets (SXM), by what the device's name has in it."""


def model_flops(model: Any, tokens: int, pairs: int) -> float:
    """Six for each weight that a token is multiplied with, and twelve a layer and hidden unit for each pair.

    After PaLM (2022), appendix B: recomputation does not count, and causal attention counts whole. `pairs` are the
    pairs of positions in a row, summed over rows.
    """
    config = model.config
    attention = 12 * config.num_hidden_layers * config.hidden_size
    return 6.0 * multiplied_weights(model) * tokens + float(attention) * pairs


def multiplied_weights(model: Any) -> int:
    """All but the tables in which tokens are looked up; a head that shares one multiplies, too."""
    tables = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    head = model.get_output_embeddings()
    tied = head.weight.numel() if head is not None and id(head.weight) in tables else 0
    return sum(parameter.numel() for parameter in model.parameters()) - sum(tables.values()) + tied


def peak_flops(device_name: str, dtype: str) -> float | None:
    """What the device could do in a second; `None` where that is not known."""
    if dtype != "bfloat16":
        return None
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)
