"""Weights after training on several processes are those of plain PyTorch on the rows of all of them, step by step."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case_worker import LEARNING_RATE, STEPS_OF_STREAM
from tests.distributed.cases import FSDP2, ON_FOUR, ON_TWO, ZERO, Case, model_of, rows_of, steps_of
from tests.distributed.launching import launch
from tests.helpers import Pad, relative_error

DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where `scripts/test.sh` puts it."""

ON_CPUS = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "PYTHONPATH": str(DEEPSPEED)}


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


def assert_as_plain(case: Case, ranks: list[dict[str, Any]]) -> None:
    """Weights and losses of every rank against plain PyTorch on the rows that stock would have read."""
    steps = steps_of(case, [rank["read"] for rank in ranks])
    steps = steps[:STEPS_OF_STREAM] if case.is_stream else steps
    expected, losses = trained(case, steps)
    untrained = dict(model_of(case).named_parameters())
    is_in_float64 = case.model != "llama" and case.strategy not in ("zero2", "zero3")
    tolerance = 1e-12 if is_in_float64 else 1e-5
    for rank in ranks:
        assert rank["steps"] == len(steps) >= 1
        changes = {name: weight - untrained[name].detach() for name, weight in rank["weights"].items()}
        assert relative_error(expected, changes) < tolerance
    logged = [log["loss"] for log in ranks[0]["logs"] if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-5)


def assert_all_as_plain(
    cases: dict[str, Case], folder: Path, subtests: pytest.Subtests, *, ranks: int = 2, **environment: str
) -> None:
    """All cases in one launch, because starting the processes takes longer than training."""
    saved = launch("case_worker", folder, *cases, ranks=ranks, **environment)
    for name, case in cases.items():
        with subtests.test(name):
            assert_as_plain(case, [rank[name] for rank in saved])


def test_two_ranks(tmp_path: Path, subtests: pytest.Subtests) -> None:
    assert_all_as_plain(ON_TWO, tmp_path, subtests)


def test_four_ranks(tmp_path: Path, subtests: pytest.Subtests) -> None:
    assert_all_as_plain(ON_FOUR, tmp_path, subtests, ranks=4)


def test_fsdp2(tmp_path: Path, subtests: pytest.Subtests) -> None:
    assert_all_as_plain(FSDP2, tmp_path, subtests)


@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed is not installed; scripts/test.sh installs it")
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed(stage: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    cases = {name: case for name, case in ZERO.items() if case.strategy == stage}
    assert_all_as_plain(cases, tmp_path, subtests, **ON_CPUS)
