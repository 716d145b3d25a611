"""What padding does to a row, and how a row is made independent of it."""

from typing import Any

import torch

from hf_mbp.collate import Inputs

IGNORE_INDEX = -100
"""Label that no loss counts, in all of transformers and PyTorch."""


def width_of(inputs: Inputs) -> int | None:
    """Padded length of collated inputs with a two-dimensional `attention_mask`; `None` without one."""
    mask = inputs.get("attention_mask")
    return mask.shape[1] if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None


def is_left_padded(inputs: Inputs) -> bool:
    """Whether the padding of the collated inputs stands before the rows."""
    if width_of(inputs) in (None, 0):
        return False
    mask = inputs["attention_mask"]
    return bool(((mask[:, 0] == 0) & (mask[:, -1] != 0)).any())


def trim(inputs: Inputs) -> Inputs:
    """Collated inputs without the columns in which every row is padding."""
    width = width_of(inputs)
    if width is None:
        return inputs
    used = (inputs["attention_mask"] != 0).any(dim=0).nonzero()
    if not len(used):
        return inputs
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return {
        key: value[:, columns].contiguous() if _has_columns(value, width) else value for key, value in inputs.items()
    }


def without_padding(inputs: Inputs) -> Inputs:
    """The last row alone, unpadded, its last token made a label, so that it has a loss."""
    num_rows = len(inputs["attention_mask"])
    row = {
        key: value[-1:] if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_rows else value
        for key, value in inputs.items()
    }
    row = trim(row)
    labels = row["labels"].clone()
    labels[:, -1] = labels.clamp(min=0)[:, -1]
    return {**row, "labels": labels}


def cut_columns(inputs: Inputs, width: int) -> Inputs:
    """Rows cut to `width` tokens: the first ones and the last, which some models look for.

    Cut is what has as many columns as `input_ids`.
    """
    token_ids = inputs.get("input_ids")
    if not isinstance(token_ids, torch.Tensor) or token_ids.shape[-1] <= width:
        return inputs
    full = token_ids.shape[-1]
    kept = [*range(width - 1), full - 1]
    return {key: _cut(value, full, kept) for key, value in inputs.items()}


def _cut(value: Any, full: int, kept: list[int]) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if _has_columns(value, full):
        return value[:, kept].contiguous()
    if value.shape[-1] == full and not value.is_floating_point():
        return value[..., kept].contiguous()
    return value


def with_padding(inputs: Inputs) -> Inputs:
    """Inputs whose first row ends in padding: without any, models leave out the mask, and the memory it takes."""
    width = width_of(inputs)
    if width is None or width < 2:
        return inputs
    mask = inputs["attention_mask"].clone()
    mask[0, -1] = 0
    return {**inputs, "attention_mask": mask}


def _has_columns(value: Any, width: int) -> bool:
    """Whether a value has a column for each token; floats in two dimensions are targets of a row."""
    if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != width:
        return False
    return value.ndim > 2 or not value.is_floating_point()


def settle_left_padding(inputs: Inputs, *, add_position_ids: bool) -> Inputs:
    """Makes left-padded rows of a loss that shifts its labels independent of the width they are padded to.

    In a left-padded batch the first token of a row is a target, predicted from the pad token before it, unless the
    row is the longest one: which tokens count would depend on the grouping. Here the first token never is a target,
    as it never is without padding. Positions are counted from the first token, again as without padding.
    """
    if not is_left_padded(inputs):
        return inputs
    mask = inputs["attention_mask"]
    settled = dict(inputs)
    if isinstance(labels := inputs.get("labels"), torch.Tensor) and labels.shape == mask.shape:
        is_first = (mask != 0) & (mask.cumsum(dim=1) == 1)
        settled["labels"] = labels.masked_fill(is_first, IGNORE_INDEX)
    if add_position_ids and "position_ids" not in inputs:
        settled["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    return settled
