"""Constants are fitted to times as they are: with noise, with slow ones among them, or too much alike to tell."""

import itertools
import json
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from hf_mbp import stopwatch
from hf_mbp.calibration import FEWEST, Calibration, Timed, _least_absolute, _least_squares, calibrated
from hf_mbp.json_fields import value_object
from hf_mbp.plan import Budget, Cost, as_sizes, plan_rows
from hf_mbp.stopwatch import Stopwatch

CPU = Cost(overhead=1000, attention=0.001)
GPU = Cost(overhead=200, attention=0.001, floor=1500)
SECONDS = 1e-4
"""Of a cell."""


def times(
    true: Cost, modelled: Cost, *, noise: float = 0.0, slow: float = 0.0, max_tokens: int = 4096, steps: int = 9
) -> list[Timed]:
    """Of the micro-batches of some steps; a share `slow` of them take 2 to 10 times longer."""
    random = np.random.default_rng(0)
    timed = []
    for step in range(steps):
        lengths = np.clip(random.lognormal(4.2, 0.8, 64), 8, 512).astype(int)
        factor = (1, 0.25, 4)[step % 3]
        cost = replace(modelled, overhead=factor * modelled.overhead, floor=factor * modelled.floor)
        for group in plan_rows(as_sizes(lengths.tolist()), Budget(max_tokens=max_tokens), cost):
            rows, width = len(group), int(lengths[group].max())
            seconds = SECONDS * float(true(np.array(rows), np.array(width))) * np.exp(noise * random.normal())
            seconds *= random.uniform(2, 10) if random.random() < slow else 1
            timed.append(Timed(rows=rows, width=width, seconds=seconds))
    return timed


TRUE = [
    Cost(overhead=100, attention=0.002),
    Cost(overhead=400, attention=0.0005),
    Cost(overhead=3000, attention=0.004),
    Cost(overhead=300, attention=0.0),
]


@pytest.mark.parametrize("true", TRUE)
@pytest.mark.parametrize("modelled", [CPU, GPU], ids=["no floor", "floor"])
def test_constants_come_back(true: Cost, modelled: Cost) -> None:
    found = calibrated(times(true, modelled), modelled)
    assert found.why_modelled == ""
    assert found.cost.overhead == pytest.approx(true.overhead, rel=1e-3)
    assert found.cost.attention == pytest.approx(true.attention, rel=1e-3, abs=1e-6)
    assert (found.cost.cell, found.cost.floor) == (1, 0)
    assert found.error < 1e-3 < found.modelled_error


@pytest.mark.parametrize("true", TRUE[:3])
def test_noise_and_slow_ones_among_them_change_little(true: Cost) -> None:
    found = calibrated(times(true, CPU, noise=0.05, slow=0.15), CPU)
    assert found.cost.overhead == pytest.approx(true.overhead, rel=0.3)
    assert found.cost(np.array(4), np.array(400)) == pytest.approx(true(np.array(4), np.array(400)), rel=0.15)
    assert found.error < 0.1


def test_a_floor_comes_back() -> None:
    true = Cost(overhead=200, attention=0.001, floor=1200)
    found = calibrated(times(true, replace(GPU, floor=300)), replace(GPU, floor=300))
    for rows, width in ((1, 50), (2, 400), (10, 400)):
        taken = true(np.array(rows), np.array(width))
        assert found.cost(np.array(rows), np.array(width)) == pytest.approx(taken, rel=0.1)
    assert found.cost.floor > 500


@pytest.mark.parametrize("seed", range(20))
def test_factors_are_the_best_that_are_not_negative(seed: int) -> None:
    """By the conditions of the optimum: no slope along what is used, none downwards along what is not."""
    random = np.random.default_rng(seed)
    columns, target = random.normal(size=(12, 4)), random.normal(size=12)
    factors = _least_squares(columns, target)
    slope = columns.T @ (columns @ factors - target)
    assert (factors >= 0).all()
    np.testing.assert_allclose(slope[factors > 0], 0, atol=1e-9)
    assert (slope[factors == 0] >= -1e-9).all()


@pytest.mark.parametrize("seed", range(10))
def test_errors_are_absolute_and_not_squared(seed: int) -> None:
    """The best line through absolute errors goes through two of the points: all pairs are tried."""
    random = np.random.default_rng(seed)
    seconds = (2 + np.arange(1, 12)) * random.choice([1, 1, 1, 4], 11)
    relative = np.stack([np.ones(11), np.arange(1, 12)], axis=1) / seconds[:, None]

    def error(factors: Any) -> float:
        return float(np.abs(relative @ factors - 1).sum())

    through_two = [np.linalg.solve(relative[list(pair)], np.ones(2)) for pair in itertools.combinations(range(11), 2)]
    best = min(error(factors) for factors in through_two if (factors >= 0).all())
    assert error(np.array(_least_absolute(relative))) <= best * 1.01


# Where measuring does not help


