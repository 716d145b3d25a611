"""Trains 2,000 steps of rows with heavy-tailed lengths under a tight limit, and draws what memory did.

    python scripts/long_run.py                  # about 5 minutes; writes docs/long_run.png and docs/long_run.json
    python scripts/long_run.py --steps 200 --output /tmp/long_run

A tiny BERT, rows of lognormal lengths from 4 to 512 tokens. The limit is RLIMIT_AS: so many bytes more than the process
holds when model and data are there, and the allocator refuses the next one. No budget is named. The plain Trainer gets
the same batches under the same limit, in a process of its own, and is to fail.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
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
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from benchmarks.rows import pad
from hf_mbp import MBPTrainer
from peak_meter import status_bytes

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#999999", "#D55E00"

ROWS, ROWS_A_STEP, LONGEST, VOCABULARY = 4096, 8, 512, 500

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""Environment of the run. The first has glibc give every freed tensor back to the system. The second has oneDNN forget
kernels: it compiles one for every new shape and keeps 1,024 of them, each with address space of its own."""

HEADROOM = 80 * MIB
"""One row of 512 tokens fits it, two do not."""

PLAIN_STEPS = 300
"""Steps that the plain Trainer may try; a batch that is too large for it comes much sooner."""


def make_rows() -> list[dict[str, Any]]:
    """Rows of random tokens; the label is whether the first token is even."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.5, 1.0, ROWS), 4, LONGEST).astype(int)
    tokens = [random.integers(5, VOCABULARY, length).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids[0] % 2} for ids in tokens]


MEASURED = ("peak_bytes", "resident_bytes", "address_bytes", "micro_batches", "largest_cells")
"""Of every step."""


class Watch(TrainerCallback):
    """Notes resident memory and the largest micro-batch of every step."""

    def __init__(self) -> None:
        self.base_bytes = self.base_address_bytes = 0
        self.trainer: Any = None
        self.steps: list[dict[str, float]] = []
        self.cells: list[int] = []
        self.address_bytes = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The highest since the step began, from where the budget counts, and what is left of it."""
        peak = status_bytes("VmHWM")
        resident = psutil.Process().memory_info().rss
        self.steps.append(
            {
                "peak_bytes": peak - self.base_bytes,
                "resident_bytes": resident - self.base_bytes,
                "address_bytes": self.address_bytes - self.base_address_bytes,
                "micro_batches": len(self.cells),
                "largest_cells": max(self.cells),
            }
        )
        self.cells, self.address_bytes = [], 0


class Watched:
    """Tells the watch of every micro-batch that runs."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock one; what backward needs is there at its end."""
        self.watch.cells.append(inputs["input_ids"].numel())
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.watch.address_bytes = max(self.watch.address_bytes, psutil.Process().memory_info().vms)
        return loss


class WatchedTrainer(Watched, Trainer):
    """The plain one."""


class WatchedMBPTrainer(Watched, MBPTrainer):
    """Ours."""


def train(trainer_class: type[Trainer], steps: int, folder: str) -> dict[str, Any]:
    """Trains under the limit and returns what was seen, and the error that ended it, if any."""
    transformers.set_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation="eager",  # whose memory grows with the square of the width
    )
    watch = Watch()
    trainer = trainer_class(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS_A_STEP,
            max_steps=steps,
            learning_rate=1e-3,
            logging_steps=50,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            use_cpu=True,
        ),
        train_dataset=make_rows(),
        data_collator=pad,
        callbacks=[watch],
    )
    trainer.watch = watch
    trainer.model(**pad(trainer.train_dataset[:2])).loss.backward()  # code is read from disk at its first use
    trainer.model.zero_grad()
    held = psutil.Process().memory_info()
    watch.base_bytes, watch.base_address_bytes = held.rss, held.vms
    most = held.vms + HEADROOM
    Path("/proc/self/clear_refs").write_text("5")
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    started = time.perf_counter()
    error = ""
    try:
        trainer.train()
    except (RuntimeError, MemoryError) as raised:
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "steps": trainer.state.global_step,
        "error": error,
        "cells_at_the_error": watch.cells[-1] if error and watch.cells else 0,
        "retries": sum(int(log.get("mbp_oom_retries", 0)) for log in logs),
        "seconds": round(time.perf_counter() - started, 1),
        "headroom_bytes": HEADROOM,
        "losses": [{"step": log["step"], "loss": round(log["loss"], 4)} for log in logs],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        **{name: [step[name] for step in watch.steps] for name in MEASURED},
    }


