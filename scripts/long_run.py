"""Trains 2,000 steps of rows with heavy-tailed lengths under a tight limit, and draws what memory did.

    python scripts/long_run.py                  # writes docs/long_run.png and docs/long_run.json
    python scripts/long_run.py --steps 200 --output /tmp/long_run

A tiny BERT, rows of lognormal lengths from 4 to 512 tokens. The limit is RLIMIT_AS: so many bytes more than the process
holds when model and data are there, and the allocator refuses the next one. No budget is named.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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

from hf_mbp import MBPTrainer

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#999999", "#D55E00"

ROWS, ROWS_A_STEP, LONGEST, VOCABULARY = 4096, 16, 512, 500

SETTINGS = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8"}
"""Environment of the run. The first has glibc give every freed tensor back to the system. The second has oneDNN forget
kernels: it compiles one for every new shape and keeps 1,024 of them, each with address space of its own."""

HEADROOM = 128 * MIB
"""A batch of 16 rows of 512 tokens does not fit it."""


def make_rows() -> list[dict[str, Any]]:
    """Rows of random tokens; the label is whether the first token is even."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(3.5, 1.0, ROWS), 4, LONGEST).astype(int)
    tokens = [random.integers(5, VOCABULARY, length).tolist() for length in lengths]
    return [{"input_ids": ids, "labels": ids[0] % 2} for ids in tokens]


def pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pads with zeros."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


class Watch(TrainerCallback):
    """Notes resident memory and the largest micro-batch of every step."""

    def __init__(self) -> None:
        self.base_bytes = 0
        self.trainer: Any = None
        self.steps: list[dict[str, float]] = []
        self.cells: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The highest since the last step, and starts to count anew."""
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
        Path("/proc/self/clear_refs").write_text("5")
        used = psutil.Process().memory_info().rss
        self.steps.append(
            {
                "peak_bytes": peak - self.base_bytes,
                "resident_bytes": used - self.base_bytes,
                "micro_batches": len(self.cells),
                "largest_cells": max(self.cells),
            }
        )
        self.cells = []


class WatchedTrainer(MBPTrainer):
    """Tells the watch of every micro-batch that runs."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As the stock one."""
        if self.state.is_local_process_zero:
            self.watch.cells.append(inputs["input_ids"].numel())
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(steps: int, folder: str) -> dict[str, Any]:
    """Trains under the limit and returns what was seen."""
    transformers.set_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        attn_implementation="eager",  # whose memory grows with the square of the width
    )
    watch = Watch()
    trainer = WatchedTrainer(
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
    watch.base_bytes = psutil.Process().memory_info().rss
    most = psutil.Process().memory_info().vms + HEADROOM
    Path("/proc/self/clear_refs").write_text("5")
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    started = time.perf_counter()
    trainer.train()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "headroom_bytes": HEADROOM,
        "losses": [{"step": log["step"], "loss": round(log["loss"], 4)} for log in logs],
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        **{name: [step[name] for step in watch.steps] for name in watch.steps[0]},
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory of every step under the limit, and below it the cells of the largest micro-batch."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = range(1, result["steps"] + 1)
    limit = result["headroom_bytes"] / MIB
    above.plot(steps, [b / MIB for b in result["peak_bytes"]], color=BLUE, linewidth=0.7, label="highest in the step")
    above.plot(steps, [b / MIB for b in result["resident_bytes"]], color=ORANGE, linewidth=1, label="after the step")
    above.axhline(limit, color=RED, linestyle="--", linewidth=1.2, label=f"limit: {limit:,.0f} MiB")
    above.set(
        title=f"{result['steps']:,} steps of {ROWS_A_STEP} rows of 4 to {LONGEST} tokens, and no failure",
        ylabel="MiB since the start",
        ylim=(0, 1.25 * limit),
    )
    above.legend(frameon=False, ncols=3, loc="upper right")
    below.plot(steps, result["largest_cells"], color=BLUE, linewidth=0, marker=".", markersize=2)
    below.set(xlabel="optimizer step", ylabel="cells of the\nlargest micro-batch")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.margins(x=0.01)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Trains, and writes the picture and the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", default=str(ROOT / "docs" / "long_run"), help="without .png and .json")
    options = parser.parse_args()
    if sys.platform != "linux":
        print("error: RLIMIT_AS is enforced on Linux only; run this on Linux", file=sys.stderr)
        return 2
    if not SETTINGS.keys() <= os.environ.keys():  # they are read when a process starts
        os.environ.update(SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606
    torch.set_num_threads(1)  # the tensors are so small that threads would wait for each other
    with tempfile.TemporaryDirectory() as folder:
        result = train(options.steps, folder)
    Path(f"{options.output}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    draw(result, Path(f"{options.output}.png"))
    peak = max(result["peak_bytes"]) / MIB
    print(
        f"{result['steps']:,} steps in {result['seconds']:.0f} s; at most {peak:.0f} of {HEADROOM / MIB:.0f} MiB taken"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
