"""The memory of a device: how much there is for this process, what it holds, what it could still take."""

import os
import re
import sys
from pathlib import Path

import psutil
import torch

from hf_mbp.out_of_memory import map_large_blocks, unused_heap_bytes

if sys.platform != "win32":
    import resource


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
