"""A model without memory: its twin of fake tensors, which have shapes, dtypes and storages, but no values.

Operators run on them as on others, as far as memory goes, at no cost and for a device that is not there, too. Fake
tensors are private to torch (`torch._subclasses`, which `torch.compile` uses), and so is the engine of autograd; only
this module knows them.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten: Any = torch.ops.aten


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, tensors are created fake, and operators take them.

    Raises:
        ValueError: an operator needs the values of a tensor, or has no rule for the shape of its result.
    """
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _MissingShapes():  # type: ignore[no-untyped-call]
            yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        raise ValueError(
            f"The memory of this model cannot be estimated without running it: {str(error) or type(error).__name__} "
            "depends on the values of a tensor. For a mixture of experts, call "
            'model.set_experts_implementation("grouped_mm"). Otherwise leave the budget to the trainer, which runs the '
            "model to measure it."
        ) from None


def fake_twin(model: nn.Module) -> Any:
    """A copy of the model with fake tensors, on the CPU, in the place of its own; call it within `fake_tensors`.

    The model may have its tensors on any device, the meta device included. Tensors that it shares stay shared.
    """
    twins: dict[int, Any] = {}
    for tensor in _tensors_of(model):
        twin = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
        is_parameter = isinstance(tensor, nn.Parameter)
        twins[id(tensor)] = nn.Parameter(twin, requires_grad=tensor.requires_grad) if is_parameter else twin
    return copy.deepcopy(model, twins)


def _tensors_of(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


def fake_like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fake tensors of these shapes and dtypes, on the CPU; call it within `fake_tensors`."""
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


def backward(loss: torch.Tensor) -> None:
    """`loss.backward()`, which would suspend `CudaKernels`: layers that are checkpointed are recomputed in it."""
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


class _MissingShapes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Results of operators whose own rule for fake tensors refuses what their kernels accept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._grouped_mm.default:  # its rule knows bfloat16 only
            return _grouped_product(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _grouped_product(
    first: torch.Tensor, second: torch.Tensor, offs: Any = None, *_: Any, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The result of a matrix product of groups of rows, of columns, or of what is summed over."""
    size = [first.shape[-2], second.shape[-1]]
    if first.dim() == second.dim():
        size.insert(0, offs.shape[0] if first.dim() == 2 else first.shape[0])
    return first.new_empty(size, dtype=out_dtype)


class CudaKernels(TorchFunctionMode):
    """On fake tensors of the CPU, allocates what CUDA's kernels do where they differ from the CPU's.

    A build of torch without CUDA cannot differentiate fake CUDA tensors, so they stay on the CPU. Differences that
    matter: fused attention also with dropout; dropout masks of one byte; and functions that autocast runs in float32
    on CUDA, but not on a CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _fused_attention(*args, **kwargs)
        if func is functional.dropout:
            return _one_byte_dropout(*args, **kwargs)
        if func in FLOAT32_UNDER_AUTOCAST and torch.is_autocast_enabled("cpu"):
            args = tuple(_in_float32(value) for value in args)
            kwargs = {name: _in_float32(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


FLOAT32_UNDER_AUTOCAST = {
    *(functional.layer_norm, functional.group_norm, functional.rms_norm),
    *(functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax),
    *(torch.Tensor.softmax, torch.Tensor.log_softmax),
    *(functional.cross_entropy, functional.nll_loss, functional.mse_loss),
    *(functional.binary_cross_entropy_with_logits, functional.smooth_l1_loss, functional.softplus),
    *(torch.pow, torch.Tensor.pow, torch.Tensor.__pow__, torch.rsqrt, torch.Tensor.rsqrt),
    *(torch.exp, torch.Tensor.exp, torch.log, torch.Tensor.log, torch.sum, torch.Tensor.sum),
    *(torch.cumsum, torch.Tensor.cumsum, torch.norm, torch.Tensor.norm, torch.prod, torch.Tensor.prod),
}
"""From the table "CUDA Ops that can autocast to float32" of torch.amp, those of layers and losses of transformers."""


def _in_float32(value: Any) -> Any:
    is_half = isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if is_half else value


def _one_byte_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:  # noqa: A002, ARG001
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention by the memory-efficient kernel: it keeps its inputs, its result and a float32 a row of scores.

    So does the flash kernel, which takes over where there is no mask.
    """
    with ExitStack() as stack:
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        bias = None if attn_mask is None else _bias(attn_mask, query, key)
        result: torch.Tensor = aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, dropout_p, is_causal, scale=scale
        )[0]
        return result


def _bias(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask as the kernel takes it: numbers to be added, rows of a length that is a multiple of eight."""
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -math.inf).to(query.dtype)
    columns = mask.shape[-1]
    if columns % 8:
        mask = functional.pad(mask, (0, -columns % 8))[..., :columns]
    return mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
