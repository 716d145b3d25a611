"""The pictures of docs/how_it_works.md show what the planner does."""

from pathlib import Path

import numpy as np

import drawings
from hf_mbp.plan import Budget, plan_rows

LENGTHS = np.array(drawings.WORKLOADS["lognormal"].lengths()[: drawings.ROWS])


def test_the_chosen_plan_lies_in_the_valley() -> None:
    cost = drawings.planned_cost()
    numbers, parts = drawings.times_by_number(LENGTHS, cost)
    times = np.array(parts).sum(axis=1)
    chosen = plan_rows(LENGTHS[:, None], Budget(), cost)
    assert times[numbers.index(len(chosen))] <= 1.001 * times.min()
    assert times[0] > 2 * times.min()
    assert [part[0] for part in parts] == [LENGTHS.sum()] * len(LENGTHS)
    assert parts[-1][1] == 0, "rows by themselves have no padding"


def test_both_are_drawn(tmp_path: Path) -> None:
    drawings.draw_step(LENGTHS, drawings.planned_cost(), tmp_path / "step.png")
    drawings.draw_planner(LENGTHS, drawings.planned_cost(), tmp_path / "planner.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("step.png", "planner.png"))
