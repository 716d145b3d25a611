"""Reads what a device really holds, step by step; a budget that was predicted is corrected by it."""

import torch

from hf_mbp import device_memory
from hf_mbp.out_of_memory import trim_heap

NEAR, RESERVE = 0.9, 0.1
"""Shares of what is allowed: a GPU gives back what is unused if it holds more than one, and that much is unused."""

KEPT = 0.25
"""Share of the room for activations that a CPU's allocator may keep between micro-batches: giving memory back costs
little, and getting it again a page fault for every 4 KiB."""


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
            device_memory.restart_peak(self.device)

    def peak_bytes(self) -> int:
        """The most that was held since `restart`; 0 where that cannot be known."""
        return device_memory.peak_since_restart(self.device) if self._may_reset else 0

    def held_bytes(self) -> int:
        """What is held now."""
        return device_memory.held_memory(self.device)

    def free_bytes(self) -> int:
        """What this process could still take."""
        return device_memory.free_memory(self.device)

    def tidy(self, resting_bytes: float, allowed_bytes: float) -> None:
        """Gives back what the allocator keeps and nothing uses, if it is so much that it could lead beyond the limit.

        To be called when no micro-batch runs. Blocks of many sizes leave gaps: a CPU's then holds more than what rests.
        That of CUDA keeps what the next micro-batch will need, and has to wait for the device to give it back, so there
        only what is reserved and was not used at the peak either counts. Once it is given back it is not reserved, and
        the micro-batches that follow do not have the device wait again.

        Args:
            resting_bytes: what is in use when no micro-batch runs.
            allowed_bytes: what may be held.
        """
        held = self.held_bytes()
        if self.device.type == "cuda":
            unused = held - torch.cuda.max_memory_allocated(self.device)
            is_due = held > NEAR * allowed_bytes and unused > RESERVE * allowed_bytes
        else:
            is_due = held - resting_bytes > KEPT * (allowed_bytes - resting_bytes)
        if is_due:
            self.release()

    def release(self) -> None:
        """Gives back what the allocator keeps and nothing uses; does nothing where there is no way to."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()
        elif self.device.type == "cpu":
            trim_heap()
