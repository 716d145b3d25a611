"""Tokenized rows: cut but never padded, and what the user should know of their lengths."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from datasets import Dataset
from transformers import BatchEncoding

from hf_mbp.cli.errors import UserError, say
from hf_mbp.cli.splits import Part, Splits
from hf_mbp.collate import row_length
from hf_mbp.row_lengths import known_lengths

Batch = dict[str, list[Any]]
# Column that a task's encoder adds: whether the row was longer than the limit.
CUT = "was_cut"


class RowError(UserError):
    """A mistake in a row, told by what does not know which rows these are."""


def encode_splits(splits: Splits, encode: Callable[[Part], Dataset]) -> tuple[Dataset, Dataset | None]:
    """Return what ``encode`` makes of both splits; of evaluation rows, if there are any, the longest first."""
    train, validation = splits.encoded(encode)
    return train, None if validation is None else longest_first(validation)


def encode_rows(
    part: Part,
    encode: Callable[[Batch], Batch],
    *,
    limit: int | str | None,
    workers: int | None,
    option: str = "max_length",
) -> Dataset:
    """Replace the columns of rows with those that ``encode`` returns, say how long the rows are and how many were cut.

    ``encode`` may return fewer rows than it was given: those without anything to learn from. ``option`` sets the
    ``limit``, which is a number of tokens, or says in words what it is.
    """
    if not isinstance(limit, str):
        limit = f"{limit} tokens"
    rows, name = part.rows, part.name
    try:
        encoded = rows.map(
            encode, batched=True, remove_columns=rows.column_names, num_proc=workers, desc=f"tokenizing {name} rows"
        )
    except RowError as error:
        raise UserError(f"{name} rows: {error}") from error
    if len(encoded) == 0:
        raise UserError(
            f"none of the {len(rows)} {name} rows has anything to learn from; look at the columns and {option}"
        )
    lengths = row_lengths(encoded)
    row = "pair of rows" if "chosen_ids" in encoded.column_names else "row"
    line = (
        f"{name}: {len(encoded):,} rows, tokens a {row}: median {statistics.median(lengths):.0f},"
        f" longest {max(lengths)}"
    )
    if num_cut := sum(encoded[CUT]):
        line += f"; {num_cut:,} rows cut after {limit} ({option})"
    if len(encoded) < len(rows):
        line += f"; {len(rows) - len(encoded):,} rows left out, which have nothing to learn from within {limit}"
    say(line)
    return encoded.remove_columns(CUT)


def rows_cut(encoded: BatchEncoding, limit: int | None) -> list[bool]:
    """Return which rows the tokenizer has truncated."""
    if encoded.encodings is None:
        # a tokenizer in Python does not say; rows that just fit are counted, too
        return [len(ids) == limit for ids in encoded["input_ids"]]
    return [bool(encoding.overflowing) for encoding in encoded.encodings]


def row_lengths(rows: Dataset) -> list[int]:
    """Return the number of tokens of each row, as micro-batches count them: of a pair, of twice its longer side."""
    known = known_lengths(rows)
    return [row_length(row) for row in rows] if known is None else [int(length) for length in known]


def column_lengths(rows: Dataset, column: str) -> list[int]:
    """Return the number of tokens of each row in a column, such as ``labels``."""
    return [len(ids) for ids in rows.with_format("arrow")[column].to_pylist()]


def longest_first(rows: Dataset) -> Dataset:
    """Return the rows by length: evaluation then pads almost nothing, and its metrics do not see the order."""
    lengths = row_lengths(rows)
    return rows.select(sorted(range(len(rows)), key=lambda index: -lengths[index]))


def texts(batch: Batch, column: str) -> list[str]:
    """Return a column of a batch.

    Raises:
        RowError: a value that is not text.
    """
    for value in batch[column]:
        if not isinstance(value, str):
            raise RowError(
                f"column {column!r} must hold text, but has {value!r:.80}; leave out such rows, or name another column"
            )
    return batch[column]
