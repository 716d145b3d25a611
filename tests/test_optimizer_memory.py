"""What is predicted for optimizers is what they keep after a step."""

from typing import Any

import pytest
import torch
from transformers import Adafactor

from hf_mbp.optimizer_memory import state_bytes, step_bytes

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adam": torch.optim.Adam,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "adafactor": lambda p: Adafactor(p, relative_step=False, lr=0.1),
    "adafactor with momentum": lambda p: Adafactor(p, relative_step=False, lr=0.1, beta1=0.9),
    "adafactor of torch": torch.optim.Adafactor,
    "groups": lambda p: torch.optim.SGD([{"params": p[:1], "momentum": 0.9}, {"params": p[1:]}], lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_are_those_after_a_step(name: str) -> None:
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 32), (100,), (4, 8, 16))]
    optimizer = OPTIMIZERS[name](parameters)
    predicted = state_bytes(optimizer, parameters)
    sum(parameter.square().sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    kept = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.ndim
    )
    assert predicted == pytest.approx(kept, rel=0.05)
    if name != "sgd":
        assert state_bytes(optimizer, parameters) == 0


def test_an_unknown_optimizer_keeps_two_values() -> None:
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

    weight = torch.nn.Parameter(torch.ones(10))
    assert state_bytes(Own([weight]), [weight]) == state_bytes(None, [weight]) == 80


def test_only_steps_over_lists_take_memory_of_their_own() -> None:
    weight = torch.nn.Parameter(torch.ones(10))
    assert step_bytes(torch.optim.AdamW([weight], foreach=True), [weight]) == 40
    assert step_bytes(torch.optim.AdamW([weight], fused=True), [weight]) == 0
    assert step_bytes(torch.optim.AdamW([weight]), [weight]) == 0
    assert step_bytes(None, [weight]) == 0
