"""Two processes with micro-batches that count as nothing and have no finite loss."""

from pathlib import Path

import pytest
import torch

from tests.distributed.count_worker import LEARNING_RATE, ROWS_A_STEP, WEIGHTS, model, rows
from tests.distributed.launching import launch
from tests.helpers import Pad


def plain() -> tuple[dict[str, torch.Tensor], float]:
    """Weights and mean of the losses after SGD on the whole batches."""
    trained, losses = model().train(), []
    for start in (0, ROWS_A_STEP):
        batch = Pad()(rows()[start : start + ROWS_A_STEP])
        labels = batch.pop("labels")
        loss = torch.nn.functional.cross_entropy(trained(**batch).logits, labels, weight=WEIGHTS)
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter -= LEARNING_RATE * (0.0 if parameter.grad is None else parameter.grad)
                parameter.grad = None
    return {name: weight.detach() for name, weight in trained.named_parameters()}, sum(losses) / len(losses)


def test_they_are_left_out_and_the_last_loss_is_that_of_all(tmp_path: Path) -> None:
    weights, loss = plain()
    for rank in launch("count_worker", tmp_path):
        torch.testing.assert_close(rank["weights"], weights, rtol=1e-10, atol=1e-12)
        assert rank["loss"] == pytest.approx(loss, rel=1e-6)
