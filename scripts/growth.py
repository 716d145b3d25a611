"""Measures how time and memory grow with the rows of a step and with those of the data set.

    python scripts/growth.py                             # minutes; writes docs/growth.json, .png and two tables
    python scripts/growth.py --quick --output /tmp/growth

A tiny BERT trains on rows of lognormal lengths, which a data set makes when they are asked for; beside it the plain
Trainer does, on 8 rows at a time. Each run is a process of its own. Memory is what the process takes at most, on top of
what it held before model and data set were there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import timeit
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from benchmarks.rows import pad
from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.plan import Budget, Cost, plan_rows
from marked_table import put_table
from own_process import OwnProcesses
from peak_meter import FREED_IS_GIVEN_BACK, PeakMeter

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
MIB = 2**20
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#999999"

ROWS_A_STEP = (64, 256, 1024, 4096, 8192)
DATA_SET_ROWS = (10**3, 10**4, 10**5, 10**6, 10**7)
BATCH, MAX_TOKENS, VOCABULARY = 8, 2048, 500
TRAINERS = {"MBPTrainer": MBPTrainer, "Trainer": Trainer}


class SimulatedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of random tokens, of lognormal lengths, that are made when they are read.

    Args:
        num_rows: of the data set.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng(index)
        length = int(np.clip(random.lognormal(3.0, 0.8), 4, 128))
        return {"input_ids": random.integers(5, VOCABULARY, length).tolist(), "labels": index % 2}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of one trainer."""

    trainer: str
    rows_a_step: int
    data_set_rows: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a run took: seconds before its first step, microseconds for each row of the steps after it, and bytes."""

    setup_seconds: float
    microseconds_a_row: float
    peak_bytes: int


class StepTimes(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Of the first, also when it begins."""
        if not self.ends:
            self.ends.append(time.perf_counter())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """After the optimizer has stepped."""
        self.ends.append(time.perf_counter())


def perform(run: Run) -> Growth:
    """Trains as `run` says."""
    transformers.logging.set_verbosity_error()
    transformers.set_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder, PeakMeter("cpu") as meter:
        options = {"mbp_config": MBPConfig(max_tokens_per_micro_batch=MAX_TOKENS)} if run.trainer != "Trainer" else {}
        trainer = TRAINERS[run.trainer](
            model=BertForSequenceClassification(config),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=BATCH,
                gradient_accumulation_steps=run.rows_a_step // BATCH,
                max_steps=run.steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=True,
            ),
            train_dataset=SimulatedRows(run.data_set_rows),
            data_collator=pad,
            callbacks=[times],
            **options,
        )
        started = time.perf_counter()
        trainer.train()
    seconds = np.diff(times.ends)[1:]  # the first step also warms up
    return Growth(
        setup_seconds=times.ends[0] - started,
        microseconds_a_row=float(np.median(seconds)) / run.rows_a_step * 1e6,
        peak_bytes=meter.peak_bytes,
    )


def runs_of(*, quick: bool) -> dict[str, list[Run]]:
    """What is measured: along the rows of a step, and along those of the data set."""
    steps, sets = (ROWS_A_STEP[:2], DATA_SET_ROWS[:2]) if quick else (ROWS_A_STEP, DATA_SET_ROWS)
    return {
        "rows a step": [
            Run(trainer=trainer, rows_a_step=rows, data_set_rows=4 * rows, steps=4)
            for rows in steps
            for trainer in TRAINERS
        ],
        "rows of the data set": [
            Run(trainer=trainer, rows_a_step=64, data_set_rows=rows, steps=8) for rows in sets for trainer in TRAINERS
        ],
    }


def measured(runs: dict[str, list[Run]]) -> list[dict[str, Any]]:
    """Records of all runs."""
    processes, records = OwnProcesses(preload=[]), []
    for along, of_axis in runs.items():
        for run in of_axis:
            growth = processes.run(perform, run)
            records.append({"along": along, **asdict(run), **asdict(growth)})
            print(table_row(records[-1]), flush=True)
    return records


PLANNED_ROWS = (256, 1024, 8192, 65536)
PLAN_HEADER = "| rows a step | one length (ms) | two lengths (ms) |\n| ---: | ---: | ---: |"


def plan_row(num_rows: int, repetitions: int) -> str:
    """Milliseconds of one core to plan the micro-batches of a step, the least of several times."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4.2, 0.8, (num_rows, 2)), 8, 512).astype(np.int64)
    budget, times = Budget(max_tokens=16384), []
    for sizes in (lengths[:, :1], lengths):
        plan = partial(plan_rows, sizes, budget, Cost())
        took = min(timeit.repeat(plan, number=1, repeat=repetitions, timer=time.process_time))
        times.append(f"{took * 1000:,.1f}")
    return f"| {num_rows:,} | {' | '.join(times)} |"


HEADER = (
    "| trainer | rows a step | rows of the data set | microseconds a row | seconds before the first step | "
    "peak (MiB) |\n| --- | ---: | ---: | ---: | ---: | ---: |"
)


def table_row(record: dict[str, Any]) -> str:
    """A run."""
    return (
        f"| `{record['trainer']}` | {record['rows_a_step']:,} | {record['data_set_rows']:,} | "
        f"{record['microseconds_a_row']:,.0f} | {record['setup_seconds']:.2f} | {record['peak_bytes'] / MIB:,.0f} |"
    )


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Time for each row and memory, along both."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row")
    places = [("rows a step", "rows_a_step"), ("rows of the data set", "data_set_rows")]
    values = [("microseconds a row", "microseconds_a_row", 1), ("peak memory (MiB)", "peak_bytes", MIB)]
    for line, (label, name, unit) in zip(grid, values, strict=True):
        for axes, (along, key) in zip(line, places, strict=True):
            for trainer, colour in zip(TRAINERS, (BLUE, ORANGE), strict=True):
                own = [record for record in records if record["along"] == along and record["trainer"] == trainer]
                axes.plot(
                    [record[key] for record in own],
                    [record[name] / unit for record in own],
                    color=colour,
                    marker="o",
                    label=trainer,
                )
            axes.set(xscale="log", xlabel=along)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        line[0].set_ylabel(label)
        line[0].set_ylim(bottom=0)  # of both; after both are drawn, as it ends the search for the top
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Measures, draws, and puts the table into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest two of each; leaves the page as it is")
    parser.add_argument("--output", default=str(ROOT / "docs" / "growth"), help="without .json and .png")
    options = parser.parse_args()
    os.environ.update(FREED_IS_GIVEN_BACK)
    planned = [plan_row(rows, 1 if options.quick else 7) for rows in PLANNED_ROWS]
    print("\n".join([PLAN_HEADER, *planned, "", HEADER]), flush=True)
    records = measured(runs_of(quick=options.quick))
    Path(f"{options.output}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    draw(records, Path(f"{options.output}.png"))
    if not options.quick:
        put_table(PAGE, "planner", "\n".join([PLAN_HEADER, *planned]))
        put_table(PAGE, "growth", "\n".join([HEADER, *map(table_row, records)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
