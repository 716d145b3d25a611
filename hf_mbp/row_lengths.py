"""Lengths of all rows of a data set, where they can be had without computing a row."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hf_mbp.collate import row_length
from hf_mbp.plan import Ints

MOST_ROWS_READ = 50_000
"""Rows of a list whose lengths are looked up one by one, a few microseconds each."""

ARROW_BATCH = 10_000


def known_lengths(dataset: Any) -> Ints | None:
    """Tokens of each row of a data set, where they can be had without computing a row: of its `input_ids`.

    Those of a `datasets.Dataset` are read from its table; those of a list are counted. `None` for all else, also for
    rows that are made when they are asked for.
    """
    if not may_be_known(dataset):
        return None
    if isinstance(dataset, (list, tuple)):
        return np.array([row_length(row) for row in dataset], dtype=np.int64)
    return _table_lengths(dataset.select_columns("input_ids").with_format("arrow"))


def may_be_known(dataset: Any) -> bool:
    """Whether a data set is of a kind whose lengths are known, without looking at more than its first row."""
    if isinstance(dataset, (list, tuple)):
        is_tokens = bool(dataset) and isinstance(dataset[0], Mapping) and "input_ids" in dataset[0]
        return is_tokens and len(dataset) <= MOST_ROWS_READ
    is_table = hasattr(dataset, "select_columns") and "input_ids" in (getattr(dataset, "column_names", None) or [])
    return is_table and hasattr(dataset, "__len__") and len(dataset) > 0 and dataset.format["type"] != "custom"


def _table_lengths(dataset: Any) -> Ints | None:
    """Lengths of the lists in a column, by where each begins in its table."""
    chunks = [chunk for table in dataset.iter(ARROW_BATCH) for chunk in table.column("input_ids").chunks]
    if not all(hasattr(chunk, "value_lengths") for chunk in chunks):  # no lists
        return None
    lengths = [chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False) for chunk in chunks]
    return np.concatenate(lengths).astype(np.int64)
