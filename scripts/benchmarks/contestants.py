"""Contestants: the ways to train that are compared. All step the same optimizer over the same rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from typing import Any, Protocol

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.workloads import Rows, Shape, Workload, pad
from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.memory import parse_memory_limit

LEARNING_RATE = 1e-4

WARM_UP_TOKENS = 16
"""Length to which rows are cut for the warm-up: what is loaded, compiled or made once is so afterwards."""

LIMIT_ROWS = 8
"""Rows at once where nothing is padded; on a CPU more of them are not faster, as they leave its caches."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What every contestant is given; `max_tokens` and `headroom_bytes` are for those that train under a limit."""

    workload: Workload
    shape: Shape
    steps: int
    device: str
    max_tokens: int
    headroom_bytes: int
    folder: str

    @property
    def warm_up_rows(self) -> Rows:
        """Short rows for an optimizer step."""
        rows = self.workload.rows()[: self.shape.rows_per_step]
        return [{**row, "input_ids": row["input_ids"][:WARM_UP_TOKENS]} for row in rows]

    def random_steps(self) -> Iterator[Rows]:
        """The rows of each step, in random order, for those that train without a Trainer."""
        rows, size = self.workload.rows(), self.shape.rows_per_step
        shuffle = random.Random(0)  # noqa: S311
        for step in range(self.steps):
            first = step * size % len(rows)
            if first == 0:
                shuffle.shuffle(rows)
            yield rows[first : first + size]


class Stopwatch(Protocol):
    """What a contestant tells when."""

    def start(self) -> None:
        """The first optimizer step begins; a warm-up that was started before does not count."""

    def stop(self) -> None:
        """The last one has ended."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to train: `train(task, model, stopwatch)` warms up and trains `task.steps` steps.

    `needs_batches`: with one batch a step it would do what `trainer` does, and is left out. `package`: the module of
    the package that it tries; where that is not installed, it is left out, too.
    """

    name: str
    title: str
    train: Callable[[Task, Any, Stopwatch], None]
    needs_batches: bool = False
    package: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the package is there that it needs."""
        return not self.package or find_spec(self.package) is not None


class TellSteps(TrainerCallback):
    """Starts the stopwatch with the first step and stops it after the last, with all that is done after a step."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self.stopwatch = stopwatch

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Its rows have been read, and whatever a trainer finds out first is found out."""
        if state.global_step == 0:
            self.stopwatch.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The last epoch counts; those before it are overwritten."""
        self.stopwatch.stop()


@dataclass(frozen=True, kw_only=True)
class WithTrainer:
    """Trains with a class of Trainer."""

    trainer_class: type[Trainer] = Trainer
    arguments: dict[str, Any] = field(default_factory=dict)
    options: Callable[[Task], dict[str, Any]] = lambda task: {}  # noqa: ARG005

    def __call__(self, task: Task, model: Any, stopwatch: Stopwatch) -> None:
        """Trains twice with the same trainer, so that the optimizer's states are there when time is taken."""
        trainer = self.trainer_class(
            model=model,
            args=self.training_arguments(task),
            train_dataset=task.warm_up_rows,
            data_collator=pad,
            callbacks=[TellSteps(stopwatch)],
            **self.options(task),
        )
        trainer.train()
        trainer.train_dataset = task.workload.rows()
        trainer.args.max_steps = task.steps
        trainer.train()

    def training_arguments(self, task: Task) -> TrainingArguments:
        """Those of the warm-up; nothing is saved and nothing logged, but what the last step logs."""
        return TrainingArguments(
            output_dir=task.folder,
            per_device_train_batch_size=task.shape.rows_per_batch,
            gradient_accumulation_steps=task.shape.batches,
            max_steps=1,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            logging_steps=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=task.device == "cuda",
            use_cpu=task.device == "cpu",
            seed=0,
            **self.arguments,
        )


