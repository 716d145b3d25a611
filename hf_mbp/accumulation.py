"""Sums the gradients of micro-batches in float32 where the weights are bfloat16 or float16.

A bfloat16 number has eight significant bits. The more micro-batches are summed already, the more of the next one's bits
fall off the end of the sum, and what is lost adds up. Here the gradient of each backward pass is moved into a float32
sum, which is rounded to the dtype of the parameter once, when the mini-batch is complete.

Under DDP each rank rounds its sum, and DDP averages the rounded sums in the dtype of the parameters. To reduce the
float32 sums themselves would take collectives of our own, and twice the traffic.

`Tensor.grad_dtype` (torch 2.10) lets autograd add into a float32 `.grad` of a bfloat16 parameter, without moving
anything. It is not used, because what reads `.grad` expects the dtype of the parameter (torch 2.13: DDP and AdamW raise
"expected BFloat16"), and because a step that fails halfway would leave the setting behind on the user's parameters.
"""

from collections.abc import Iterable

import torch

HALF_PRECISION = (torch.bfloat16, torch.float16)
"""Dtypes too coarse to add up many gradients in."""


def half_precision(parameters: Iterable[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Those of bfloat16 or float16, each once."""
    return [parameter for parameter in dict.fromkeys(parameters) if parameter.dtype in HALF_PRECISION]


class Float32Sums:
    """The sums of one optimizer step so far; empty between steps, so that they take memory only within one."""

    def __init__(self) -> None:
        self._sums: dict[torch.nn.Parameter, torch.Tensor] = {}

    def restart(self) -> None:
        """Forgets the sums of a step that was not completed."""
        self._sums.clear()

    def add(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Moves what lies in `.grad` of the parameters into the sums; to be called before the first backward pass, if
        something may lie there, and after each."""
        for parameter in parameters:
            if parameter.grad is None:
                continue
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.float()
            parameter.grad = None

    def give(self) -> None:
        """Puts the rounded sums into `.grad`, when the mini-batch is complete."""
        for parameter in list(self._sums):  # one at a time, so that not all are held in both dtypes
            parameter.grad = self._sums.pop(parameter).to(parameter.dtype)
