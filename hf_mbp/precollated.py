"""Batches that the user's collator pads in the workers; the step cuts its micro-batches out of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_mbp.collate import Batch, Collator, Inputs, KeepRows, Rows, as_inputs
from hf_mbp.padding import IGNORE_INDEX, MASK, trim


class CollateInWorkers(KeepRows):
    """The user's collator, whose result stays on the host; see `KeepRows`."""

    def __init__(self, collator: Collator) -> None:
        super().__init__(collator)
        self._collator = collator

    def __call__(self, rows: list[Any]) -> "Rows | Collated":  # type: ignore[override]
        """The padded batch; an empty one, which a rank gets where others have more, is no collator's business."""
        return Collated(as_inputs(self._collator(rows)), len(rows)) if rows else Rows(rows)


@dataclass(frozen=True, eq=False)
class Collated(Batch):
    """The rows of one data loader batch, padded by the user's collator in the worker."""

    inputs: Inputs
    num_rows: int

    def unpack(self) -> "list[CollatedRow]":
        """Its rows, to be cut out later.

        Raises:
            ValueError: a tensor does not have one entry a row.
        """
        for key, value in _arrays(self.inputs):
            if len(value) != self.num_rows:
                raise ValueError(
                    f"Batches that the workers collate are cut into rows, but {key!r} has {len(value):,} entries for "
                    f"{self.num_rows:,} rows. Set collate_in='main'."
                )
        return [CollatedRow(self, index) for index in range(self.num_rows)]


@dataclass(frozen=True, eq=False)
class CollatedRow:
    """One row of a batch that is collated already."""

    batch: Collated
    index: int

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each column of tokens that its batch has: one as a rule, two for pairs of sentences.

        Frames of `input_features`, which keep their width, with their padding.
        """
        inputs = self.batch.inputs
        masks = {
            key.removesuffix(MASK): value[self.index]
            for key, value in inputs.items()
            if key.endswith(MASK) and key != "decoder_" + MASK and isinstance(value, torch.Tensor)
        }
        return tuple(
            mask.numel() if prefix + "input_features" in inputs else int((mask != 0).sum())
            for prefix, mask in masks.items()
        )

    @property
    def num_targets(self) -> int:
        """Tokens of its `labels` without the padding at the end; the first ones may not count either."""
        if self.batch.inputs.get("labels") is None:
            return 0
        counted = (self.batch.inputs["labels"][self.index] != IGNORE_INDEX).reshape(-1).nonzero()
        return int(counted[-1]) + 1 if len(counted) else 0

    def fields(self) -> Inputs:
        """Its values, as the collator returned them."""
        return {key: _chosen(value, self.index, self.batch.num_rows) for key, value in self.batch.inputs.items()}


def _arrays(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Tensors and arrays, with their keys, also of mappings inside."""
    for key, value in inputs.items():
        if isinstance(value, Mapping):
            yield from _arrays(value)
        elif isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
            yield key, value


def cut_out(rows: Sequence[CollatedRow], *, has_targets: bool, multiple_of: int, keep_width: bool) -> Inputs:
    """Rows of one batch, without the columns that are padding in all of them unless `keep_width`."""
    batch, indices = rows[0].batch, [row.index for row in rows]
    chosen = {key: _chosen(value, indices, batch.num_rows) for key, value in batch.inputs.items()}
    return chosen if keep_width else trim(chosen, has_targets=has_targets, multiple_of=multiple_of)


def _chosen(value: Any, indices: Any, num_rows: int) -> Any:
    """The entries of one row or several; what has no entries for rows is kept."""
    if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
        return value[indices]
    if isinstance(value, (list, tuple)) and len(value) == num_rows:
        return [value[index] for index in indices] if isinstance(indices, list) else value[indices]
    if isinstance(value, Mapping):
        return {key: _chosen(part, indices, num_rows) for key, part in value.items()}
    return value
