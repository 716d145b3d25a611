"""The benchmark measures: every contestant trains the same tokens, and memory is what was really taken."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from hf_mbp.cli.errors import UserError

ROOT = Path(__file__).parents[1]

TRAINERS = {"mbp", "mbp_max_tokens", "mbp_memory_limit", "trainer", "group_by_length", "batch_rebalance"}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = (sys.executable, "scripts/benchmark.py", *options)
    return subprocess.run(  # noqa: S603
        command, env=environment, timeout=290, capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The report of a run of everything, once, and the folder that has its files."""
    folder = tmp_path_factory.mktemp("benchmark")
    completed = run(
        "--workload", "tiny", "--shapes", "2x4", "8x1", "--repetitions", "1", "--threads", "1", "--max_tokens", "64",
        "--contestants", *TRAINERS, "limit", "--output", str(folder / "new" / "tiny"),
    )  # fmt: skip
    assert completed.returncode == 0, completed.stdout + completed.stderr[-2000:]
    return json.loads((folder / "new" / "tiny.json").read_text()), folder / "new"


def by_contestant(report: dict[str, Any], shape: str, part: str = "measurements") -> dict[str, dict[str, Any]]:
    return {entry["contestant"]: entry for entry in report[part] if entry["shape"] == shape}


def test_all_contestants_train_the_same_tokens(done: tuple[dict[str, Any], Path]) -> None:
    from benchmarks.workloads import WORKLOADS

    report, _ = done
    lengths = WORKLOADS["tiny"].lengths()
    small = by_contestant(report, "2x4")
    assert small.keys() == TRAINERS | {"limit"}
    assert {name: small[name]["tokens"] for name in TRAINERS} == dict.fromkeys(TRAINERS, sum(lengths))
    assert all(record["steps"] == 3 and record["seconds"] > 0 for record in report["measurements"])
    assert small["limit"]["tokens"] == pytest.approx(sum(lengths), rel=0.05)


def test_padding_and_batches_are_those_that_ran(done: tuple[dict[str, Any], Path]) -> None:
    report, _ = done
    small, large = by_contestant(report, "2x4"), by_contestant(report, "8x1")
    assert small["limit"]["cells"] == small["limit"]["tokens"]
    assert {name: small[name]["micro_batches"] for name in ("trainer", "group_by_length")} == {
        "trainer": 12,
        "group_by_length": 12,
    }
    assert large["trainer"]["micro_batches"] == 3
    assert large["mbp_max_tokens"]["micro_batches"] > 3, "the budget was not used"
    assert small["batch_rebalance"]["cells"] < small["trainer"]["cells"] < large["trainer"]["cells"]
    assert not {"group_by_length", "batch_rebalance"} & large.keys()


def test_the_summary_is_of_the_measurements(done: tuple[dict[str, Any], Path]) -> None:
    report, _ = done
    for shape in ("2x4", "8x1"):
        records, entries = by_contestant(report, shape), by_contestant(report, shape, "summary")
        assert records.keys() == entries.keys()
        base = records["trainer"]
        for name, entry in entries.items():
            speed = records[name]["tokens"] / records[name]["seconds"]
            assert entry["tokens_per_second"]["median"] == pytest.approx(speed)
            ratio = speed / (base["tokens"] / base["seconds"])
            assert entry["speed_ratio"]["median"] == pytest.approx(ratio)


def test_page_and_picture_are_written(done: tuple[dict[str, Any], Path]) -> None:
    report, folder = done
    page = (folder / "tiny.md").read_text()
    assert report["command"] in page
    assert report["machine"] in page
    assert page.count("| MBPTrainer |") == 2
    assert "](tiny-tiny.png)" in page
    assert (folder / "tiny-tiny.png").stat().st_size > 10_000


def test_results_are_written_again(done: tuple[dict[str, Any], Path], tmp_path: Path, script: ModuleType) -> None:
    report, folder = done
    again = script.earlier_report(folder / "tiny.json")
    assert again == report
    script.write(again, tmp_path / "tiny")
    assert (tmp_path / "tiny.md").read_text() == (folder / "tiny.md").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_is_what_was_taken(done: tuple[dict[str, Any], Path]) -> None:
    report, _ = done
    for record in report["measurements"]:
        assert record["peak_bytes"] > 2**20, "not even gradients and optimizer states"
        assert record["base_bytes"] > 50 * 2**20, "not even torch"


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_the_meter_sees_a_peak_between_restarts() -> None:
    """As MBPTrainer, what is measured here has the system count anew."""
    import time

    import torch

    from peak_meter import POLL_SECONDS, PeakMeter

    with PeakMeter("cpu") as meter:
        taken = torch.ones(64 * 2**20, dtype=torch.uint8)
        time.sleep(5 * POLL_SECONDS)
        del taken
        Path("/proc/self/clear_refs").write_text("5")
    assert 60 * 2**20 < meter.peak_bytes < 96 * 2**20


