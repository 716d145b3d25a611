"""What running out of memory looks like on any device, and how memory is given back."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")

MESSAGES = (
    "can't allocate memory",  # torch's allocator of CPU memory
    "bad_alloc",  # C++ inside an operator
    "could not create a primitive",  # oneDNN, when a kernel that it compiles finds no place
    "out of memory",  # drivers and other backends: "CUDA error: out of memory", "MPS backend out of memory"
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)
"""Parts of the messages of those errors that have no type of their own."""

NO_SUCH_KERNEL = "could not create a primitive descriptor"
"""What oneDNN says when it has no kernel for these shapes: that is a bug."""

LENGTH_OF_REASON = 200
"""Characters of an allocator's message that say what happened; what follows is advice of its own."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there was no memory, on the host or on a device.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")), is_out_of_memory(RuntimeError("a bug"))
        (True, False)
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    is_plain = isinstance(error, RuntimeError) and not isinstance(error, torch.distributed.DistError)
    return is_plain and NO_SUCH_KERNEL not in str(error) and any(message in str(error) for message in MESSAGES)


def reason_of(error: BaseException) -> str:
    """The message of an out-of-memory error, short enough for a line.

    Example:
        >>> reason_of(RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate \
memory: you tried to allocate 4000 bytes. Error code 12 (Cannot allocate memory)"))
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes"
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[enforce fail at .*?(?=DefaultCPUAllocator)|\. Error code 12.*$", "", text)
    return text if len(text) <= LENGTH_OF_REASON else text[:LENGTH_OF_REASON].rsplit(" ", 1)[0] + " ..."


def give_back_memory() -> None:
    """Frees what nothing refers to any more, and hands cached memory back to the device and the system.

    To be called outside of an `except` block: the traceback there holds the tensors of the pass that failed.
    """
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
    trim_heap()


def unless_out_of_memory(run: Callable[[], Result]) -> Result | None:
    """What `run` returns; `None` if memory ran out, which has been given back by then."""
    try:
        return run()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    give_back_memory()  # outside of the except block
    return None


def trim_heap() -> None:
    """Hands the host memory that the C library keeps back to the system; does nothing where it is not glibc."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


LARGE_BLOCK = 2**20
"""Bytes from which a block leaves the address space when it is freed, once `map_large_blocks` was called."""

_M_MMAP_THRESHOLD = -3  # of malloc.h


def map_large_blocks() -> None:
    """Has the C library map large blocks one by one, as long as the process lives; only glibc can be told to.

    By itself it takes larger and larger ones from the heap, up to 32 MiB, and a block in use above it keeps the address
    space of all that was freed below. Mapped blocks cost page faults. Where the user has set the size, it stays.
    """
    is_set = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if not is_set and (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)


class _HeapCounts(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    )


def unused_heap_bytes() -> int:
    """Bytes of address space that the C library keeps and could hand out again; 0 where it does not tell."""
    libc = _glibc()
    if libc is None or not hasattr(libc, "mallinfo2"):  # from glibc 2.33 on
        return 0
    libc.mallinfo2.restype = _HeapCounts
    return int(libc.mallinfo2().fordblks)


@cache
def _glibc() -> Any:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") else None
