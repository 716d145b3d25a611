"""What every contestant is given, and what it tells."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from benchmarks.rows import Rows, pad
from benchmarks.sizes import Size
from benchmarks.workloads import Shape, Workload

LEARNING_RATE = 1e-4

WARM_UP_TOKENS = 16
"""Length to which rows are cut for the warm-up: what is loaded, compiled or made once is so afterwards."""

PART_ROWS = 8
"""Rows at once where their number is fixed; on a CPU more of them are not faster, as they leave its caches."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Rows of a workload for a model of a size, for `steps` steps.

    `max_tokens` and `headroom_bytes` are for those that train under a limit. With a `dtype` of bfloat16 precision is
    mixed: weights, gradients and optimizer states stay in float32.
    """

    workload: Workload
    size: Size
    shape: Shape
    steps: int
    seed: int
    device: str
    dtype: str
    max_tokens: int
    headroom_bytes: int
    folder: str

    @property
    def is_mixed(self) -> bool:
        """Whether forward passes run in bfloat16."""
        return self.dtype == "bfloat16"

    def model(self) -> Any:
        """On the device."""
        return self.size.model(is_language_model=self.workload.is_language_model).to(self.device)

    def rows(self) -> Rows:
        """Those of an epoch."""
        return self.workload.rows(self.size)

    @property
    def warm_up_rows(self) -> Rows:
        """Short rows for an optimizer step."""
        rows = self.rows()[: self.shape.rows_per_step]
        return [{**row, "input_ids": row["input_ids"][:WARM_UP_TOKENS]} for row in rows]

    def random_steps(self) -> Iterator[Rows]:
        """The rows of each step, in random order, for those that train without a Trainer."""
        rows, size = self.rows(), self.shape.rows_per_step
        shuffle = random.Random(self.seed)  # noqa: S311
        for step in range(self.steps):
            first = step * size % len(rows)
            if first == 0:
                shuffle.shuffle(rows)
            yield rows[first : first + size]

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """Of a padded batch, in the precision that is asked for, for those that train without a Trainer."""
        on_device = {key: value.to(self.device) for key, value in inputs.items()}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_mixed):
            loss: torch.Tensor = model(**on_device).loss
        return loss

    def plain_step(self, model: Any, optimizer: torch.optim.Optimizer, parts: list[Rows]) -> None:
        """An optimizer step in plain PyTorch, part by part, each padded to its longest row."""
        num_rows = sum(map(len, parts))
        for part in parts:
            (self.loss_of(model, pad(part)) * (len(part) / num_rows)).backward()
        step_optimizer(model, optimizer)


def plain_optimizer(model: Any) -> torch.optim.Optimizer:
    """The one that Trainer makes."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def step_optimizer(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """With the clipping of Trainer."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


class Stopwatch(Protocol):
    """What a contestant tells when."""

    def start(self) -> None:
        """The first optimizer step begins; a warm-up that was started before does not count."""

    def stop(self) -> None:
        """The last one has ended."""
