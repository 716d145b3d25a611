"""Trains 10,000 steps, with evaluation and saving in between, and looks at what grows.

    python scripts/soak.py                          # minutes; writes docs/soak.json, .png and a table
    python scripts/soak.py --steps 400 --output /tmp/soak

A tiny BERT on rows of lognormal lengths, 8 a step, in micro-batches of at most 256 tokens; 40 epochs, each with a
worker process of its own, 20 evaluations and 20 checkpoints, of which two are kept. Every 100 steps it is counted what
the process holds: memory, objects of Python, open files, threads and children. Nothing may grow over the second half.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from matplotlib.figure import Figure
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback, TrainingArguments

from benchmarks.rows import pad, rows_to_classify
from hf_mbp import MBPConfig, MBPTrainer
from machine import machine, versions
from marked_table import put_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"
MIB = 2**20
BLUE, GREY = "#0072B2", "#999999"

ROWS_A_STEP, EPOCH_STEPS, EVAL_ROWS, LONGEST, VOCABULARY, MAX_TOKENS = 8, 250, 32, 128, 500, 256

SETTINGS = {"MALLOC_ARENA_MAX": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""Environment of the run, so that what grows is not theirs: glibc opens a heap for each thread, and oneDNN keeps up to
1,024 compiled kernels, one for every shape of matrices that it sees."""

COUNTED = {
    "resident_bytes": "resident memory (MiB)",
    "objects": "objects of Python (thousands)",
    "files": "open files",
    "threads": "threads",
    "children": "child processes",
}
UNITS = {"resident_bytes": MIB, "objects": 1000}


