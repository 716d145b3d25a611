"""What training may take of a device's memory, and what a pass of the user's model does take."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_mbp import device_memory
from hf_mbp.accumulation import half_precision
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.optimizer_memory import state_bytes

DEFAULT_FRACTION = 0.9
"""Share of the free memory that is used when no limit is named; the rest is for what is not ours to count."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """What a device has for training: of `allowed_bytes` in all, `resting_bytes` are taken when no micro-batch runs."""

    allowed_bytes: int
    resting_bytes: int

    @property
    def activation_bytes(self) -> int:
        """What is left for the activations of a micro-batch."""
        return self.allowed_bytes - self.resting_bytes


def room_for_training(
    device: torch.device, limit: float | int | None, pending_bytes: int, *, step_bytes: int = 0
) -> Room:
    """What the activations of a micro-batch may take, beside all else.

    Args:
        device: where the model runs.
        limit: a fraction of the device's memory or a number of bytes for all that this process holds there; `None`
            for 0.9 of what is free.
        pending_bytes: what training will allocate, and keep, besides activations: gradients, optimizer states.
        step_bytes: what the optimizer takes for a moment beside them, when there are no activations.

    Raises:
        ValueError: nothing is left.
    """
    free, used = device_memory.free_memory(device), device_memory.used_memory(device)
    if limit is None:
        room = int(DEFAULT_FRACTION * free)
    else:
        room = int(min(free, (limit if isinstance(limit, int) else limit * device_memory.total_memory(device)) - used))
    if room - pending_bytes <= 0 or room - pending_bytes < step_bytes:
        needed = pending_bytes + step_bytes
        remedy = (
            f"Raise memory_limit above {format_bytes(used + needed)}"
            if room < free and needed < free
            else "Free some of it"
        )
        raise ValueError(
            f"{_named(limit)}: no memory is left for activations on "
            f"{device}. This process holds {format_bytes(used)}, {format_bytes(free)} are free, and "
            f"gradients and optimizer states will take {format_bytes(pending_bytes)} more"
            + (f", its step {format_bytes(step_bytes)} for a moment" if step_bytes else "")
            + f". {remedy}, or "
            "take a smaller model, a smaller dtype, fewer trainable parameters or an optimizer with less state."
        )
    return Room(allowed_bytes=used + room, resting_bytes=used + pending_bytes)


def _named(limit: float | int | None) -> str:
    """The option as it works: a size in a unit that can be read, or what stands for it if it is not set."""
    if limit is None:
        return f"memory_limit is not set, which is {DEFAULT_FRACTION} of what is free"
    return f"memory_limit={format_bytes(limit) if isinstance(limit, int) else limit}"


def pending_training_bytes(
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    *,
    accumulates_in_fp32: bool = False,
) -> int:
    """Bytes of gradients and optimizer states that do not exist yet; for states see `optimizer_memory`.

    Gradients that are summed in float32 take four bytes more where weights are half precision.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trainable if p.grad is None)
    sums = 4 * sum(p.numel() for p in half_precision(trainable)) if accumulates_in_fp32 else 0
    return gradients + sums + state_bytes(optimizer, trainable)


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operators create while it is active; works on any device.

    `peak_bytes` is the most that was alive at once, without the scratch memory operators use inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tree_map_only(torch.Tensor, self._know, (args, kwargs))  # or an in-place result would pass for a new tensor
        result = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._count, result)
        return result

    def _know(self, tensor: torch.Tensor) -> bool:
        """Remembers the tensor's storage; whether it is new. Sparse tensors have none."""
        if tensor.layout != torch.strided:
            return False
        storage = tensor.untyped_storage()
        is_new = storage not in self._known
        self._known.add(storage)
        return is_new

    def _count(self, tensor: torch.Tensor) -> None:
        if self._know(tensor):
            storage = tensor.untyped_storage()
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.live_bytes -= size


def measure_activations(run: Callable[[], Any]) -> int:
    """Peak bytes of the tensors that `run`, one forward and backward pass, allocates.

    Let the gradients exist before, or they are counted as activations.
    """
    with AllocationTracker() as tracker:
        run()
    return int(tracker.peak_bytes)
