"""A measurement: one contestant trains in a process of its own, where time, tokens and memory are counted."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.contestants import CONTESTANTS, Task
from benchmarks.workloads import WORKLOADS, Shape

POLL_SECONDS = 0.02
"""A contestant may have the system count its peak anew (MBPTrainer does, at every step), so it is read all the time.
What was the peak in the last moments before that could be missed; a step takes its peak early, in its longest rows."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be measured; see `Task`."""

    workload: str
    shape: str
    contestant: str
    repetition: int
    steps: int
    device: str
    max_tokens: int
    headroom_bytes: int

    def task(self, folder: str) -> Task:
        """The contestant's view of it."""
        return Task(
            workload=WORKLOADS[self.workload],
            shape=Shape.parse(self.shape),
            steps=self.steps,
            device=self.device,
            max_tokens=self.max_tokens,
            headroom_bytes=self.headroom_bytes,
            folder=folder,
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was counted in the steps after the warm-up.

    `tokens` are those that are not padding, `cells` all of them, in `micro_batches` forward passes. `setup_seconds` is
    what came before the first step and after the warm-up: what a trainer finds out about model and memory.
    `peak_bytes` is counted from `base_bytes`, what the process held after import and model building, and covers
    everything since then. After an error, all is zero but memory.
    """

    error: str = ""
    tokens: int = 0
    cells: int = 0
    micro_batches: int = 0
    seconds: float = 0.0
    setup_seconds: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    threads: int = 0


class Stopwatch:
    """Time, and what the model is given while it runs: counted by the model itself, whoever trains it."""

    def __init__(self, model: Any, device: str) -> None:
        self.device = device
        self.started = self.stopped = time.perf_counter()
        self.setup_seconds = 0.0
        self._passes: list[tuple[torch.Tensor, int]] = []
        self._counted: list[tuple[torch.Tensor, int]] = []
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, model: Any, args: Any, kwargs: Any) -> None:  # noqa: ARG002
        mask = kwargs["attention_mask"]
        self._passes.append((mask.sum(), mask.numel()))  # a tensor, so that a GPU is not waited for

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
        return {
            "tokens": sum(int(tokens) for tokens, _ in self._counted),
            "cells": sum(cells for _, cells in self._counted),
            "micro_batches": len(self._counted),
            "seconds": self.stopped - self.started,
            "setup_seconds": self.setup_seconds,
        }


class PeakMeter:
    """The most that this process holds while the meter is open, and what it held when it was opened, in bytes.

    On a CPU resident memory, as Linux counts it (0 elsewhere); on a GPU what torch has reserved.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.base_bytes = self.highest_bytes = 0
        self._is_done = threading.Event()

    def __enter__(self) -> PeakMeter:
        self._restart()
        self.base_bytes = self.highest_bytes = self._read()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_done.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """On top of what was there."""
        return self.highest_bytes - self.base_bytes

    def _poll(self) -> None:
        is_done = False
        while not is_done:
            is_done = self._is_done.wait(POLL_SECONDS)
            self.highest_bytes = max(self.highest_bytes, self._read())

    def _restart(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now

    def _read(self) -> int:
        if self.device == "cuda":
            return int(torch.cuda.max_memory_reserved())
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure(order: Order, folder: str) -> Measurement:
    """Trains as ordered, in this process; running out of memory is a result, too."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.set_seed(0)
    task = order.task(folder)
    model = task.workload.model().to(order.device)
    stopwatch = Stopwatch(model, order.device)
    counted: dict[str, Any] = {}
    with PeakMeter(order.device) as meter:
        try:
            CONTESTANTS[order.contestant].train(task, model, stopwatch)
            counted = stopwatch.reading()
        except (RuntimeError, MemoryError) as raised:
            counted = {"error": f"{type(raised).__name__}: {raised}"}
    memory = {"base_bytes": meter.base_bytes, "peak_bytes": meter.peak_bytes}
    return Measurement(**counted, **memory, threads=torch.get_num_threads())


def answer_with_measurement(order: Order, folder: str, answer: Any) -> None:
    """What the process of a measurement does."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        measurement = measure(order, folder)
    answer.send(asdict(measurement))


class Laboratory:
    """Performs measurements, each in a process that is forked from one that has done nothing but import."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload([__name__])
        # Before Python 3.13 that process looks for modules only where the environment says, and goes without.
        places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def measurement(self, order: Order) -> Measurement:
        """Of one order, also of a process that was killed."""
        here, there = self.processes.Pipe(duplex=False)
        process = self.processes.Process(target=answer_with_measurement, args=(order, self.folder, there))
        process.start()
        there.close()
        try:
            measurement = Measurement(**here.recv())
        except EOFError:
            process.join()
            measurement = Measurement(error=f"the process ended without a word (exit code {process.exitcode})")
        process.join()
        return measurement
