"""Where the time of MBPTrainer's steps goes: micro-batches by width, the optimizer, the rest.

The times of micro-batches are also fitted by the cost model of the planner (see `hf_mbp.plan.Cost`), which tells what
padding, overheads and attention take, and whether other costs would make better plans.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.measure import Order
from benchmarks.rows import pad
from benchmarks.task import Task
from benchmarks.with_trainer import arguments_of
from hf_mbp import MBPMixin
from hf_mbp.plan import Budget, Cost, as_sizes, plan_rows
from hf_mbp.sizing import cost_of


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A micro-batch that ran, forward and backward."""

    rows: int
    width: int
    seconds: float

    @property
    def cells(self) -> int:
        """With padding."""
        return self.rows * self.width


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step: seconds from the end of the one before to its own, and its parts."""

    seconds: float
    optimizer_seconds: float
    ran: tuple[Ran, ...]


class Clock(TrainerCallback):
    """Keeps the steps as they were."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.steps: list[Step] = []
        self.ran: list[Ran] = []
        self._ended = self._before_optimizer = self._optimizer_seconds = 0.0

    def now(self) -> float:
        """When all that was launched has been computed."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The steps of an earlier run do not count."""
        self.steps.clear()
        self._ended = self.now()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """What was run before belongs to the sizing of the budget."""
        self.ran.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Gradients are there, and clipped."""
        self._before_optimizer = self.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Weights are updated."""
        self._optimizer_seconds = self.now() - self._before_optimizer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The next step begins."""
        now = self.now()
        step = Step(seconds=now - self._ended, optimizer_seconds=self._optimizer_seconds, ran=tuple(self.ran))
        self.steps.append(step)
        self._ended = now


class TimedTrainer(Trainer):
    """Notes what each call of its `training_step` took."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        self.clock = clock
        super().__init__(*args, callbacks=[clock], **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The stock one."""
        rows, width = inputs["input_ids"].shape
        start = self.clock.now()
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.clock.ran.append(Ran(rows=rows, width=width, seconds=self.clock.now() - start))
        return loss


class TimedMBPTrainer(MBPMixin, TimedTrainer):
    """Whose calls are the micro-batches."""


def phases_of(order: Order, folder: str) -> str:
    """Trains as ordered, in this process, and tells where the time went."""
    transformers.logging.set_verbosity_error()
    transformers.set_seed(order.repetition)
    task = order.task(folder)
    model = task.model()
    trainer = TimedMBPTrainer(
        model=model,
        args=TrainingArguments(**arguments_of(task), remove_unused_columns=False),
        train_dataset=task.warm_up_rows,
        data_collator=pad,
        clock=Clock(order.device),
    )
    trainer.train()
    trainer.train_dataset = task.rows()
    trainer.args.max_steps = task.steps + 1  # the first one also sizes the budget, and is left out
    trainer.train()
    steps = trainer.clock.steps[1:]
    ran = [one for step in steps for one in step.ran]
    planned = cost_of(model, torch.device(order.device))
    return "\n\n".join([parts(steps), widths(ran), costs(task, planned, ran)])


def parts(steps: list[Step]) -> str:
    """What a step takes its time for, on average."""
    whole = fmean(step.seconds for step in steps)
    micro_batches = fmean(sum(one.seconds for one in step.ran) for step in steps)
    optimizer = fmean(step.optimizer_seconds for step in steps)
    lines = {
        f"forward and backward of {fmean(len(step.ran) for step in steps):.1f} micro-batches": micro_batches,
        "optimizer": optimizer,
        "reading, planning, padding, clipping and the rest": whole - micro_batches - optimizer,
    }
    return "\n".join(f"{1000 * taken:>9,.1f} ms {taken / whole:>6.1%}  {what}" for what, taken in lines.items())


def widths(ran: list[Ran]) -> str:
    """What a cell takes in micro-batches of like width: those between two powers of two."""
    lines = ["    width  micro-batches  rows   cells       ms  us a cell"]
    by_width = sorted(ran, key=lambda one: one.width)
    for power, group in groupby(by_width, key=lambda one: (one.width - 1).bit_length()):
        alike = list(group)
        cells, taken = sum(one.cells for one in alike), sum(one.seconds for one in alike)
        lines.append(
            f"{f'..{2**power}':>9}{len(alike):>15}{fmean(one.rows for one in alike):>6.1f}{cells / len(alike):>8.0f}"
            f"{1000 * taken / len(alike):>9.1f}{1e6 * taken / cells:>11.1f}"
        )
    return "\n".join(lines)


def costs(task: Task, planned: Cost, ran: list[Ran]) -> str:
    """What the planner thinks of a micro-batch, what it took, and what other plans would take by that."""
    fitted, cell_seconds, error = fit(ran)
    steps = [as_sizes([len(row["input_ids"]) for row in rows]) for rows in task.random_steps()]
    now, better = (of_plans(steps, cost, fitted) for cost in (planned, fitted))
    unpadded = sum(of_unpadded(sizes, planned, fitted) for sizes in steps)
    shares = ", ".join(f"{taken / now['in all']:.1%} {what}" for what, taken in now.items() if what != "in all")
    return (
        f"A micro-batch costs {in_words(planned)} to the planner, and {in_words(fitted)} as measured\n"
        f"({1e6 * cell_seconds:.1f} us a cell; micro-batches are {error:.0%} off this, on average).\n"
        f"By what was measured, plans take: {shares}.\n"
        f"Plans for these costs would take {better['in all'] / now['in all']:.3f} of the time, and the same "
        f"micro-batches with nothing padded {unpadded / now['in all']:.3f}."
    )


def in_words(cost: Cost) -> str:
    """In units of a cell."""
    return f"{cost.overhead:.0f} cells, and {1e6 * cost.attention:.0f} millionths of one for each pair"


def fit(ran: list[Ran]) -> tuple[Cost, float, float]:
    """The costs nearest to the times, in relative terms; the seconds of a cell; and the mean error."""
    seconds = np.array([one.seconds for one in ran])
    terms = np.array([[1.0, one.cells, one.rows * one.width**2] for one in ran])
    kept = [0, 1, 2]
    while True:  # a term that would be negative is left out
        found = np.linalg.lstsq(terms[:, kept] / seconds[:, None], np.ones(len(ran)), rcond=None)[0]
        if (found > 0).all() or len(kept) == 1:
            break
        kept.remove(kept[int(found.argmin())])
    all_terms = np.zeros(3)
    all_terms[kept] = found
    overhead, cell, pair = all_terms
    if not cell > 0:
        raise ValueError("time does not grow with cells; measure a larger model, or on a machine with less to do")
    error = float(np.abs(terms @ all_terms / seconds - 1).mean())
    return Cost(overhead=overhead / cell, attention=pair / cell), cell, error


def of_plans(steps: Iterable[Any], by: Cost, taken: Cost) -> dict[str, float]:
    """What plans made by one cost take by another, and for what."""
    overhead = tokens = pairs = whole = 0.0
    for sizes in steps:
        lengths = sizes[:, 0]
        plan = plan_rows(sizes, Budget(), by)
        overhead += taken.overhead * len(plan)
        tokens += float(lengths.sum())
        pairs += taken.attention * float((lengths**2).sum())
        whole += sum(float(taken(np.array(len(part)), lengths[part].max())) for part in plan)
    padding = whole - overhead - tokens - pairs
    return {"overheads": overhead, "tokens": tokens, "their pairs": pairs, "padding": padding, "in all": whole}


def of_unpadded(sizes: Any, by: Cost, taken: Cost) -> float:
    """What micro-batches take whose rows have their mean length."""
    lengths = sizes[:, 0]
    return sum(float(taken(np.array(len(part)), lengths[part].mean())) for part in plan_rows(sizes, Budget(), by))
