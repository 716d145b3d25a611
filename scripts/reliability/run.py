"""The run: masked language modelling with all that could differ in one that was interrupted.

Rows are shuffled and read by a worker process, the collator draws masks, the model has dropout, steps accumulate four
batches and run in several micro-batches, AdamW and the schedule have states, and old checkpoints are deleted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BertConfig, BertForMaskedLM, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer, last_checkpoint

STEPS, SAVE_STEPS = 12, 2
BATCH, ACCUMULATION = 4, 4
ROWS = BATCH * ACCUMULATION * STEPS // 2  # two epochs
MAX_TOKENS = 96
"""Of a micro-batch: the 16 rows of a step have some 220 tokens."""

PADDING, MASK, FIRST_WORD, VOCABULARY = 0, 1, 5, 60

Prepare = Callable[[Any], None]
"""What is done to a trainer before it trains."""


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of 4 to 24 random tokens."""
    random = np.random.default_rng(0)
    return [
        {"input_ids": random.integers(FIRST_WORD, VOCABULARY, random.integers(4, 25)).tolist()} for _ in range(ROWS)
    ]


class Masks:
    """Pads rows, and masks tokens by torch's random numbers: the first of every row, and one in three of the others."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """The inputs of the model, `[rows, width]` each."""
        lengths = [len(row["input_ids"]) for row in rows]
        tokens = torch.full((len(rows), max(lengths)), PADDING)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row["input_ids"])] = torch.tensor(row["input_ids"], dtype=torch.long)
        is_masked = (torch.rand(tokens.shape) < 1 / 3) & (tokens != PADDING)
        is_masked[:, 0] = tokens[:, 0] != PADDING
        return {
            "input_ids": tokens.where(~is_masked, MASK),
            "attention_mask": (tokens != PADDING).long(),
            "labels": tokens.where(is_masked, -100),
        }


def make_model(seed: int = 0) -> Any:
    """Two layers, with BERT's dropout."""
    transformers.set_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
    )


def make_trainer(folder: Path, trainer_class: Any = MBPTrainer, **changes: Any) -> Any:
    """A trainer of the class; `changes` are of its arguments."""
    ours = issubclass(trainer_class, MBPTrainer)
    return trainer_class(
        model=make_model(),
        args=TrainingArguments(
            **{
                "output_dir": str(folder),
                "per_device_train_batch_size": BATCH // int(os.environ.get("WORLD_SIZE", "1")),
                "gradient_accumulation_steps": ACCUMULATION,
                "num_train_epochs": 2,
                "learning_rate": 1e-2,
                "logging_steps": 1,
                "save_strategy": "steps",
                "save_steps": SAVE_STEPS,
                "save_total_limit": 2,
                "dataloader_num_workers": 1,
                "dataloader_pin_memory": False,
                "remove_unused_columns": False,
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                **changes,
            }
        ),
        train_dataset=make_rows(),
        data_collator=Masks(),
        **({"mbp_config": MBPConfig(max_tokens_per_micro_batch=MAX_TOKENS)} if ours else {}),
    )


def train(folder: Path, prepare: Prepare | None = None, trainer_class: Any = MBPTrainer, **changes: Any) -> None:
    """Trains to the end, from the last whole checkpoint in the folder if there is one, and leaves the outcome there."""
    trainer = make_trainer(folder, trainer_class, **changes)
    if prepare:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    keep_outcome(trainer, folder)


def keep_outcome(trainer: Any, folder: Path) -> None:
    """Saves what two runs that did the same have alike: weights, states of the optimizer, and losses."""
    outcome = {
        "weights": trainer.model.state_dict(),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "losses": [log["loss"] for log in trainer.state.log_history if "loss" in log],
        "step": trainer.state.global_step,
    }
    torch.save(outcome, folder / f"outcome{trainer.args.process_index}.pt")


def same_bits(folder: Path, other: Path) -> bool:
    """Whether two runs came out alike, bit for bit, on each of their ranks."""
    names = sorted(file.name for file in other.glob("outcome*.pt"))
    if not names or names != sorted(file.name for file in folder.glob("outcome*.pt")):
        return False
    return all(_equal(torch.load(folder / name), torch.load(other / name)) for name in names)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)