def test_widths_that_are_alike_leave_attention_as_modelled() -> None:
    true = Cost(overhead=100, attention=0.01)
    one_width = [Timed(rows=rows, width=100, seconds=float(true(rows, np.array(100)))) for rows in range(1, 21)]
    found = calibrated(one_width, CPU)
    assert found.cost.attention == CPU.attention
    ratio = found.cost.overhead / float(found.cost.of_row(np.array(100)))
    assert ratio == pytest.approx(100 / float(true.of_row(np.array(100))), rel=1e-6)


@pytest.mark.parametrize(
    "timed",
    [
        [Timed(rows=4, width=100, seconds=1.0 + index / 100) for index in range(20)],
        [Timed(rows=rows, width=100, seconds=1.0) for rows in range(1, 21)],  # nothing grows
        [Timed(rows=rows, width=100, seconds=float(rows)) for rows in range(1, 21)],  # nothing stays
    ],
    ids=["alike", "all the same time", "no time by itself"],
)
def test_what_does_not_tell_the_constants_apart_leaves_them_as_modelled(timed: list[Timed]) -> None:
    found = calibrated(timed, CPU)
    assert found.cost == CPU
    assert "the 20 micro-batches that were measured do not tell what one costs by itself" in found.described(CPU)


def test_a_few_are_not_enough() -> None:
    found = calibrated(times(TRUE[0], CPU)[: FEWEST - 1], CPU)
    assert (found.cost, found.error) == (CPU, None)
    assert found.why_modelled == "7 micro-batches were measured, 8 are the least"


def test_what_took_no_time_was_not_measured() -> None:
    assert calibrated([Timed(rows=1, width=index, seconds=0) for index in range(99)], CPU).num_micro_batches == 0


@pytest.mark.parametrize(
    ("true", "noise", "verdict"),
    [(CPU, 0.1, r"which is hardly better$"), (TRUE[0], 1.0, r"which is far off, as where other programs run beside$")],
)
def test_constants_that_predict_no_better_or_badly_are_not_taken(true: Cost, noise: float, verdict: str) -> None:
    found = calibrated(times(true, CPU, noise=noise), CPU)
    assert found.cost == CPU
    assert found.error == found.modelled_error
    assert re.search(verdict, found.why_modelled)


# What is said and kept


def test_it_explains_itself_in_one_line() -> None:
    found = Calibration(
        cost=Cost(overhead=51.4, attention=0.00238, floor=3),
        num_micro_batches=1146,
        error=0.1014,
        modelled_error=0.128,
    )
    assert found.described(CPU) == (
        "plans follow the cost of 1,146 micro-batches that were measured, predicted within 10.1% (median; by the "
        "modelled cost 12.8%). In units of a token's, a micro-batch costs 51 by itself (modelled 1,000), a pair of "
        "positions 0.0024 (0.001)."
    )
    assert found.described(replace(CPU, floor=9)).endswith("positions 0.0024 (0.001), and at least 3 (9).")


def test_it_goes_into_json_and_back() -> None:
    found = calibrated(times(TRUE[0], CPU, noise=0.05), CPU)
    assert value_object(Calibration, json.loads(json.dumps(asdict(found))), "calibration") == found


# The stopwatch


def test_a_cpu_is_timed_by_the_clock_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 20.5])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    with watch.timing(3, 7.5):
        pass
    with watch.timing(1, 9):
        pass
    assert watch.finished() == [Timed(rows=3, width=7.5, seconds=2.5), Timed(rows=1, width=9, seconds=0.5)]
    assert watch.finished() == []


def test_one_that_fails_does_not_count() -> None:
    watch = Stopwatch(torch.device("cpu"))
    with pytest.raises(torch.OutOfMemoryError), watch.timing(1, 9):
        raise torch.OutOfMemoryError
    assert watch.finished() == []


class Queue:
    """A device whose events are done up to a place in its queue; waiting for it is an error."""

    def __init__(self, done: int) -> None:
        self.done, self.recorded = done, 0

    def Event(self, *, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        return QueuedEvent(self)


class QueuedEvent:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def record(self) -> None:
        self.queue.recorded += 1
        self.place = self.queue.recorded

    def query(self) -> bool:
        return self.place <= self.queue.done

    def elapsed_time(self, other: "QueuedEvent") -> float:
        assert other.query()
        return 250.0 * (other.place - self.place)


def test_a_device_with_a_queue_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Queue(done=5)
    monkeypatch.setattr(torch, "get_device_module", lambda device: queue)
    watch = Stopwatch(torch.device("cuda"))
    for rows in (1, 2, 3):
        with watch.timing(rows, 8):
            pass
    assert queue.recorded == 6
    assert watch.finished() == [Timed(rows=rows, width=8, seconds=0.25) for rows in (1, 2)]
    queue.done = 6
    assert watch.finished() == []


def test_devices_without_a_clock_are_known() -> None:
    able = [Stopwatch(torch.device(kind)).can_time for kind in ("cpu", "cuda", "xpu", "mps")]
    assert able == [True, True, True, False]
