"""Runs a model that trains in half precision in float32 for a while: bf16 rounds at 0.4 %, which hides mistakes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch

from hf_mbp import compat, device_memory, memory, wrapped
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.collate import Inputs
from hf_mbp.stand_ins import HALF, StandIns
from hf_mbp.undisturbed import undisturbed

Result = TypeVar("Result")

BYTES = 4
"""Of a float32."""

COPIES = 3
"""Of a trainable weight while two gradients are compared: itself, and both."""


def computes_in_half(accelerator: Any, modules: list[torch.nn.Module]) -> bool:
    """Whether anything of these models is computed in half precision, or in less."""
    has_half_weights = any(parameter.dtype in HALF for module in modules for parameter in module.parameters())
    is_half_only = wrapped.needs_half_precision(modules) is not None
    return accelerator.mixed_precision != "no" or has_half_weights or is_half_only


def obstacle(accelerator: Any, modules: list[torch.nn.Module]) -> str | None:
    """Why models that compute in half precision cannot do so in float32; `None` if they can."""
    if accelerator.mixed_precision == "fp8":
        return "layers are replaced by those of fp8"
    if wrapped.holds_shards(modules):
        return "the model is sharded"
    return wrapped.needs_half_precision(modules) or _lack_of_memory(modules)


def _lack_of_memory(modules: list[torch.nn.Module]) -> str | None:
    needed: dict[torch.device, int] = {}
    for parameter in {parameter for module in modules for parameter in module.parameters()}:
        size = BYTES * parameter.numel() * (COPIES if parameter.requires_grad else 1)
        needed[parameter.device] = needed.get(parameter.device, 0) + size
    for device, size in needed.items():
        free = device_memory.free_memory(device)
        if device.type != "meta" and size > memory.DEFAULT_FRACTION * free:
            return f"a copy in float32 takes {format_bytes(size)}, and {format_bytes(free)} are free"
    return None


def on_the_side(
    accelerator: Any, modules: list[torch.nn.Module], run: Callable[[StandIns, str | None], Result]
) -> Result:
    """Runs something on copies of the models, in float32 in the place of half precision where that can be.

    `run` gets the copies, and why they compute in half precision; `None` if they do not. If it cannot be done in
    float32, which shows only by an error where a model names the dtype it computes in, it is run again as it is.
    """
    why = obstacle(accelerator, modules) if computes_in_half(accelerator, modules) else None
    if why is None:
        try:
            with undisturbed_in_float32(accelerator, modules) as stand_ins:
                return run(stand_ins, None)
        except RuntimeError as error:
            if not computes_in_half(accelerator, modules):
                raise
            why = f"in float32 it fails: {str(error).splitlines()[0]}"
    with undisturbed(modules) as stand_ins:  # outside of `except`, whose traceback would hold on to the copies
        return run(stand_ins, why)


@contextmanager
def undisturbed_in_float32(accelerator: Any, modules: list[torch.nn.Module]) -> Iterator[StandIns]:
    """`undisturbed`, with what is in half precision in float32."""
    with ExitStack() as stack:
        stack.enter_context(compat.without_autocast(accelerator, modules))
        stack.enter_context(compat.unrounded_float32())
        yield stack.enter_context(undisturbed(modules, half_as=torch.float32))


def in_float32(inputs: Inputs) -> Inputs:
    """Inputs whose images and sounds in half precision are in float32, as the weights are."""
    return {
        key: value.float() if isinstance(value, torch.Tensor) and value.dtype in HALF else value
        for key, value in inputs.items()
    }
