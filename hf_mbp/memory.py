"""Sizes the budget of a micro-batch: what memory there is, and what a micro-batch of the user's model needs."""

import re
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_mbp.accumulation import half_precision
from hf_mbp.plan import Budget

if sys.platform != "win32":
    import resource

DEFAULT_FRACTION = 0.9
"""Share of the free memory that is used when no limit is named; the rest is for what is not ours to count."""

SAFETY = 1.2
"""Predicted bytes are raised by this factor: operators allocate scratch memory that no tracker sees, allocators
round up, and fragmentation takes its part."""

SMALLEST_LIMIT = 2**20
"""Bytes below which a number without a unit is taken for a slip: memory_limit=20 hardly means 20 bytes."""

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}
_UNITS |= {f"{unit}I": 1024**power for power, unit in enumerate("KMGT", start=1)}


def parse_memory_limit(value: float | str | None) -> float | int | None:
    """A memory limit as a fraction (float, up to 1) or a number of bytes (int).

    Raises:
        ValueError: `value` is neither.

    Example:
        >>> parse_memory_limit("20GiB"), parse_memory_limit("500 MB"), parse_memory_limit("0.8")
        (21474836480, 500000000, 0.8)
    """
    if value is None:
        return None
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:E[+-]?[0-9]+)?)\s*(?:([KMGT]I?|)B?)\s*", str(value).upper())
    if match:
        number, size = float(match[1]), float(match[1]) * _UNITS[match[2]]
        has_unit = not match[0].strip()[-1].isdigit()
        if 0 < number <= 1 and not has_unit:
            return number
        if size >= (1 if has_unit else SMALLEST_LIMIT):
            return int(size)
    raise ValueError(
        f"memory_limit={value!r} is neither a size nor a fraction of the device's memory. Write for example "
        'memory_limit="20GiB", or memory_limit=0.8 for 80 % of the memory.'
    )


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device, or the machine for a CPU, has for this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _process_limits())])


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds on the device."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    return int(psutil.Process().memory_info().rss)


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take.

    A CPU's memory is what the machine has available, and what the control group and RLIMIT_AS leave if that is less.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "mps":
        return total_memory(device) - used_memory(device)
    return min([int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _process_limits())])


def _process_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes for each limit that holds for this process and not for the machine."""
    limits: list[tuple[int, int]] = []
    if sys.platform == "win32":
        return limits
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        limits.append((address_space, int(psutil.Process().memory_info().vms)))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()) != "max":
            limits.append((int(text), int(Path(used).read_text()) - _reclaimable(Path(used).parent / "memory.stat")))
    return limits


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that were read and may be forgotten; a control group counts them as used."""
    lines = statistics.read_text().splitlines() if statistics.is_file() else []
    values = dict(line.split() for line in lines)
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


def room_for_activations(device: torch.device, limit: float | int | None, pending_bytes: int) -> int:
    """Bytes that the activations of a micro-batch may take.

    Args:
        device: where the model runs.
        limit: a fraction of the device's memory or a number of bytes for all that this process holds there; `None`
            for 0.9 of what is free.
        pending_bytes: what training will allocate besides activations: gradients, optimizer states.

    Raises:
        ValueError: nothing is left.
    """
    free = free_memory(device)
    if limit is None:
        room = DEFAULT_FRACTION * free
    else:
        allowed = limit if isinstance(limit, int) else limit * total_memory(device)
        room = min(free, allowed - used_memory(device))
    room -= pending_bytes
    if room <= 0:
        raise ValueError(
            f"memory_limit={limit if limit is not None else DEFAULT_FRACTION}: no memory is left for activations on "
            f"{device}. This process holds {format_bytes(used_memory(device))}, {format_bytes(free)} are free, and "
            f"gradients and optimizer states will take {format_bytes(pending_bytes)} more. Raise memory_limit, or "
            "take a smaller model, a smaller dtype, fewer trainable parameters or an optimizer with less state."
        )
    return int(room)


def pending_training_bytes(
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    *,
    accumulates_in_fp32: bool = False,
) -> int:
    """Bytes of gradients and optimizer states that do not exist yet.

    States are counted as two values a parameter, the most that common optimizers (AdamW) keep, unless there are some
    already. Gradients that are summed in float32 take four bytes more where weights are half precision.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    gradients = sum(p.numel() * p.element_size() for p in trainable if p.grad is None)
    has_states = optimizer is not None and len(optimizer.state) > 0
    sums = 4 * sum(p.numel() for p in half_precision(trainable)) if accumulates_in_fp32 else 0
    return gradients + sums + (0 if has_states else 2 * size)


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


def fit_budget(measured: list[tuple[int, int, int]], max_bytes: int) -> Budget:
    """The budget that keeps activations under `max_bytes`, from a few measured `(rows, width, bytes)`.

    Bytes are taken as `rows x (a x width + b x width^2)` with the smallest `b`, and then the smallest `a`, for which no
    measured shape is predicted too small at its own width or wider. What does not grow with the micro-batch (a
    gradient before it is added, for one) is counted as growing, so small measured shapes give a cautious budget.

    Example:
        >>> fit_budget([(1, 10, 1000), (1, 100, 20000)], max_bytes=10**6).tokens_at(100)
        4166
    """
    per_cell = sorted((width, size / (rows * width)) for rows, width, size in measured)
    (narrow, at_narrow), (wide, at_wide) = per_cell[0], per_cell[-1]
    per_pair = max(0.0, (at_wide - at_narrow) / (wide - narrow)) if wide > narrow else 0.0
    return Budget(
        max_bytes=float(max_bytes),
        bytes_per_cell=SAFETY * max(0.0, *(value - per_pair * width for width, value in per_cell)),
        bytes_per_pair=SAFETY * per_pair,
    )


def format_bytes(size: float) -> str:
    """A size for people.

    Example:
        >>> format_bytes(3 * 2**30)
        '3.0 GiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024 or unit == "GiB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError("unreachable")


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held on the device so far; for a CPU, its peak resident size; 0 where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type == "cpu" and sys.platform == "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return 0
