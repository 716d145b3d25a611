"""What padding does to a row, and how a row is made independent of it."""

from typing import Any

import torch

from hf_mbp.collate import Inputs, has_entry_for_each_row, select_rows

IGNORE_INDEX = -100
"""Label that no loss counts, in all of transformers and PyTorch."""

MASK = "attention_mask"

TOKEN_COLUMNS = (
    "input_ids",
    "input_values",
    "inputs_embeds",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "special_tokens_mask",
    "completion_mask",
    "bbox",
    "labels",
)
"""Ends of the names of what is known to have a column for each token; others may only happen to be as wide."""


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


def trim(inputs: Inputs, *, has_targets: bool = False, multiple_of: int = 1) -> Inputs:
    """Collated inputs without the outer columns in which every row is padding, and has no label.

    Each mask (`attention_mask`, `sentence_0_attention_mask`, ...) speaks for the values with its prefix and its width.
    If something that is not known to have a column for each token is as wide, nothing is cut there.

    Args:
        inputs: from a collator.
        has_targets: whether `labels` are padded apart from the inputs, as for an encoder-decoder.
        multiple_of: the width is rounded up to a multiple of this.
    """
    masks = {key.removesuffix(MASK): value for key, value in inputs.items() if key.endswith(MASK) and _is_flat(value)}
    used = {prefix: mask != 0 for prefix, mask in masks.items() if prefix + "input_features" not in inputs}
    labels = inputs.get("labels")
    if not has_targets and "" in used:
        used[""] = used[""] | _labelled(labels, used[""])
    if has_targets and _is_flat(labels):
        used["labels"] = used["decoder_"] = _target_columns(labels, used.get("decoder_"))
    trimmed = dict(inputs)
    for prefix, columns in used.items():
        others = [other for other in used if len(other) > len(prefix)]
        family = {k: v for k, v in inputs.items() if k.startswith(prefix) and not k.startswith(tuple(others))}
        width = columns.shape[1]
        if bool(columns.any()) and not any(_is_strange(key, value, width) for key, value in family.items()):
            span = _span(columns, multiple_of)
            trimmed |= {k: v[:, span].contiguous() for k, v in family.items() if has_token_columns(k, v, width)}
    return trimmed


def has_token_columns(key: str, value: Any, width: int) -> bool:
    """Whether a value of a batch is known to have a column for each of `width` tokens, in its second dimension.

    Labels that are floats are targets of a row.
    """
    is_wide = isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] == width
    is_target = is_wide and key.endswith("labels") and value.is_floating_point() and value.ndim == 2
    return is_wide and key.endswith(TOKEN_COLUMNS) and not is_target


def _is_strange(key: str, value: Any, width: int) -> bool:
    """Whether a value is as wide as the tokens, without being known to have a column for each."""
    if not isinstance(value, torch.Tensor) or width not in value.shape[1:]:
        return False
    return not has_token_columns(key, value, width) or width in value.shape[2:]


def _labelled(labels: Any, like: torch.Tensor) -> torch.Tensor:
    """Tokens with a label: one that is masked has one where an end token also pads, and the mask is made of that."""
    is_of_tokens = isinstance(labels, torch.Tensor) and labels.shape == like.shape and not labels.is_floating_point()
    return labels != IGNORE_INDEX if is_of_tokens else torch.zeros_like(like)


def _target_columns(labels: Any, decoder_mask: torch.Tensor | None) -> torch.Tensor:
    """Columns that the decoder needs: the first one always, because it is fed with the labels and counts from there."""
    used: torch.Tensor = labels != IGNORE_INDEX
    if decoder_mask is not None and decoder_mask.shape == used.shape:
        used = used | decoder_mask
    used[:, 0] = True
    return used


def _is_flat(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2


def _span(used: torch.Tensor, multiple_of: int) -> slice:
    """The columns from the first to the last that are used, `[rows, columns]`, and what rounding adds."""
    columns = used.any(dim=0).nonzero()
    start, end = int(columns[0]), int(columns[-1]) + 1
    width = -(-(end - start) // multiple_of) * multiple_of
    start = max(0, min(start, used.shape[1] - width))
    return slice(start, start + width)


def without_padding(inputs: Inputs) -> Inputs:
    """The last row alone, unpadded, its last token made a label, so that it has a loss."""
    row = trim(select_rows(inputs, [len(inputs["attention_mask"]) - 1]))
    labels = row["labels"].clone()
    labels[:, -1] = labels.clamp(min=0)[:, -1]
    return {**row, "labels": labels}


def can_be_cut(inputs: Inputs) -> bool:
    """Whether rows can be shortened: not images and sounds, nor texts with places for them, nor packed sequences."""
    token_ids = inputs.get("input_ids")
    if not isinstance(token_ids, torch.Tensor) or not has_entry_for_each_row(inputs, len(token_ids)):
        return False
    values = [(key, value) for key, value in inputs.items() if isinstance(value, torch.Tensor)]
    has_features = any(value.is_floating_point() and value.ndim > 2 for _, value in values)
    full = token_ids.shape[-1]
    unknown = [value for key, value in values if not key.endswith(TOKEN_COLUMNS)]
    return not has_features and not any(full in value.shape[1:] for value in unknown)


def cut_columns(inputs: Inputs, width: int) -> Inputs:
    """Rows cut to `width` tokens: the first ones and the last, which some models look for.

    Cut is what has as many columns as `input_ids`, over all choices where rows have several.
    """
    full = inputs["input_ids"].shape[-1]
    if full <= width:
        return inputs
    kept = [*range(width - 1), full - 1]
    return {key: _cut(key, value, full, kept) for key, value in inputs.items()}


def _cut(key: str, value: Any, full: int, kept: list[int]) -> Any:
    if has_token_columns(key, value, full):
        return value[:, kept].contiguous()
    if isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[-1] == full:
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
