"""Lengths of all rows of a data set, where they can be had without computing a row."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_mbp.arrays import Ints
from hf_mbp.collate import row_length, target_length

MOST_ROWS_READ = 50_000
"""Rows of a list whose lengths are looked up one by one, a few microseconds each."""

ARROW_BATCH = 10_000


def known_lengths(dataset: Any, *, has_targets: bool = False) -> Ints | None:
    """Tokens of each row of a data set, where they can be had without computing a row: of its `input_ids`.

    Those of a `datasets.Dataset` are read from its table; those of a list are counted. `None` for all else, also for
    rows that are made when they are asked for. With the `labels` that an encoder-decoder pads by themselves, if it
    `has_targets`.
    """
    if not may_be_known(dataset):
        return None
    if isinstance(dataset, (list, tuple)):
        return np.array(
            [row_length(row) + (target_length(row) if has_targets else 0) for row in dataset], dtype=np.int64
        )
    lengths = _table_lengths(dataset, "input_ids")
    if lengths is None or not has_targets or "labels" not in dataset.column_names:
        return lengths
    targets = _table_lengths(dataset, "labels")
    return lengths + (1 if targets is None else targets)


class KnownLengths:
    """The known lengths of one data set, looked up once; and again if it has another number of rows by then.

    They take 8 bytes a row, less than the order in which a sampler reads them.
    """

    def __init__(self, dataset: Any, *, has_targets: bool) -> None:
        self._dataset, self._has_targets = dataset, has_targets
        self._lengths: Ints | None = None

    def __call__(self) -> Ints | None:
        if self._lengths is None or len(self._lengths) != len(self._dataset):
            self._lengths = known_lengths(self._dataset, has_targets=self._has_targets)
        return self._lengths


def may_be_known(dataset: Any) -> bool:
    """Whether a data set is of a kind whose lengths are known, without looking at more than its first row."""
    if isinstance(dataset, (list, tuple)):
        is_tokens = bool(dataset) and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]
        return is_tokens and len(dataset) <= MOST_ROWS_READ
    is_table = hasattr(dataset, "select_columns") and "input_ids" in (getattr(dataset, "column_names", None) or [])
    return is_table and hasattr(dataset, "__len__") and len(dataset) > 0 and dataset.format["type"] != "custom"


def _table_lengths(dataset: Any, column: str) -> Ints | None:
    """Lengths of the lists in a column, by where each begins in its table; `None` if it has no lists."""
    tables = dataset.select_columns(column).with_format("arrow").iter(ARROW_BATCH)
    chunks = [chunk for table in tables for chunk in table.column(column).chunks]
    if not all(hasattr(chunk, "value_lengths") for chunk in chunks):
        return None
    lengths = [chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(lengths).astype(np.int64)
