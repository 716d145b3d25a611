"""Tables for each task: what is right, as files of every format, and what is wrong in them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fuzzing.mutations import spoiled_bytes, spoiled_value

Row = dict[str, Any]
ROWS = 6


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with the model for it, its columns, and rows that are right."""

    model: str
    row: Callable[[int], Row]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_flat(self) -> bool:
        """Whether its rows go into a CSV file."""
        return all(isinstance(value, (str, int)) for value in self.row(0).values())


def _text(index: int) -> str:
    return " ".join("abcdefghijklm"[: 2 + index])


def _conversation(index: int) -> list[Row]:
    return [{"role": "user", "content": _text(index)}, {"role": "assistant", "content": "a b"}]


TASKS: Mapping[str, Task] = {
    "text_classification": Task(model="encoder", row=lambda i: {"text": _text(i), "label": "ab"[i % 2]}),
    "token_classification": Task(
        model="encoder", row=lambda i: {"words": _text(i).split(), "tags": ["O", "B-X"] + ["O"] * i}
    ),
    "question_answering": Task(
        model="encoder",
        row=lambda i: {"question": "a", "context": _text(i), "answers": {"text": ["b"], "answer_start": [2]}},
        options={"doc_stride": 4},
    ),
    "masked_language_modeling": Task(model="encoder", row=lambda i: {"text": _text(i)}),
    "embedding": Task(model="encoder", row=lambda i: {"query": "a", "passage": _text(i)}),
    "language_modeling": Task(
        model="decoder",
        row=lambda i: {"prompt": _text(i), "answer": "a b"},
        options={"prompt_column": "prompt", "answer_column": "answer"},
    ),
    "instruction_tuning": Task(
        model="decoder", row=lambda i: {"messages": _conversation(i)}, options={"messages_column": "messages"}
    ),
    "preference_tuning": Task(
        model="decoder",
        row=lambda i: {"prompt": _text(i), "chosen": "a b", "rejected": "c"},
        options={"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"},
    ),
    "sequence_to_sequence": Task(model="both", row=lambda i: {"source": _text(i), "target": "a b"}),
}


def options(task: str) -> dict[str, Any]:
    """The options of a recipe that trains on the right file, with a model whose folder is beside that of the trial."""
    chosen = TASKS[task]
    return {**chosen.options, "config_name": f"../models/{chosen.model}", "train_file": right_name(task)}


def right_name(task: str) -> str:
    """Name of the file that is right."""
    return f"{task}.jsonl"


@cache
def _rows(task: str) -> list[Row]:
    return [TASKS[task].row(index) for index in range(ROWS)]


@cache
def right_files(task: str) -> Mapping[str, bytes]:
    """The file that is right."""
    return {right_name(task): as_json_lines(_rows(task))}


def spoiled_file(random: Random, task: str) -> tuple[str, bytes]:
    """Name and content of a file that is not: strange rows, broken bytes, or both."""
    writers = {name: write for name, write in WRITERS.items() if TASKS[task].is_flat or name not in FLAT}
    suffix, write = random.choice(list(writers.items()))
    rows: Any = _rows(task)
    is_strange = random.randrange(2) == 0
    if is_strange:
        rows = spoiled_value(random, rows)
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    try:
        content = write(rows)
    except (TypeError, ValueError, OverflowError, UnicodeError, pa.ArrowException):  # this format has no such rows
        content, is_strange = write(_rows(task)), False
    if not is_strange or random.randrange(3) == 0:
        content = spoiled_bytes(random, content)
    return f"rows.{suffix}", content


def as_json_lines(rows: list[Row]) -> bytes:
    """One row a line; texts may have halves of characters, as JSON lets them."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _as_json(rows: list[Row]) -> bytes:
    return json.dumps(rows).encode()


def _as_csv(rows: list[Row], separator: str = ",") -> bytes:
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, names, delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


def _as_parquet(rows: list[Row]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def _as_text(rows: list[Row]) -> bytes:
    return "\n".join(str(next(iter(row.values()), "")) for row in rows).encode("utf-8", "surrogatepass")


WRITERS: Mapping[str, Callable[[list[Row]], bytes]] = {
    "jsonl": as_json_lines,
    "json": _as_json,
    "csv": _as_csv,
    "tsv": lambda rows: _as_csv(rows, "\t"),
    "parquet": _as_parquet,
    "txt": _as_text,
}
FLAT = ("csv", "tsv", "txt")
"""Formats without lists."""
