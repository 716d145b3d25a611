"""A measurement: one contestant trains in a process of its own, where time, tokens, memory and loss are counted."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from benchmarks.contestants import CONTESTANTS
from benchmarks.flops import model_flops
from benchmarks.learned import loss_over
from benchmarks.sizes import SIZES
from benchmarks.task import Task
from benchmarks.workloads import WORKLOADS, Shape
from own_process import OwnProcesses, ProcessDiedError
from peak_meter import PeakMeter


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be measured; see `Task`. The repetition is the seed of weights, order and dropout."""

    workload: str
    size: str
    shape: str
    contestant: str
    repetition: int
    steps: int
    device: str
    dtype: str
    max_tokens: int
    headroom_bytes: int

    def task(self, folder: str) -> Task:
        """The contestant's view of it."""
        return Task(
            workload=WORKLOADS[self.workload],
            size=SIZES[self.size],
            shape=Shape.parse(self.shape),
            steps=self.steps,
            seed=self.repetition,
            device=self.device,
            dtype=self.dtype,
            max_tokens=self.max_tokens,
            headroom_bytes=self.headroom_bytes,
            folder=folder,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was counted in the steps after the warm-up.

    `tokens` are those that are not padding, `cells` all of them, in `micro_batches` forward passes; `flops` is what the
    tokens need, see `model_flops`. `setup_seconds` is what came before the first step and after the warm-up: what a
    trainer finds out about model and memory. `peak_bytes` is counted from `base_bytes`, what the process held after
    import and model building, and covers everything since then. `loss` is that of the trained model over the rows of
    the workload. After an error, all is zero but memory.
    """

    error: str = ""
    tokens: int = 0
    cells: int = 0
    micro_batches: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    loss: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    threads: int = 0


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Of a forward pass: tokens, and pairs of them in a row, that are not padding; and cells. The former as tensors, so
    that a GPU is not waited for."""

    tokens: torch.Tensor
    pairs: torch.Tensor
    cells: int

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Counts:
        """Rows have a mask; those in one long row have only positions instead, which begin anew with each of them."""
        mask = inputs.get("attention_mask")
        if mask is not None:
            lengths = mask.sum(1)
            return cls(tokens=lengths.sum(), pairs=lengths.square().sum(), cells=mask.numel())
        positions = inputs["position_ids"]
        # A row of n positions has sum(2 p + 1) = n^2 pairs.
        return cls(tokens=torch.tensor(positions.numel()), pairs=(2 * positions + 1).sum(), cells=positions.numel())


class Stopwatch:
    """Time, and what the model is given while it runs: counted by the model itself, whoever trains it."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.device = model, device
        self.started = self.stopped = time.perf_counter()
        self.setup_seconds = 0.0
        self._passes: list[Counts] = []
        self._counted: list[Counts] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        self._passes.append(Counts.of(kwargs))

    def start(self) -> None:
        """Counts from here on; what came since `stop` was the preparation."""
        self._synchronize()
        self.started = time.perf_counter()
        self.setup_seconds = self.started - self.stopped
        self._passes.clear()

    def stop(self) -> None:
        """Counts up to here."""
        self._synchronize()
        self.stopped = time.perf_counter()
        self._counted = list(self._passes)

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def reading(self) -> dict[str, Any]:
        """Fields of a measurement."""
        tokens = sum(int(counts.tokens) for counts in self._counted)
        pairs = sum(int(counts.pairs) for counts in self._counted)
        return {
            "tokens": tokens,
            "cells": sum(counts.cells for counts in self._counted),
            "micro_batches": len(self._counted),
            "flops": model_flops(self.model, tokens, pairs),
            "seconds": self.stopped - self.started,
            "setup_seconds": self.setup_seconds,
        }


def measure(order: Order, folder: str) -> Measurement:
    """Trains as ordered, in this process; running out of memory is a result, too."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(order.repetition)
    task = order.task(folder)
    model = task.model()
    stopwatch = Stopwatch(model, order.device)
    counted: dict[str, Any] = {}
    with PeakMeter(order.device) as meter:
        try:
            CONTESTANTS[order.contestant].train(task, model, stopwatch)
            counted = stopwatch.reading()
        except (RuntimeError, MemoryError) as raised:
            counted = {"error": f"{type(raised).__name__}: {raised}"}
    memory = {"base_bytes": meter.base_bytes, "peak_bytes": meter.peak_bytes}
    if not counted.get("error"):
        counted["loss"] = loss_over(model, task.rows())
    return Measurement(**counted, **memory, threads=torch.get_num_threads())


class Laboratory:
    """Performs measurements, each in a process of its own."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.processes = OwnProcesses(preload=[__name__])

    def measurement(self, order: Order) -> Measurement:
        """Of one order, also of a process that was killed."""
        try:
            return self.processes.run(measure, order, self.folder)
        except ProcessDiedError as death:
            return Measurement(error=str(death))
