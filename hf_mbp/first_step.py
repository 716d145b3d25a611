"""Survives running out of memory in the first step of an optimizer, which makes its states.

An optimizer that stops halfway has stepped some parameters and not others. So their values are kept until it is done;
the activations, which are gone by then, have left room for that. If it is not enough, the step is not protected.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from hf_mbp import compat
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.optimizer_memory import step_bytes
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory, reason_of, unless_out_of_memory


def protect_first_step(optimizer: Any, *, has_room_for: Callable[[int], bool]) -> None:
    """Has the next step of an optimizer without states, prepared by Accelerate or not, start again if memory runs out.

    Args:
        optimizer: that has not stepped yet; nothing is done for one that has states.
        has_room_for: whether so many bytes more keep within the limit.

    Raises, at that step:
        MemoryError: the states do not fit.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in _stepped(group)]
    size = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if not optimizer.state and has_room_for(size + step_bytes(optimizer, parameters)):
        compat.replace_next_call(optimizer, "step", partial(_step, optimizer))


def _step(optimizer: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
    kept = _kept(optimizer)
    try:
        return step(*args, **kwargs)
    except Exception as error:
        if kept is None or not is_out_of_memory(error):
            raise
    _put_back(optimizer, kept)
    del kept
    give_back_memory()
    return _one_at_a_time(optimizer, step, *args, **kwargs)


def _kept(optimizer: Any) -> list[tuple[dict[str, Any], list[torch.Tensor]]] | None:
    """The options and values of each parameter group; `None` if there is no memory for it."""

    def copies() -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
        with torch.no_grad():
            return [(dict(group), [p.detach().clone() for p in _stepped(group)]) for group in optimizer.param_groups]

    return unless_out_of_memory(copies)


def _stepped(group: dict[str, Any]) -> list[torch.nn.Parameter]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _put_back(optimizer: Any, kept: list[tuple[dict[str, Any], list[torch.Tensor]]]) -> None:
    optimizer.state.clear()
    with torch.no_grad():
        for group, (options, values) in zip(optimizer.param_groups, kept, strict=True):
            group.update(options)
            for parameter, value in zip(_stepped(group), values, strict=True):
                parameter.copy_(value)


def _one_at_a_time(optimizer: Any, step: Any, *args: Any, **kwargs: Any) -> Any:
    """Optimizers of torch step one parameter after the other without `foreach`, with less memory for what lies between.

    Fused ones need none, and a gradient scaler relies on what they are.
    """
    plain = [group for group in optimizer.param_groups if "foreach" in group and not group.get("fused")]
    options = [group["foreach"] for group in plain]
    try:
        for group in plain:
            group["foreach"] = False
        return step(*args, **kwargs)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = reason_of(error)
    finally:
        for group, foreach in zip(plain, options, strict=True):
            group["foreach"] = foreach
    size = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in _stepped(group))
    raise MemoryError(
        f"There is no memory for the states of the optimizer ({reason}). The parameters that it trains take "
        f"{format_bytes(size)}, and AdamW keeps two numbers for each: choose one that keeps less "
        "(optim='adafactor', or 'sgd'), train fewer parameters (LoRA), or take a smaller model."
    )
