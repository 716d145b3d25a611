"""Items: what the loss averages over, and how many of them a micro-batch has.

A loss that is a mean over items is put together from micro-batches without error,

    mean over the mini-batch = sum over micro-batches of (items of it / items of the mini-batch) x (mean over it),

and so is its gradient. The factor is the micro-batch's share. All that has to be known is the number of items, and
that is where exactness is won or lost.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from hf_mbp.collate import Inputs, num_rows_of
from hf_mbp.padding import IGNORE_INDEX, MASK


def items_of(inputs: Inputs, config: Any, shifts_labels: Callable[[Inputs], bool]) -> int:
    """Items of collated inputs for a model with this `config`; `shifts_labels` is asked only where it matters."""
    shifts = has_token_labels(inputs) and "shift_labels" not in inputs and shifts_labels(inputs)
    return count_items(inputs, shifts=shifts, is_regression=is_regression(config, inputs.get("labels")))


def checked_count(count: Any) -> float:
    """What a `num_items` of the user's own returned.

    Raises:
        ValueError: it is not a number of items.
    """
    if not isinstance(count, Real) or not float(count) >= 0:
        raise ValueError(
            f"num_items(micro_batch) must return a number that is not negative, got {count!r}. Return float(...)."
        )
    return float(count)


def count_items(inputs: Inputs, *, shifts: bool, is_regression: bool = False) -> int:
    """Items of collated inputs, as the losses of transformers count them.

    `shift_labels` and integer `labels` that are not -100, where `shifts` says that the loss predicts the next token
    and so ignores the first label of every row; otherwise, and for the float targets of a regression, the rows.

    Example:
        >>> labels = torch.tensor([[5, 7, -100], [5, 7, 8]])
        >>> count_items({"labels": labels}, shifts=False), count_items({"labels": labels}, shifts=True)
        (5, 3)
    """
    labels = inputs.get("shift_labels")
    if labels is None and has_token_labels(inputs) and shifts:
        labels = inputs["labels"][..., 1:]
    elif labels is None:
        labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or is_regression:
        return num_rows_of(inputs)
    return int((labels != IGNORE_INDEX).sum())


def has_token_labels(inputs: Inputs) -> bool:
    """Whether there are integer labels of more than one dimension, which a loss may or may not shift.

    Not those of rows that are all empty: nothing can be tried with them.
    """
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return False
    return labels.numel() > 0


def is_regression(config: Any, labels: Any) -> bool:
    """Whether the labels of a sequence classifier are numbers and not classes, so that -100 is a target like others.

    As `ForSequenceClassificationLoss` decides it; one label a row, because a language model may have `num_labels`, too.
    """
    problem = getattr(config, "problem_type", None)
    if problem is None:
        is_one_a_row = isinstance(labels, torch.Tensor) and labels.numel() == len(labels)
        return getattr(config, "num_labels", None) == 1 and is_one_a_row
    return problem in ("regression", "multi_label_classification")


def shift_probes(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Two micro-batches: one without any label, one whose only labels are in column 0.

    For a loss that shifts its labels both have nothing to learn, and their losses are alike: zero, or no number.
    """
    labels = inputs["labels"]
    none, first = torch.full_like(labels, IGNORE_INDEX), torch.full_like(labels, IGNORE_INDEX)
    first[..., 0] = labels.clamp(min=0).amax(dim=-1)
    return {**inputs, "labels": none}, {**inputs, "labels": first}


def changed_first_labels(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """`shift_probes` for a loss that does not know -100: the inputs, and with other labels of theirs in column 0."""
    labels = inputs["labels"].clone()
    known = labels.unique()
    labels[..., 0] = torch.where(labels[..., 0] == known[0], known[-1], known[0])
    return inputs, {**inputs, "labels": labels}


def with_an_item(inputs: Inputs) -> Inputs:
    """Inputs whose loss is a number: the last label of each row is made valid where none is.

    For micro-batches of weight zero, which run so that all ranks run equally many: zero times a number is zero, zero
    times the mean over nothing is not.
    """
    if count_items(inputs, shifts=True) > 0 or not isinstance(inputs.get("labels"), torch.Tensor):
        return inputs
    filled = _widened(inputs)
    for key in ("labels", "shift_labels"):
        if isinstance(filled.get(key), torch.Tensor):
            filled[key] = filled[key].clone()
            filled[key][..., -1] = 0
    return filled


def _widened(inputs: Inputs) -> Inputs:
    """Inputs whose rows have a second column, without which a loss that shifts has nothing to predict."""
    labels = inputs["labels"]
    if labels.ndim < 2 or labels.is_floating_point() or labels.shape[-1] > 1:
        return dict(inputs)
    return {
        key: torch.cat([_one_column(key, value)] * 2, dim=1)
        if isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] == labels.shape[-1]
        else value
        for key, value in inputs.items()
    }


def _one_column(key: str, value: torch.Tensor) -> torch.Tensor:
    """Of rows that are all empty, a first token, which is not masked."""
    return value if value.shape[1] else value.new_full((len(value), 1), int(key.endswith(MASK)))
