"""Prints how much of the time of a step is the library's own: neither forward, backward nor optimizer.

    python scripts/overhead.py [model]

For a model folder (a random BERT of 6 layers, 384 wide, without one), 64 rows a step with lengths from a lognormal
distribution (median 67, clipped to 8..512), on the device that `Trainer` picks. The first step, which also sizes the
budget and checks exactness, is left out. Of it all, also how many milliseconds the host takes to read, plan and pad the
rows, in which a GPU would have nothing to do; there they are prepared while the step before them still runs.
"""

import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainingArguments,
)

from benchmarks.rows import pad
from hf_mbp import MBPTrainer
from hf_mbp.cli.sources import resolve_model

ROWS, STEPS = 64, 9


class Timed(MBPTrainer):
    """Keeps how long the host takes for the rows of each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.seconds.append(time.perf_counter() - started)
        return batches


class Overheads(TrainerCallback):
    """Keeps what the library logs about its own time."""

    def __init__(self) -> None:
        self.fractions: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.fractions.append(logs["mbp_overhead_fraction"])


def make_model(path: str | None) -> Any:
    """The model of a folder, or a random one of the size of MiniLM."""
    if path is not None:
        return AutoModelForSequenceClassification.from_pretrained(resolve_model(path), num_labels=2)
    return BertForSequenceClassification(
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    )


def make_rows() -> list[dict[str, Any]]:
    """Rows of random tokens, of very different lengths."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.2, 0.8, ROWS * STEPS), 8, 512).astype(int)
    return [{"input_ids": generator.integers(1000, 2000, n).tolist(), "labels": int(n) % 2} for n in lengths]


def main(path: str | None) -> None:
    """Trains for a few steps, and prints the median share of a step."""
    overheads = Overheads()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Timed(
            model=make_model(path), args=args, train_dataset=make_rows(), data_collator=pad, callbacks=[overheads]
        )
        metrics = trainer.train().metrics
    later, milliseconds = overheads.fractions[1:], [1000 * seconds for seconds in trainer.seconds[1:]]
    print(
        f"Own time of the library: {statistics.median(later):.2%} of a step ({min(later):.2%} to {max(later):.2%} in "
        f"{len(later)} steps of {metrics['mbp_micro_batches']:.0f} micro-batches, on {args.device}).\n"
        f"Reading, planning and padding the rows of a step: {statistics.median(milliseconds):.1f} ms "
        f"({min(milliseconds):.1f} to {max(milliseconds):.1f})."
    )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
