"""Weights after training on several processes are those of plain PyTorch on the rows of all of them, step by step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.case_worker import LEARNING_RATE, STEPS_OF_STREAM
from tests.distributed.cases import CASES, ON_FOUR, ON_TWO, SHARDED, Case, model_of, rows_of, steps_of
from tests.distributed.launching import launch
from tests.helpers import Pad, relative_error

Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=[(2, tuple(ON_TWO)), (2, tuple(SHARDED)), (4, tuple(ON_FOUR))])
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What each rank saved, by case, from one launch for many cases."""
    ranks, names = request.param
    saved = launch("case_worker", tmp_path_factory.mktemp("ranks"), *names, ranks=ranks)
    return {name: [rank[name] for rank in saved] for name in names}


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
    tolerance = 3e-6 if case.model == "llama" else 1e-12  # Llama computes its loss in float32
    for rank in ranks:
        assert rank["steps"] == len(steps) >= 1
        changes = {name: weight - untrained[name].detach() for name, weight in rank["weights"].items()}
        assert relative_error(expected, changes) < tolerance
    logged = [log["loss"] for log in ranks[0]["logs"] if "loss" in log]
    assert logged == pytest.approx(losses, rel=1e-5)


def test_weights_are_those_of_plain_pytorch(outcomes: Outcomes, subtests: pytest.Subtests) -> None:
    for name, ranks in outcomes.items():
        with subtests.test(name):
            assert_as_plain(CASES[name], ranks)
