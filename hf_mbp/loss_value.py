"""What a loss function returns, looked at before it is back-propagated."""

from typing import Any

import torch


def scalar_of(loss: Any, *, function: str, remedy: str) -> torch.Tensor:
    """A loss without dimensions, from what a function that computes it has returned.

    Raises:
        TypeError: it is no single number with a gradient; the message names the function, and ends with the remedy.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss.reshape(())
    raise TypeError(
        f"{function} must return the mean loss, a tensor without dimensions that has a gradient, got {_named(loss)}. "
        + remedy
    )


def _named(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"one of shape {list(value.shape)}" + ("" if value.requires_grad else " without a gradient")
    return f"a {type(value).__name__}"
