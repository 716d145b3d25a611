"""Sizes the budget of a micro-batch: what memory there is, and what a micro-batch of the user's model needs."""

import os
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hf_mbp.accumulation import half_precision
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.optimizer_memory import state_bytes
from hf_mbp.out_of_memory import map_large_blocks, unused_heap_bytes

if sys.platform != "win32":
    import resource

DEFAULT_FRACTION = 0.9
"""Share of the free memory that is used when no limit is named; the rest is for what is not ours to count."""


def total_memory(device: torch.device) -> int:
    """Bytes of memory that the device, or the machine for a CPU, has for this process."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    shared = [int(psutil.virtual_memory().total), *(limit for limit, _ in _group_limits())]
    return min([*(limit for limit, _ in _own_limits()), *(size // local_processes() for size in shared)])


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds on the device."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    return _resident_memory()


_PAGES = Path("/proc/self/statm")
"""Pages of this process: all of its address space, then those that are resident."""


def _resident_memory() -> int:
    """Bytes of this process that are in memory. Looked at before every micro-batch, so by one read of one file.

    psutil, which knows other systems, too, reads several to make sure of which process is meant.
    """
    if sys.platform != "linux":
        return int(psutil.Process().memory_info().rss)
    return int(_PAGES.read_bytes().split()[1]) * resource.getpagesize()


def free_memory(device: torch.device) -> int:
    """Bytes that this process could still take.

    A CPU's memory is what the machine has available, or what the control group and RLIMIT_AS leave if that is less. The
    processes of one machine share the first two, in equal parts.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    if device.type == "mps":
        return total_memory(device) - used_memory(device)
    own = [max(0, limit - used) for limit, used in _own_limits()]
    shared = [int(psutil.virtual_memory().available), *(max(0, limit - used) for limit, used in _group_limits())]
    return min([*own, *(left // local_processes() for left in shared)])


def local_processes() -> int:
    """How many processes train together on this machine, by what their launcher says."""
    return next((int(os.environ[name]) for name in _LOCAL_PROCESSES if os.environ.get(name, "").isdigit()), 1) or 1


_LOCAL_PROCESSES = (
    "LOCAL_WORLD_SIZE",
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
)
"""What torchrun, Intel MPI, Open MPI and MVAPICH2 say, in the order in which Accelerate asks."""


def _own_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes for each limit that holds for this process alone."""
    if sys.platform == "win32":
        return []
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space == resource.RLIM_INFINITY:
        return []
    # freed blocks in the middle of the heap still count for the limit, and the next tensors go there
    used = int(psutil.Process().memory_info().vms) - unused_heap_bytes()
    return [(address_space, max(0, used))]


def keep_address_space_free() -> None:
    """Where `RLIMIT_AS` holds, has freed tensors leave the address space at once.

    Else the heap grows up to the limit, and what is not taken from it fails from then on, however small: the kernels
    that oneDNN compiles are mapped.
    """
    if _own_limits():
        map_large_blocks()


_GROUPS = Path("/proc/self/cgroup")
_GROUP_ROOT = Path("/sys/fs/cgroup")
_GROUP_FILES = {
    "": ("memory.max", "memory.current"),  # version 2, where one tree has all controllers
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}
"""By the controller that `/proc/self/cgroup` names: what a control group may use, and what it uses."""


def _group_limits() -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group that this process is in, which the processes on a machine usually
    share. What cannot be read is no limit."""
    limits: list[tuple[int, int]] = []
    for controller, (limit_file, used_file) in _GROUP_FILES.items():
        for folder in _group_folders(controller):
            limit, used = _number_in(folder / limit_file), _number_in(folder / used_file)
            if limit is not None and used is not None:
                limits.append((limit, used - _reclaimable(folder / "memory.stat")))
    return limits


def _group_folders(controller: str) -> list[Path]:
    """From the group of this process up to the root, which is all that some containers show."""
    root = _GROUP_ROOT / controller
    own = re.findall(rf"^\d+:(?:[^:\n]*,)?{controller}(?:,[^:\n]*)?:/(.*)$", _text_of(_GROUPS), re.MULTILINE)
    folders = [root / path for path in own if ".." not in Path(path).parts]  # ".." is outside of what is mounted here
    return [root, *(at for folder in folders for at in (folder, *folder.parents) if root in at.parents)]


def _text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _number_in(path: Path) -> int | None:
    """The number that is all of a file; `None` where it has "max", or cannot be read."""
    text = _text_of(path).strip()
    return int(text) if text.isdecimal() else None


def _reclaimable(statistics: Path) -> int:
    """Bytes of files that were read and may be forgotten; a control group counts them as used."""
    values: dict[str, str] = dict(re.findall(r"^(\w+) (\d+)$", _text_of(statistics), re.MULTILINE))
    return int(values.get("total_inactive_file", values.get("inactive_file", 0)))


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
    free, used = free_memory(device), used_memory(device)
    if limit is None:
        room = int(DEFAULT_FRACTION * free)
    else:
        room = int(min(free, (limit if isinstance(limit, int) else limit * total_memory(device)) - used))
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


def held_memory(device: torch.device) -> int:
    """Bytes that this process keeps from others on the device; with what the allocator of a GPU has in reserve."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    if device.type == "mps":
        return int(torch.mps.driver_allocated_memory())
    return used_memory(device)


_highest: dict[torch.device, int] = {}
"""The most that was held before the last restart: a run's peak is kept when a step's is started anew."""


def restart_peak(device: torch.device) -> None:
    """Has `peak_since_restart` count from here on. Does nothing where the system has no such counter."""
    _highest[device] = peak_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and _CLEAR_PEAK.exists():
        try:
            _CLEAR_PEAK.write_text("5")  # the peak resident size becomes what is resident now
        except OSError:  # not permitted in some containers
            _read_only.add(device)


def peak_since_restart(device: torch.device) -> int:
    """Most bytes held on the device since `restart_peak`; 0 where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if device.type == "mps":
        return held_memory(device)  # its allocator keeps what it has had
    if device.type == "cpu" and _CLEAR_PEAK.exists() and device not in _read_only:
        return _peak_resident()
    return 0


_CLEAR_PEAK = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_read_only: set[torch.device] = set()


def _peak_resident() -> int:
    """The peak resident size, in bytes, since it was last cleared; 0 if the system does not tell."""
    match = re.search(r"VmHWM:\s*(\d+) kB", _STATUS.read_text())
    return int(match[1]) * 1024 if match else 0


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held on the device so far; for a CPU, its peak resident size; 0 where unknown."""
    now = 0
    if device.type == "cuda":
        now = int(torch.cuda.max_memory_allocated(device))
    elif (
        device.type == "cpu" and _STATUS.exists()
    ):  # that of `getrusage` may be the peak of the process that started us
        now = _peak_resident()
    return max(now, _highest.get(device, 0))
