"""Contestants without a Trainer: rows that need no padding, and two packages that are tried in plain PyTorch."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from benchmarks.rows import Rows, pad
from benchmarks.task import LIMIT_ROWS, Stopwatch, Task, plain_optimizer, step_optimizer


def train_equal_rows(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """Rows of the mean length: what the device does without any padding, and without a Trainer."""
    model.train()
    optimizer = plain_optimizer(model)
    rows, size = task.workload.equal_rows(task.size), task.shape.rows_per_step
    stopwatch.start()
    task.plain_step(model, optimizer, task.warm_up_rows)
    stopwatch.start()
    for step in range(task.steps):
        first = step * size % len(rows)
        task.plain_step(model, optimizer, rows[first : first + size])
    stopwatch.stop()


def train_equal_parts(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """With the decorator of `mbp-pytorch`, which splits a padded batch by the number of rows.

    It runs no backward pass where there is nothing to split, so it has two parts at least.
    """
    import mbp

    num_rows = max(1, min(LIMIT_ROWS, task.shape.rows_per_step // 2))

    @mbp.apply(["input_ids", "attention_mask", "labels"], ub_size=num_rows, device=task.device)
    def loss_of(**inputs: torch.Tensor) -> torch.Tensor:
        return task.loss_of(model, inputs)

    def step(rows: Rows) -> None:
        loss_of(**pad(rows))
        step_optimizer(model, optimizer)

    model.train()
    optimizer = plain_optimizer(model)
    stopwatch.start()
    step(task.warm_up_rows)
    stopwatch.start()
    for rows in task.random_steps():
        step(rows)
    stopwatch.stop()


def train_token_batches(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """Over batches of `online-dynamic-batching`, which holds a number of tokens, not of rows.

    An optimizer step is taken as soon as as many rows as are asked for have been seen, so steps are larger than that.
    Time counts from when its worker has started and the first batch is there.
    """
    import odb

    model.train()
    optimizer = plain_optimizer(model)
    stopwatch.start()
    task.plain_step(model, optimizer, task.warm_up_rows)
    rows = [row for step in task.random_steps() for row in step]
    loader = odb.ODBDataLoader(
        rows, token_budget=task.max_tokens, batch_size=1, num_workers=1, prefetch_factor=64, collate_fn=pad
    )
    batches = iter(loader)
    first = next(batches)
    stopwatch.start()
    seen = 0
    for batch in chain([first], batches):
        odb.pop_step_info(batch)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        num_rows = len(inputs["input_ids"])
        (task.loss_of(model, inputs) * (num_rows / task.shape.rows_per_step)).backward()
        seen += num_rows
        if seen >= task.shape.rows_per_step:
            step_optimizer(model, optimizer)
            seen = 0
    stopwatch.stop()