def test_ratios_are_of_the_same_repetition() -> None:
    from benchmarks.results import summary

    def record(contestant: str, repetition: int, seconds: float, peak: int) -> dict[str, Any]:
        place = {"workload": "w", "shape": "8x8", "contestant": contestant, "repetition": repetition}
        counts = {"steps": 3, "tokens": 900, "cells": 1000, "micro_batches": 6, "setup_seconds": 0.0, "error": ""}
        counts |= {"size": "tiny", "flops": 0.0, "base_bytes": 0, "loss": float(repetition)}
        return {**place, **counts, "seconds": seconds, "peak_bytes": peak}

    rounds = [(1.0, 2.0), (10.0, 30.0), (4.0, 4.0)]
    records = [
        record(name, i, seconds, peak)
        for i, (ours, theirs) in enumerate(rounds)
        for name, seconds, peak in (("mbp", ours, 100), ("trainer", theirs, 400), ("limit", 0.5 * ours, 100))
    ]
    mbp, trainer, limit = summary(records)
    assert mbp["speed_ratio"] == pytest.approx({"median": 2.0, "min": 1.0, "max": 3.0})
    assert mbp["memory_ratio"] == {"median": 0.25, "min": 0.25, "max": 0.25}
    assert mbp["tokens_per_second"] == pytest.approx({"median": 225.0, "min": 90.0, "max": 900.0})
    assert mbp["padding_fraction"] == pytest.approx(0.1)
    assert mbp["loss"] == {"median": 1.0, "min": 0.0, "max": 2.0}
    assert trainer["speed_ratio"] == limit["share_of_limit"] == {"median": 1.0, "min": 1.0, "max": 1.0}
    assert mbp["share_of_limit"] == {"median": 0.5, "min": 0.5, "max": 0.5}
    assert trainer["share_of_limit"] == pytest.approx({"median": 0.25, "min": 1 / 6, "max": 0.5})


def test_a_failure_is_a_result() -> None:
    from benchmarks.page import columns_of, filled, table
    from benchmarks.results import summary

    records = [
        {
            "workload": "tiny",
            "size": "tiny",
            "shape": "8x1",
            "contestant": name,
            "repetition": 0,
            "steps": 3,
            "error": error,
        }
        | {"tokens": 9, "cells": 10, "micro_batches": 3, "seconds": 1.0, "setup_seconds": 0.0, "peak_bytes": 5}
        | {"flops": 0.0, "base_bytes": 0, "loss": 0.5}
        for name, error in (("mbp", ""), ("trainer", "RuntimeError: can't allocate memory"))
    ]
    ours, theirs = summary(records)
    assert ours["speed_ratio"] is None
    columns = filled(columns_of({"device_bytes": None, "peak_flops": None}), [ours, theirs])
    assert not {"x Trainer", "of the limit"} & {column.title for column in columns}  # which say nothing here
    text = table("8x1", [ours, theirs], columns)
    assert "| Trainer | **fails**: RuntimeError: can't allocate memory |" in text
    head, failure = [line for line in text.splitlines() if line.startswith(("| contestant", "| Trainer"))]
    assert head.count("|") == failure.count("|")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shapes", "8by1"], "--shapes: '8by1' is not per_device_train_batch_size x gradient_accumulation_steps"),
        (["--shapes", "5x1"], "--shapes 5x1: 5 rows a step do not divide the 24 rows of tiny; write for example 2x4"),
        (["--steps", "4"], "--steps 4: an epoch of tiny at 2x4 has 3 steps; write a multiple of it"),
        (["--repetitions", "0"], "--repetitions 0: write at least 1"),
        (["--threads", "0"], "--threads 0: write at least 1"),
        (["--memory_limit", "0.5"], "--memory_limit: memory_limit='0.5' is a fraction; write a size such as 1GiB"),
        (["--contestants", "trl_packing"], "--contestants trl_packing: none of them takes part here. TRL's are for"),
        (["--memory_limit", "much"], "--memory_limit: memory_limit='much' is neither a size nor a fraction"),
    ],
)
def test_mistakes_are_told(options: list[str], message: str, script: ModuleType) -> None:
    parsed = script.parser().parse_args(["--workload", "tiny", *options])
    with pytest.raises(UserError) as raised:
        script.orders_of(parsed)
    assert str(raised.value).startswith(message)


def test_contestants_take_turns(script: ModuleType) -> None:
    command = ["--workload", "tiny", "--contestants", "trainer", "mbp", "--repetitions", "2", "--shapes", "8x1"]
    orders = script.orders_of(script.parser().parse_args(command))
    assert [order.contestant for order in orders] == ["mbp", "trainer", "mbp", "trainer"]
    assert [order.repetition for order in orders] == [0, 0, 1, 1]


@pytest.fixture
def script() -> ModuleType:
    import benchmark

    return benchmark


def test_packages_that_are_not_installed_are_left_out(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mbp", None)
    assert "mbp_pytorch" not in script.contestants_of(None)
    with pytest.raises(UserError) as raised:
        script.contestants_of(["mbp_pytorch"])
    assert str(raised.value) == (
        "--contestants mbp_pytorch: its package is not installed; pip install --no-deps mbp-pytorch==0.2.6"
    )
    (tmp_path / "mbp.py").write_text("")
    monkeypatch.delitem(sys.modules, "mbp")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "mbp_pytorch" in script.contestants_of(None)
    assert script.contestants_of(["mbp_pytorch"]) == ["mbp_pytorch"]


def test_steps_without_a_trainer_have_every_row_once_an_epoch() -> None:
    task = a_task("tiny", steps=6)
    steps = list(task.random_steps())
    assert [len(rows) for rows in steps] == [8] * 6
    rows = sorted(task.rows(), key=str)
    assert sorted((row for step in steps[:3] for row in step), key=str) == rows
    assert sorted((row for step in steps[3:] for row in step), key=str) == rows
    assert steps[0] != steps[3]


def a_task(workload: str, **changes: Any) -> Any:
    from benchmarks.measure import Order

    fields = {"workload": workload, "size": "tiny", "shape": "2x4", "contestant": "mbp", "repetition": 0, "steps": 3}
    limits = {"device": "cpu", "dtype": "float32", "max_tokens": 64, "headroom_bytes": 0}
    return Order(**{**fields, **limits, **changes}).task("")


def test_an_earlier_report_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps({"measurements": [{"tokens": 9}]}))
    with pytest.raises(UserError, match=r"--results .*old\.json: an earlier version of this script measured less"):
        script.earlier_report(tmp_path / "old.json")
