"""The rows to train on and those to evaluate on, which are checked and encoded alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Dataset

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.turns import first_process_first


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows to train on, or those to evaluate on: ``train`` or ``validation`` by name."""

    rows: Dataset
    name: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class Splits:
    """Training rows, and evaluation rows if there are any; and where they came from, for messages."""

    train: Dataset
    validation: Dataset | None
    train_origin: str
    validation_origin: str

    def encoded(self, encode: Callable[[Part], Dataset]) -> tuple[Dataset, Dataset | None]:
        """Return what ``encode`` makes of the training rows, and of the evaluation rows if there are any."""
        with first_process_first():
            train = encode(Part(rows=self.train, name="train", origin=self.train_origin))
            if self.validation is None:
                return train, None
            return train, encode(Part(rows=self.validation, name="validation", origin=self.validation_origin))


def require_columns(splits: Splits, columns: dict[str, str | None]) -> None:
    """Check that both splits have the columns, and something in each of their cells.

    ``columns`` maps the option to the name it gives (``None``: not used).

    Raises:
        UserError: naming the option and the column that is missing, with those that are there, or has empty cells.
    """
    for rows, origin in ((splits.train, splits.train_origin), (splits.validation, splits.validation_origin)):
        for option, column in columns.items():
            if rows is not None and column is not None:
                _require_column(rows, origin, option, column)


def _require_column(rows: Dataset, origin: str, option: str, column: str) -> None:
    if column not in rows.column_names:
        raise UserError(
            f"{origin} has no column {column!r} (option {option}); its columns are {', '.join(rows.column_names)}"
        )
    if num_empty := _num_empty(rows, column):
        raise UserError(
            f"{origin}, column {column!r} (option {option}): {num_empty:,} of {len(rows):,} rows are empty;"
            " fill them in, or leave them out (CSV files: NA, null, None and nan are read as empty, too)"
        )


def _num_empty(rows: Dataset, column: str) -> int:
    # Of the whole table, which may hold rows that were not chosen: zero is an answer, and the usual one.
    if rows.data.column(column).null_count == 0:
        return 0
    num_empty: int = rows.with_format("arrow")[column].to_pylist().count(None)
    return num_empty
