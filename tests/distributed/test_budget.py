"""Ranks have one budget, whichever of them comes close to its limit."""

from pathlib import Path

import torch

from tests.distributed.launching import launch


def test_one_rank_close_to_its_limit_shrinks_the_budget_of_all(tmp_path: Path) -> None:
    one, other = launch("budget_worker", tmp_path)
    assert one["caps"] == other["caps"]
    assert one["caps"][0] < 3_000_000 * 0.95
    assert min(one["caps"]) < one["caps"][-1]
    assert all(torch.equal(a, b) for a, b in zip(one["weights"], other["weights"], strict=True))
