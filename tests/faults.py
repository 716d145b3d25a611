"""Runs out of memory where a test asks for it."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


@dataclass
class Faults:
    """Hooks that run out of memory in one layer, in the forward or backward pass of the micro-batches asked for.

    Passes are counted in training mode, from 0, by the calls of the model; those under `no_grad`, which try something
    on the side, do not count.
    """

    layer: torch.nn.Module
    stage: str
    passes: set[int]
    spares: Callable[[Any], bool] = lambda _: False
    current: int = -1
    raised: int = 0
    rows_seen: list[int] = field(default_factory=list)
    failed_outputs: list[Any] = field(default_factory=list)

    def install(self, model: torch.nn.Module) -> "Faults":
        model.register_forward_pre_hook(self._count, with_kwargs=True)
        self.layer.register_forward_hook(self._forward)
        return self

    def _count(self, model: Any, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled() and model.training:
            self.current += 1
            self.rows_seen.append(len(next(value for value in kwargs.values() if isinstance(value, torch.Tensor))))

    def _forward(self, module: Any, inputs: Any, output: Any) -> None:
        first = output if isinstance(output, torch.Tensor) else output[0]
        is_due = torch.is_grad_enabled() and module.training and self.current in self.passes
        if not is_due or self.spares(first):
            return
        self.failed_outputs.append(weakref.ref(first))
        if self.stage == "forward":
            self.fail()
        first.register_hook(lambda _: self.fail())

    def fail(self) -> None:
        self.raised += 1
        raise torch.OutOfMemoryError(MESSAGE)
