"""Measures the most memory that a process holds."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

POLL_SECONDS = 0.005
"""Who is measured may have the system count its peak anew (MBPTrainer does, at every step), so it is read all the time.
What was the peak in the last moments before that could be missed; a step takes its peak early, in its longest rows."""

FREED_IS_GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
"""Environment of processes that are measured: glibc then gives every freed tensor back to the system, as it does for
small programs. Else it keeps what is freed, in pieces, and the peak depends on how they happen to fit."""


class PeakMeter:
    """The most that this process holds while the meter is open, and what it held when it was opened, in bytes.

    On a CPU resident memory, as Linux counts it (0 elsewhere); on a GPU what torch has reserved.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.base_bytes = self.highest_bytes = 0
        self._is_polling, self._is_done = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> PeakMeter:
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        self._is_polling.wait()  # what a thread needs for itself is there now
        with self._lock:
            self._restart()
            self.base_bytes = self.highest_bytes = self._read()
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
            with self._lock:
                self.highest_bytes = max(self.highest_bytes, self._read())
            self._is_polling.set()

    def _restart(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now

    def _read(self) -> int:
        return int(torch.cuda.max_memory_reserved()) if self.device == "cuda" else status_bytes("VmHWM")


def status_bytes(entry: str) -> int:
    """What Linux notes of the memory of this process; 0 elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(entry)), 0)


class AddressSpaceMeter(PeakMeter):
    """The same of the address space on a CPU, which is what `RLIMIT_AS` limits.

    Resident memory can be more than that on top of what was there: a program fills gaps in what it had mapped before.
    """

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._old_peak_bytes = status_bytes("VmPeak")

    def _read(self) -> int:
        if self.device == "cuda":
            return super()._read()
        peak = status_bytes("VmPeak")  # which cannot be made to count anew
        return peak if peak > self._old_peak_bytes else status_bytes("VmSize")
