"""A collated batch of evaluation: how long its rows are, and micro-batches taken out of it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from hf_mbp.arrays import Ints
from hf_mbp.collate import Inputs, count_cells, need_one_width, num_rows_of, rows_of_examples
from hf_mbp.padding import IGNORE_INDEX, MASK, is_left_padded, trim, width_of
from hf_mbp.plan import round_up


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalBatch:
    """What the user's collator made of the rows of one batch.

    An example is what must stay together: a row or, with `rows_each=2`, a pair, whose rows are `i` and
    `num_examples + i`. A batch whose rows cannot be taken out (packed sequences, images cut into patches) is one
    example.
    """

    inputs: Inputs
    has_targets: bool = False
    multiple_of: int = 1
    rows_each: int = 1

    @cached_property
    def num_rows(self) -> int:
        """Rows of its tensors."""
        return num_rows_of(self.inputs)

    @cached_property
    def is_splittable(self) -> bool:
        """Whether every tensor has an entry for each row or for each example."""
        sizes = (self.num_rows, self.num_rows // self.rows_each)
        return self.num_rows % self.rows_each == 0 and all(len(value) in sizes for value in _arrays(self.inputs))

    @cached_property
    def num_examples(self) -> int:
        """How many parts it could be split into."""
        return self.num_rows // self.rows_each if self.is_splittable else 1

    @cached_property
    def is_cuttable(self) -> bool:
        """Whether columns of padding can be left out, and outputs for the others stay in their place.

        Not in front of rows: their positions, and the targets of a loss that predicts the next token, would change.
        Nor where padding has labels that count.
        """
        return (
            self.is_splittable
            and width_of(self.inputs) not in (None, 0)
            and not need_one_width(self.inputs)
            and not is_left_padded(self.inputs)
            and not (self._has_labels_in_padding("labels") or self._has_labels_in_padding("shift_labels"))
        )

    def _has_labels_in_padding(self, key: str) -> bool:
        labels, mask = self.inputs.get(key), self.inputs[MASK]
        if not isinstance(labels, torch.Tensor) or labels.shape != mask.shape or self.has_targets:
            return False
        return bool((labels[mask == 0] != IGNORE_INDEX).any())

    @cached_property
    def num_labels(self) -> Ints:
        """Labels that are not -100 of each example; ones where a row has no labels for tokens."""
        labels = self.inputs.get("labels")
        if not self.is_splittable or not isinstance(labels, torch.Tensor) or labels.ndim != 2:
            return np.ones(self.num_examples, dtype=np.int64)
        return self._of_examples(_host((labels[:, 1:] != IGNORE_INDEX).sum(dim=1))[:, None])[:, 0]

    @cached_property
    def labels(self) -> frozenset[int]:
        """The different labels that count, if they are classes or tokens."""
        return self.labels_of(range(self.num_examples))

    def labels_of(self, examples: Iterable[int]) -> frozenset[int]:
        """Those of some examples."""
        found = np.unique(self._classes[list(examples)])
        return frozenset(found[found != IGNORE_INDEX].tolist())

    @cached_property
    def mean_labels(self) -> list[float]:
        """Of each example, so that those with other labels stand apart; 0 where there are none."""
        counts = (self._classes != IGNORE_INDEX).sum(axis=1)
        sums = np.where(self._classes != IGNORE_INDEX, self._classes, 0).sum(axis=1)
        return [float(mean) for mean in sums / np.maximum(counts, 1)]

    @cached_property
    def _classes(self) -> Ints:
        """Integer labels `[examples, labels]`; without columns if there are none."""
        labels = self.inputs.get("labels")
        if (
            not isinstance(labels, torch.Tensor)
            or not labels.ndim
            or labels.is_floating_point()
            or not self.is_splittable
        ):
            return np.zeros((self.num_examples, 0), dtype=np.int64)
        of_rows = _host(labels.reshape(len(labels), -1))
        return np.concatenate(np.split(of_rows, len(labels) // self.num_examples), axis=1)

    @cached_property
    def padded(self) -> frozenset[int]:
        """The parts (see `sizes`) whose padding can be cut for some of its examples."""
        return self.padded_for(range(self.num_examples))

    def padded_for(self, examples: Iterable[int]) -> frozenset[int]:
        """The parts that are padding in the end of one of these examples, and can be cut."""
        if not self.is_cuttable:
            return frozenset()
        is_padded = self.sizes(cuts=True)[list(examples)] < self.sizes(cuts=False)[:1]
        return frozenset(np.flatnonzero(is_padded.any(axis=0)).tolist())

    def sizes(self, *, cuts: bool) -> Ints:
        """Cells of each example, `[examples, parts]`: as long as its rows, or as wide as the batch unless `cuts`."""
        if not self.is_splittable:
            return np.array([[max(1, self.cells)]])
        parts = [_lengths(mask, cuts=cuts and not has_frames) for mask, has_frames in self._masks()]
        if parts and self.has_targets and _is_flat(self.inputs.get("labels")):
            parts.append(_lengths(self.inputs["labels"] != IGNORE_INDEX, cuts=cuts))
        if not parts:
            parts = [np.full(self.num_rows, max(1, -(-self.cells // max(1, self.num_rows))))]
        return round_up(self._of_examples(np.stack(parts, axis=1)), self.multiple_of) * self.rows_each

    def _of_examples(self, of_rows: Ints) -> Ints:
        """The larger number of a pair."""
        return np.asarray(of_rows.reshape(self.rows_each, self.num_examples, -1).max(axis=0), dtype=np.int64)

    def _masks(self) -> list[tuple[torch.Tensor, bool]]:
        """Each mask, and whether what it speaks for are frames of sound, which keep their width."""
        return [
            (value, key.removesuffix(MASK) + "input_features" in self.inputs)
            for key, value in self.inputs.items()
            if key.endswith(MASK) and key != "decoder_" + MASK and _is_flat(value)
        ]

    @property
    def cells(self) -> int:
        """Padded tokens of the batch; rows where there are none."""
        return count_cells(self.inputs, with_targets=self.has_targets) or self.num_rows

    def take(self, examples: list[int], *, cuts: bool) -> Inputs:
        """Some of its examples, without the columns that are padding in all of them if `cuts`."""
        if not self.is_splittable:
            return dict(self.inputs)
        if examples == list(range(self.num_examples)):
            taken = dict(self.inputs)
        else:
            taken = {key: self._taken(value, examples) for key, value in self.inputs.items()}
        return trim(taken, has_targets=self.has_targets, multiple_of=self.multiple_of) if cuts else taken

    def _taken(self, value: Any, examples: list[int]) -> Any:
        if isinstance(value, Mapping):
            return {key: self._taken(part, examples) for key, part in value.items()}
        is_array = isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim > 0
        if is_array and len(value) in (self.num_examples, self.num_rows):
            return value[self.indices(examples, len(value) // self.num_examples)]
        if isinstance(value, (list, tuple)) and len(value) == self.num_rows:
            return [value[index] for index in self.indices(examples, self.rows_each)]
        return value

    def indices(self, examples: list[int], rows_each: int) -> list[int]:
        """Where the examples stand in something with so many rows for each."""
        return rows_of_examples(examples, self.num_examples, rows_each)

    def widths(self, inputs: Inputs) -> list[int]:
        """Columns of collated inputs: of the tokens, and of the targets of an encoder-decoder."""
        widths = [] if (width := width_of(inputs)) is None else [width]
        if self.has_targets and _is_flat(inputs.get("labels")):
            widths.append(inputs["labels"].shape[1])
        return widths


def _arrays(inputs: Mapping[str, Any]) -> list[Any]:
    """Tensors and arrays that have dimensions, also of mappings inside."""
    found = []
    for value in inputs.values():
        if isinstance(value, Mapping):
            found += _arrays(value)
        elif isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim:
            found.append(value)
    return found


def _lengths(used: torch.Tensor, *, cuts: bool) -> Ints:
    """Columns up to the last used one, of each row of `[rows, columns]`."""
    width = used.shape[1]
    if not cuts:
        return np.full(len(used), width)
    columns = torch.arange(1, width + 1, device=used.device)
    return _host(((used != 0) * columns).amax(dim=1).clamp(min=1))


def _is_flat(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[1] > 0


def _host(values: torch.Tensor) -> Ints:
    return np.asarray(values.cpu().numpy(), dtype=np.int64)
