"""Ranks plan with one cost, from what all of them have measured."""

from pathlib import Path

import torch

from tests.distributed.calibration_worker import CLOCKS, STEPS
from tests.distributed.launching import launch


def test_ranks_plan_with_one_cost_from_the_times_of_all(tmp_path: Path) -> None:
    one, other = launch("calibration_worker", tmp_path)
    assert one["cost"] == other["cost"]
    assert one["kept"] == other["kept"]
    assert one["kept"]["num_micro_batches"] == one["measured"] + other["measured"]
    assert CLOCKS[0].overhead <= one["cost"]["overhead"] <= CLOCKS[1].overhead
    assert one["error"] == other["error"] > 0.01  # the ranks contradict each other
    steps = range(STEPS)
    assert all(len(one["shapes"][step]) == len(other["shapes"][step]) for step in steps)
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
