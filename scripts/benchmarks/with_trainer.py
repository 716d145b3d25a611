"""Contestants that are a Trainer: the stock one, its ways to sample, and MBPTrainer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.rows import pad
from benchmarks.task import LEARNING_RATE, Stopwatch, Task
from hf_mbp import MBPConfig


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
            args=TrainingArguments(**arguments_of(task), remove_unused_columns=False, **self.arguments),
            train_dataset=task.warm_up_rows,
            data_collator=pad,
            callbacks=[TellSteps(stopwatch)],
            **self.options(task),
        )
        trainer.train()
        trainer.train_dataset = task.rows()
        trainer.args.max_steps = task.steps
        trainer.train()


def arguments_of(task: Task) -> dict[str, Any]:
    """Those of the warm-up; nothing is saved and nothing logged, but what the last step logs."""
    return {
        "output_dir": task.folder,
        "per_device_train_batch_size": task.shape.rows_per_batch,
        "gradient_accumulation_steps": task.shape.batches,
        "max_steps": 1,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "logging_steps": 1_000_000,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": task.device == "cuda",
        "use_cpu": task.device == "cpu",
        "bf16": task.is_mixed,
        "seed": task.seed,
    }


def under_max_tokens(task: Task) -> dict[str, Any]:
    """The budget is named."""
    return {"mbp_config": MBPConfig(max_tokens_per_micro_batch=task.max_tokens)}


def under_memory_limit(task: Task) -> dict[str, Any]:
    """The limit of a process counts all that it holds, so what it holds already is added."""
    held = torch.cuda.memory_reserved() if task.device == "cuda" else psutil.Process().memory_info().rss
    return {"mbp_config": MBPConfig(memory_limit=held + task.headroom_bytes)}
