"""Contestants without a Trainer: rows that need no padding, and two packages that are tried in plain PyTorch."""

from __future__ import annotations

from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch

from benchmarks.rows import Rows, pad
from benchmarks.task import PART_ROWS, Stopwatch, Task, plain_optimizer, step_optimizer
from hf_mbp.plan import Budget, plan_rows
from hf_mbp.sizing import cost_of


def train_unpadded(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """The micro-batches of `MBPTrainer`, each with rows of its mean length: what a device does with nothing to pad."""
    model.train()
    optimizer = plain_optimizer(model)
    steps = [unpadded(rows, model, task.device) for rows in task.random_steps()]
    stopwatch.start()
    task.plain_step(model, optimizer, [task.warm_up_rows])
    stopwatch.start()
    for step in steps:
        task.plain_step(model, optimizer, step)
    stopwatch.stop()


def unpadded(rows: Rows, model: Any, device: str) -> list[Rows]:
    """The groups that the planner makes of the rows of a step, with nothing left to pad."""
    sizes = np.array([[len(row["input_ids"])] for row in rows])
    plan = plan_rows(sizes, Budget(), cost_of(model, torch.device(device)))
    return [with_mean_length([rows[index] for index in group]) for group in plan]


def with_mean_length(rows: Rows) -> Rows:
    """Rows that are cut, or repeated, to their mean length."""
    length = max(1, round(sum(len(row["input_ids"]) for row in rows) / len(rows)))
    return [{**row, "input_ids": list(islice(cycle(row["input_ids"]), length))} for row in rows]


def train_equal_parts(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """With the decorator of `mbp-pytorch`, which splits a padded batch by the number of rows.

    It runs no backward pass where there is nothing to split, so it has two parts at least.
    """
    import mbp

    num_rows = max(1, min(PART_ROWS, task.shape.rows_per_step // 2))

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
    task.plain_step(model, optimizer, [task.warm_up_rows])
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
