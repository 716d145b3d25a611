"""How long micro-batches take, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_mbp.calibration import Timed

HAVE_EVENTS = ("cuda", "xpu")
"""Kinds of devices that note the time at which they come to a place in their queue."""


class Stopwatch:
    """Times micro-batches on a device.

    A CPU is done when a pass returns, and the clock of the host tells. A device with a queue notes by itself when it
    begins with a micro-batch and when it is done; that is read later, of those that are done by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Forgets all."""
        self._timed: list[tuple[int, float, Any, Any]] = []

    @property
    def can_time(self) -> bool:
        """Whether times can be told on this kind of device."""
        return self._device.type == "cpu" or self._device.type in HAVE_EVENTS

    @contextmanager
    def timing(self, rows: int, width: float) -> Iterator[None]:
        """Around the passes of a micro-batch `[rows, width]`; one that fails does not count."""
        started = self._mark()
        yield
        self._timed.append((rows, width, started, self._mark()))

    def finished(self) -> list[Timed]:
        """What was timed so far and is done; forgets all, also what is not done."""
        timed = [
            Timed(rows=rows, width=width, seconds=self._seconds(started, ended))
            for rows, width, started, ended in self._timed
            if self._is_done(ended)
        ]
        self.restart()
        return timed

    def _mark(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self._device).Event(enable_timing=True)
        event.record()
        return event

    def _is_done(self, mark: Any) -> bool:
        return self._device.type == "cpu" or bool(mark.query())

    def _seconds(self, started: Any, ended: Any) -> float:
        return float(ended - started if self._device.type == "cpu" else started.elapsed_time(ended) / 1000)
