"""Measures the most memory that a process holds."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

POLL_SECONDS = 0.005
"""Who is measured may have the system count its peak anew (MBPTrainer does, at every step), so it is read all the time.
What was the peak in the last moments before that could be missed; a step takes its peak early, in its longest rows."""


class PeakMeter:
    """The most that this process holds while the meter is open, and what it held when it was opened, in bytes.

    On a CPU resident memory, as Linux counts it (0 elsewhere); on a GPU what torch has reserved.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.base_bytes = self.highest_bytes = 0
        self._is_polling, self._is_done = threading.Event(), threading.Event()

    def __enter__(self) -> PeakMeter:
        self._restart()
        self.base_bytes = self.highest_bytes = self._read()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        self._is_polling.wait()  # what a thread needs for itself is there now
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
            self._is_polling.set()

    def _restart(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now

    def _read(self) -> int:
        return int(torch.cuda.max_memory_reserved()) if self.device == "cuda" else highest_resident_bytes()


def highest_resident_bytes() -> int:
    """Most memory of this process that was resident since the system was told to count anew; 0 where it does not."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)