def train_equal_rows(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """Plain PyTorch on rows of the mean length: what the device does without any padding, and without a Trainer."""
    model.train()
    optimizer = plain_optimizer(model)
    rows = task.workload.equal_rows()
    stopwatch.start()
    plain_step(model, optimizer, task.warm_up_rows, task.device)
    stopwatch.start()
    for step in range(task.steps):
        first = step * task.shape.rows_per_step % len(rows)
        plain_step(model, optimizer, rows[first : first + task.shape.rows_per_step], task.device)
    stopwatch.stop()


def plain_step(model: Any, optimizer: torch.optim.Optimizer, rows: Rows, device: str) -> None:
    """An optimizer step, a few rows at a time, with the clipping that Trainer does, too."""
    for start in range(0, len(rows), LIMIT_ROWS):
        part = rows[start : start + LIMIT_ROWS]
        inputs = {key: value.to(device) for key, value in pad(part).items()}
        (model(**inputs).loss * (len(part) / len(rows))).backward()
    step_optimizer(model, optimizer)


def plain_optimizer(model: Any) -> torch.optim.Optimizer:
    """The one that Trainer makes."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def step_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """With the clipping of Trainer."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train_equal_parts(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """Plain PyTorch with the decorator of `mbp-pytorch`, which splits a padded batch by the number of rows."""
    import mbp

    @mbp.apply(["input_ids", "attention_mask", "labels"], ub_size=LIMIT_ROWS, device=task.device)
    def loss_of(**inputs: torch.Tensor) -> torch.Tensor:
        return model(**inputs).loss

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
    """Plain PyTorch over batches of `online-dynamic-batching`, which holds a number of tokens, not of rows.

    An optimizer step is taken as soon as as many rows as are asked for have been seen, so steps are larger than that.
    Time counts from when its worker has started and the first batch is there.
    """
    import odb

    model.train()
    optimizer = plain_optimizer(model)
    stopwatch.start()
    plain_step(model, optimizer, task.warm_up_rows, task.device)
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
        inputs = {key: batch[key].to(task.device) for key in ("input_ids", "attention_mask", "labels")}
        num_rows = len(inputs["input_ids"])
        (model(**inputs).loss * (num_rows / task.shape.rows_per_step)).backward()
        seen += num_rows
        if seen >= task.shape.rows_per_step:
            step_optimizer(model, optimizer)
            seen = 0
    stopwatch.stop()


def under_max_tokens(task: Task) -> dict[str, Any]:
    """The budget is named."""
    return {"mbp_config": MBPConfig(max_tokens_per_micro_batch=task.max_tokens)}


def under_memory_limit(task: Task) -> dict[str, Any]:
    """The limit of a process counts all that it holds, so what it holds already is added."""
    held = torch.cuda.memory_reserved() if task.device == "cuda" else psutil.Process().memory_info().rss
    return {"mbp_config": MBPConfig(memory_limit=held + task.headroom_bytes)}


def parse_headroom(text: str) -> int:
    """Bytes of `1GiB`; raises `ValueError` for anything that is no size."""
    size = parse_memory_limit(text)
    if not isinstance(size, int):
        raise ValueError(f"memory_limit={text!r} is a fraction; write a size such as 1GiB")
    return size


CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name="mbp", title="MBPTrainer", train=WithTrainer(trainer_class=MBPTrainer)),
        Contestant(
            name="mbp_max_tokens",
            title="MBPTrainer, max_tokens",
            train=WithTrainer(trainer_class=MBPTrainer, options=under_max_tokens),
        ),
        Contestant(
            name="mbp_memory_limit",
            title="MBPTrainer, memory_limit",
            train=WithTrainer(trainer_class=MBPTrainer, options=under_memory_limit),
        ),
        Contestant(name="trainer", title="Trainer", train=WithTrainer()),
        Contestant(
            name="group_by_length",
            title="Trainer, group_by_length",
            train=WithTrainer(arguments={"train_sampling_strategy": "group_by_length"}),
            needs_batches=True,
        ),
        Contestant(
            name="batch_rebalance",
            title="Trainer, batch_rebalance",
            train=WithTrainer(arguments={"train_sampling_strategy": "batch_rebalance"}),
            needs_batches=True,
        ),
        Contestant(name="mbp_pytorch", title="mbp-pytorch", train=train_equal_parts, package="mbp"),
        Contestant(
            name="online_dynamic_batching",
            title="online-dynamic-batching",
            train=train_token_batches,
            package="odb",
        ),
        Contestant(name="limit", title="equal rows, plain PyTorch", train=train_equal_rows),
    )
}
"""In the order in which they run. `trainer` is what the others are compared with."""

BASELINE = "trainer"