def train_plainly(output: Path) -> dict[str, Any]:
    """What came of the plain Trainer, in a process of its own."""
    command = [sys.executable, __file__, "--plain", "--steps", str(PLAIN_STEPS), "--output", str(output)]
    subprocess.run(command, check=True)  # noqa: S603 - this script, no shell
    return dict(json.loads(output.with_suffix(".json").read_text(encoding="utf-8")))


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory of every step under the limit, and below it the cells of the largest micro-batch."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = range(1, result["steps"] + 1)
    limit = result["headroom_bytes"] / MIB
    lines = [
        ("address_bytes", GREY, "address space, after a forward pass"),
        ("peak_bytes", BLUE, "resident, highest in the step"),
        ("resident_bytes", ORANGE, "resident, after the step"),
    ]
    for name, colour, label in lines:
        above.plot(steps, [value / MIB for value in result[name]], color=colour, linewidth=0.8, label=label)
    above.axhline(limit, color=RED, linestyle="--", linewidth=1.2, label=f"limit of address space, {limit:,.0f} MiB")
    above.set(
        title=f"{result['steps']:,} steps of {ROWS_A_STEP} rows of 4 to {LONGEST} tokens; {told(result['plain'])}",
        ylabel="MiB since the start",
        ylim=(0, 1.3 * limit),
    )
    above.legend(frameon=False, ncols=4, fontsize=8, loc="upper right")
    below.plot(steps, result["largest_cells"], color=BLUE, linewidth=0, marker=".", markersize=2)
    below.set(xlabel="optimizer step", ylabel="cells of the\nlargest micro-batch")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=150)


def told(plain: dict[str, Any]) -> str:
    """What came of the plain Trainer, in words."""
    what = "runs out of memory" if plain["error"] else "is still well"
    return f"the plain Trainer {what} after {plain['steps']:,}"


def main() -> int:
    """Trains, and writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--plain", action="store_true", help="the plain Trainer only; writes .json only")
    parser.add_argument("--output", default=str(ROOT / "docs" / "long_run"), help="without .png and .json")
    options = parser.parse_args()
    if sys.platform != "linux":
        print("error: RLIMIT_AS is enforced on Linux only; run this on Linux", file=sys.stderr)
        return 2
    if not SETTINGS.keys() <= os.environ.keys():  # they are read when a process starts
        os.environ.update(SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - itself, again
    torch.set_num_threads(1)  # the tensors are so small that threads would wait for each other
    output = Path(options.output)
    with tempfile.TemporaryDirectory() as folder:
        trainer_class = WatchedTrainer if options.plain else WatchedMBPTrainer
        result = train(trainer_class, options.steps, folder)
        if not options.plain:
            result["plain"] = train_plainly(Path(folder) / "plain")
    output.with_suffix(".json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    if options.plain:
        return 0
    draw(result, output.with_suffix(".png"))
    peak = max(result["address_bytes"]) / MIB
    print(
        f"{result['steps']:,} steps in {result['seconds']:.0f} s; at most {peak:.0f} of {HEADROOM / MIB:.0f} MiB "
        f"taken in address space; memory ran out {result['retries']} times, and the step was run again"
    )
    print(f"{told(result['plain'])} steps: {result['plain']['error']}")
    return 0 if result["plain"]["error"] and not result["error"] else 1


if __name__ == "__main__":
    sys.exit(main())
