"""Reads what a device really holds, step by step; a budget that was predicted is corrected by it."""

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from hf_mbp import memory

RESERVE = 0.1
"""Share of the memory held from which giving back what is unused is worth the wait for a GPU."""


class Gauge:
    """The memory of one device, as far as this process uses it.

    What a CPU's process holds is its resident memory; of CUDA, what the caching allocator has reserved, which no one
    else can have; of MPS, what the driver has given.

    Args:
        device: where the model runs.
        may_reset: whether the device's own statistics may be reset; without that a CUDA device is not read.
    """

    def __init__(self, device: torch.device, *, may_reset: bool = True) -> None:
        self.device = device
        self._may_reset = may_reset or device.type != "cuda"

    def restart(self) -> None:
        """What `peak_bytes` returns counts from here on."""
        if self._may_reset:
            memory.restart_peak(self.device)

    def peak_bytes(self) -> int:
        """The most that was held since `restart`; 0 where that cannot be known."""
        return memory.peak_since_restart(self.device) if self._may_reset else 0

    def held_bytes(self) -> int:
        """What is held now."""
        return memory.held_memory(self.device)

    def free_bytes(self) -> int:
        """What this process could still take."""
        return memory.free_memory(self.device)

    def tidy(self, near_bytes: float) -> None:
        """Gives back what is kept in reserve, if what is held comes near the limit because of it.

        Blocks of many sizes leave gaps. An allocator of a CPU does not tell how much that is, and is quick to ask; that
        of CUDA has to wait for the device.
        """
        if self.held_bytes() < near_bytes:
            return
        if self.device.type != "cuda" or self.held_bytes() - memory.used_memory(self.device) > RESERVE * near_bytes:
            self.release()

    def release(self) -> None:
        """Gives back what the allocator keeps and nothing uses; does nothing where there is no way to."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
        elif self.device.type == "cpu" and (trim := _malloc_trim()) is not None:
            trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], Any] | None:
    """`malloc_trim` of glibc, which keeps freed blocks, and more of them the more sizes there are; `None` elsewhere."""
    if sys.platform != "linux":
        return None
    trim: Callable[[int], Any] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
