"""Lays the rows of a padded micro-batch end to end: one sequence of all their tokens, and no padding.

    [a b c . .]         input_ids     [a b c d e f g h]
    [d e f g h]   ->    position_ids  [0 1 2 0 1 2 3 4]

Positions begin again at each row. By that, and by the boundaries that are given beside them, the attention of
transformers knows that no row may see another. A loss that predicts the next token would predict the first one of each
row from the last one of the row before: that label is taken away. Without padding it is no target either.
"""

from typing import Any

import torch

from hf_mbp.collate import Inputs
from hf_mbp.padding import IGNORE_INDEX, MASK

POSITIONS = "position_ids"

TOKEN_COLUMNS = ("input_ids", "token_type_ids", "labels")
"""What rows laid end to end may have for each token. Anything else may be about rows, or about places in them."""

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""`FlashAttentionKwargs` of transformers: where rows begin and end, and how long the longest is."""


def why_padded(inputs: Inputs) -> str | None:
    """Why these rows cannot be laid end to end without changing what is learned from them; `None` if they can."""
    if unknown := sorted(key for key in inputs if key not in (*TOKEN_COLUMNS, MASK, POSITIONS)):
        return f"their inputs have {', '.join(unknown)}, and only {', '.join(TOKEN_COLUMNS)} can be laid end to end"
    for key in ("input_ids", "labels", MASK):
        if not isinstance(inputs.get(key), torch.Tensor):
            return f"the collator returns no {key}"
    shape = inputs["input_ids"].shape
    if odd := [key for key, value in inputs.items() if not _has_shape(value, shape)]:
        return f"{odd[0]} has not one value for each token"
    return _why_padded_by_mask(inputs, inputs[MASK])


def _has_shape(value: Any, shape: torch.Size) -> bool:
    is_for_tokens = isinstance(value, torch.Tensor) and value.shape == shape and value.ndim == 2
    return is_for_tokens and not value.is_floating_point()


def _why_padded_by_mask(inputs: Inputs, mask: torch.Tensor) -> str | None:
    is_token = mask == 1
    before = torch.nn.functional.pad(is_token, (1, 0))[:, :-1]
    if not bool(is_token.any()):
        return "all their tokens are padding"
    if bool((mask[~is_token] != 0).any()) or bool(((is_token & ~before).sum(dim=1) > 1).any()):
        return "their attention_mask is not one run of ones a row"
    if bool((inputs["labels"][~is_token] != IGNORE_INDEX).any()):
        return "padding has labels that count"
    positions = inputs.get(POSITIONS)
    if positions is None:
        is_left_padded = bool((is_token[:, -1] & ~is_token[:, 0]).any())
        return "they are padded on the left, and positions count the padding" if is_left_padded else None
    if bool((positions[is_token] != _positions(mask)[is_token]).any()):
        return "their position_ids do not count each row from 0"
    return None


def _positions(mask: torch.Tensor) -> torch.Tensor:
    """The place of each token in its row, from 0."""
    return mask.long().cumsum(dim=1) - 1


def laid_end_to_end(inputs: Inputs, *, shifts_labels: bool, gives_boundaries: bool) -> Inputs:
    """The tokens of all rows as one, `[1, tokens]`; only where `why_padded` is `None`.

    Args:
        inputs: padded, `[rows, width]`.
        shifts_labels: whether the loss predicts the next token.
        gives_boundaries: whether to add the arguments by which flash attention is told where rows begin and end.
            Without them it finds that out from the positions, in every layer, and has the host wait for it.
    """
    mask = inputs[MASK]
    is_token = mask == 1
    laid = {key: inputs[key][is_token][None] for key in TOKEN_COLUMNS if key in inputs}
    laid[POSITIONS] = _positions(mask)[is_token][None]
    if shifts_labels:
        laid["labels"] = laid["labels"].masked_fill(laid[POSITIONS] == 0, IGNORE_INDEX)
    return laid | (_boundaries(is_token.sum(dim=1)) if gives_boundaries else {})


def _boundaries(lengths: torch.Tensor) -> Inputs:
    lengths = lengths[lengths > 0]
    ends = torch.nn.functional.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max())
    return dict(zip(BOUNDARIES, (ends, ends, longest, longest), strict=True))


def is_laid_end_to_end(inputs: Inputs) -> bool:
    """Whether inputs are what `laid_end_to_end` makes."""
    if not {"input_ids", POSITIONS} <= inputs.keys() <= {*TOKEN_COLUMNS, POSITIONS, *BOUNDARIES}:
        return False
    tokens, positions = inputs["input_ids"], inputs[POSITIONS]
    return bool(len(tokens) == 1 and positions.shape == tokens.shape)


def beginning(inputs: Inputs, width: int) -> Inputs:
    """The first tokens, at most `width`, of the first of the rows that are laid end to end.

    Without the boundaries: there is only one row, as attention sees by the positions.
    """
    starts = (inputs[POSITIONS][0] == 0).nonzero().flatten().tolist()
    end = min([width, *starts[1:2]])
    return {key: inputs[key][:, :end].contiguous() for key in (*TOKEN_COLUMNS, POSITIONS) if key in inputs}
