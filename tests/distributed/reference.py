"""Weights after training on several processes, compared with plain PyTorch on the rows of all of them, step by step."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.distributed.case_worker import LEARNING_RATE, STEPS_OF_STREAM
from tests.distributed.cases import FSDP2, ON_FOUR, ON_TWO, ZERO, Case, model_of, rows_of, steps_of
from tests.distributed.launching import launch
from tests.helpers import Pad, relative_error

DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `scripts/test.sh` puts it."""

ON_CPUS = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": str(DEEPSPEED)}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cases of one launch, because starting the processes takes longer than training."""

    cases: dict[str, Case]
    ranks: int = 2

    @property
    def environment(self) -> dict[str, str]:
        return ON_CPUS if any(case.is_zero for case in self.cases.values()) else {}

    def run(self, folder: Path) -> dict[str, list[dict[str, Any]]]:
        """What each rank saved, by case."""
        saved = launch("case_worker", folder, *self.cases, ranks=self.ranks, **self.environment)
        return {name: [rank[name] for rank in saved] for name in self.cases}


GROUPS = {
    "two ranks": Group(cases=ON_TWO),
    "four ranks": Group(cases=ON_FOUR, ranks=4),
    "FSDP2": Group(cases=FSDP2),
    "ZeRO-1 and ZeRO-2": Group(cases={name: case for name, case in ZERO.items() if case.strategy != "zero3"}),
    "ZeRO-3": Group(cases={name: case for name, case in ZERO.items() if case.strategy == "zero3"}),
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Steps that were made and should have been, and relative errors: the largest of the ranks' weights, of losses."""

    steps: list[int]
    expected_steps: int
    weights: float
    losses: float


def trained(case: Case, steps: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain PyTorch: the change of the weights by SGD on the rows of each step, and the losses."""
    model, rows, pad = model_of(case).train(), rows_of(case), Pad()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = []
    for numbers in steps:
        loss = model(**pad([rows[number] for number in numbers])).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}, losses


def compared(case: Case, ranks: list[dict[str, Any]]) -> Comparison:
    """Every rank against plain PyTorch on the rows that stock would have read."""
    steps = steps_of(case, [rank["read"] for rank in ranks])
    steps = steps[:STEPS_OF_STREAM] if case.is_stream else steps
    expected, losses = trained(case, steps)
    untrained = dict(model_of(case).named_parameters())
    changes = [{name: weight - untrained[name].detach() for name, weight in rank["weights"].items()} for rank in ranks]
    logged = [log["loss"] for log in ranks[0]["logs"] if "loss" in log]
    return Comparison(
        steps=[rank["steps"] for rank in ranks],
        expected_steps=len(steps),
        weights=max(relative_error(expected, change) for change in changes),
        losses=max(abs(a - b) / b for a, b in zip(logged, losses, strict=True)),
    )
