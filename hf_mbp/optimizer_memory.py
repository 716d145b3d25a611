"""What an optimizer will keep for each parameter, and what its step takes for a moment, before either exists."""

from typing import Any

import torch

UNKNOWN_STATES = 2
"""Values a parameter that an optimizer is taken to keep if it is not known here: what AdamW keeps."""

STATES = {"SGD": 0, "Lion": 1, "RMSprop": 1, "Adagrad": 1, "Rprop": 2}
"""Values of the size of a parameter that optimizers keep, by the name of their class, without what options add."""

OPTIONAL_STATES = {
    "SGD": ("momentum",),
    "RMSprop": ("momentum", "centered"),
    "Adam": ("amsgrad",),
    "AdamW": ("amsgrad",),
}
"""Options of optimizers, each of which adds one value a parameter."""


def state_bytes(optimizer: Any, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of the states that the optimizer will make for those of `parameters` that it has none for yet.

    Args:
        optimizer: possibly wrapped by Accelerate; `None` for one of two values a parameter.
        parameters: those that are trained.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(10))
        >>> state_bytes(torch.optim.AdamW([weight]), [weight]), state_bytes(torch.optim.SGD([weight]), [weight])
        (80, 0)
    """
    if optimizer is None:
        return UNKNOWN_STATES * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    name = type(getattr(optimizer, "optimizer", optimizer)).__name__
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    missing = [parameter for parameter in parameters if not optimizer.state.get(parameter)]
    return sum(_state_bytes(name, groups.get(id(parameter), optimizer.defaults), parameter) for parameter in missing)


def _state_bytes(name: str, group: dict[str, Any], parameter: torch.nn.Parameter) -> int:
    if name == "Adafactor":
        return _adafactor_bytes(group, parameter)
    values = STATES.get(name, UNKNOWN_STATES) + sum(bool(group.get(option)) for option in OPTIONAL_STATES.get(name, ()))
    return values * parameter.numel() * parameter.element_size()


def _adafactor_bytes(group: dict[str, Any], parameter: torch.nn.Parameter) -> int:
    """Sums over the rows and the columns of a matrix, in float32; all of a vector. With `beta1` also a momentum."""
    count, is_matrix = parameter.numel(), parameter.ndim >= 2 and parameter.numel() > 0
    sums = count // parameter.shape[-1] + count // parameter.shape[-2] if is_matrix else count
    return 4 * (sums + (count if group.get("beta1") is not None else 0))


def step_bytes(optimizer: Any, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes that `optimizer.step()` takes for a moment, when the activations are gone.

    PyTorch's implementations over lists of tensors ("foreach", what a GPU does unless told otherwise) make a tensor for
    each parameter at once; the fused ones and those of the CPU none that counts.
    """
    if optimizer is None or not type(getattr(optimizer, "optimizer", optimizer)).__module__.startswith("torch.optim"):
        return 0
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in parameters
        if id(parameter) in groups and _is_foreach(groups[id(parameter)], parameter)
    )


def _is_foreach(group: dict[str, Any], parameter: torch.nn.Parameter) -> bool:
    if group.get("fused") or group.get("foreach") is False:
        return False
    return bool(group.get("foreach")) or parameter.device.type == "cuda"
