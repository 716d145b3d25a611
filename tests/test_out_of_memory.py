"""Errors that say that memory ran out are told from all others."""

import pytest
import torch

from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory, reason_of, unless_out_of_memory


def raised(run: object) -> BaseException:
    try:
        run()  # type: ignore[operator]
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_what_torch_raises_on_a_cpu() -> None:
    error = raised(lambda: torch.empty(2**60))
    assert is_out_of_memory(error)
    assert reason_of(error).startswith("DefaultCPUAllocator: can't allocate memory: you tried to allocate ")
    assert "enforce" not in reason_of(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GiB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)
    assert reason_of(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("out of memory"),
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        KeyboardInterrupt(),
        torch.distributed.DistBackendError("NCCL error: out of memory on rank 3"),
    ],
)
def test_anything_else(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_a_long_message_is_cut_between_words() -> None:
    reason = reason_of(RuntimeError("out of memory, " + "word " * 100))
    assert reason.endswith("word ...")
    assert len(reason) <= 204


def test_memory_is_given_back_without_a_device() -> None:
    give_back_memory()


def test_what_runs_out_of_memory_returns_nothing_and_other_errors_pass() -> None:
    def failing(error: Exception) -> None:
        raise error

    assert unless_out_of_memory(lambda: 7) == 7
    assert unless_out_of_memory(lambda: failing(torch.OutOfMemoryError("CUDA out of memory."))) is None
    with pytest.raises(RuntimeError, match="a bug"):
        unless_out_of_memory(lambda: failing(RuntimeError("a bug")))