class Census(TrainerCallback):
    """Counts what the process holds, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.counts: list[dict[str, int]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """What was imported is not looked through each time."""
        gc.collect()
        gc.freeze()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Without what is only waiting for the garbage collector."""
        if state.global_step % self.every == 0:
            gc.collect()
            self.counts.append(
                {
                    "step": state.global_step,
                    "resident_bytes": self.process.memory_info().rss,
                    "objects": sys.getallocatedblocks(),
                    "files": self.process.num_fds(),
                    "threads": self.process.num_threads(),
                    "children": len(self.process.children(recursive=True)),
                }
            )


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of lognormal lengths, of which every seed makes others."""
    lengths = np.random.default_rng(seed).lognormal(3.0, 0.8, count)
    return rows_to_classify(np.clip(lengths, 4, LONGEST).astype(int).tolist(), VOCABULARY)


def train(steps: int, folder: str) -> dict[str, Any]:
    """Trains, and returns what was counted."""
    transformers.set_seed(0)
    census = Census(max(1, steps // 100))
    trainer = MBPTrainer(
        model=BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
            )
        ),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS_A_STEP,
            max_steps=steps,
            logging_steps=steps // 20,
            eval_strategy="steps",
            eval_steps=steps // 20,
            save_strategy="steps",
            save_steps=steps // 20,
            save_total_limit=2,
            dataloader_num_workers=1,
            dataloader_pin_memory=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=make_rows(ROWS_A_STEP * min(EPOCH_STEPS, steps // 4), seed=0),
        eval_dataset=make_rows(EVAL_ROWS, seed=1),
        data_collator=pad,
        callbacks=[census],
        mbp_config=MBPConfig(max_tokens_per_micro_batch=MAX_TOKENS),
    )
    started = time.perf_counter()
    trainer.train()
    logs = trainer.state.log_history
    return {
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "seconds": round(time.perf_counter() - started, 1),
        "evaluations": sum("eval_loss" in log for log in logs),
        "micro_batches": float(np.mean([log["mbp_micro_batches"] for log in logs if "mbp_micro_batches" in log])),
        "log_entries": len(logs),
        "on": f"{machine()}; {versions()}",
        "counts": census.counts,
    }


def growth(counts: list[dict[str, int]], name: str) -> float:
    """Of a count, for each step of the second half: the slope of the line with the least squares."""
    steps, values = ([count[key] for count in second_half(counts)] for key in ("step", name))
    return float(np.polyfit(steps, values, 1)[0])


def second_half(counts: list[dict[str, int]]) -> list[dict[str, int]]:
    """Of what was counted."""
    return counts[len(counts) // 2 :]


MOST_GROWTH = {"resident_bytes": 256, "objects": 0.5}
"""For each step. What is kept of every step would be one object at least, and the least tensor takes half a KiB with
what torch and Python keep about it. The log, which is to grow, has 0.1 objects a step."""


def what_grows(counts: list[dict[str, int]]) -> list[str]:
    """Names of what grew; what is counted in small numbers must never be more than it was in the first half."""
    first, second = counts[: len(counts) // 2], second_half(counts)
    return [name for name, most in MOST_GROWTH.items() if growth(counts, name) > most] + [
        name
        for name in COUNTED.keys() - MOST_GROWTH.keys()
        if max(count[name] for count in second) > max(count[name] for count in first)
    ]


HEADER = "| | in the first half | in the second half | growth in a step |\n| --- | ---: | ---: | ---: |"


def table(counts: list[dict[str, int]]) -> str:
    """From the least to the most of each half, and the slope over the second one."""
    lines = [HEADER]
    for name, label in COUNTED.items():
        unit = UNITS.get(name, 1)
        halves = (counts[: len(counts) // 2], second_half(counts))
        ranges = [sorted(count[name] / unit for count in half) for half in halves]
        digits = 1 if name in UNITS else 0
        cells = [f"{values[0]:,.{digits}f} to {values[-1]:,.{digits}f}" for values in ranges]
        slope = {"resident_bytes": "{:.0f} bytes", "objects": "{:.2f}"}.get(name, "").format(growth(counts, name))
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {slope} |")
    return "\n".join(lines)


def told(result: dict[str, Any]) -> str:
    """The run in a sentence."""
    return (
        f"{result['steps']:,} steps in {result['seconds'] / 60:.1f} minutes, {result['epochs']:,.0f} epochs, "
        f"{result['evaluations']} evaluations and as many checkpoints, {result['micro_batches']:.1f} micro-batches a "
        f"step ({result['on']})."
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Each count along the steps; of memory and objects what there is more than in the first."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    counts = result["counts"]
    for axes, (name, label) in zip(figure.subplots(len(COUNTED), 1, sharex=True), COUNTED.items(), strict=True):
        unit, first = (UNITS[name], counts[0][name]) if name in UNITS else (1, 0)
        values = [(count[name] - first) / unit for count in counts]
        axes.plot([count["step"] for count in counts], values, color=BLUE, linewidth=1)
        axes.set_title(f"{label}, from {first / unit:,.0f} on" if first else label, loc="left", fontsize=9)
        axes.set_ylim(min(0, *values), 1.2 * max(values) + (max(values) == 0))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.margins(x=0.01)
    axes.set_xlabel("optimizer step")
    figure.savefig(path, dpi=120)


def main() -> int:
    """Trains, draws, and puts the table into the documentation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000, help="others than 10,000 leave the page as it is")
    parser.add_argument("--output", default=str(ROOT / "docs" / "soak"), help="without .png and .json")
    options = parser.parse_args()
    if sys.platform != "linux":
        print("error: open files are counted in /proc; run this on Linux", file=sys.stderr)
        return 2
    if not SETTINGS.keys() <= os.environ.keys():  # they are read when a process starts
        os.environ.update(SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - itself, again
    torch.set_num_threads(1)  # the tensors are so small that threads would wait for each other
    with tempfile.TemporaryDirectory() as folder:
        result = train(options.steps, folder)
    Path(f"{options.output}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, Path(f"{options.output}.png"))
    counted = table(result["counts"])
    print(f"{told(result)}\n\n{counted}")
    if options.steps == parser.get_default("steps"):
        put_table(PAGE, "soak", f"{told(result)}\n\n{counted}")
    if grows := what_grows(result["counts"]):
        print(f"grows: {', '.join(grows)}")
    return 1 if grows else 0


if __name__ == "__main__":
    sys.exit(main())
