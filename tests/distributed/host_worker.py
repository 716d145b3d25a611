"""Run on each of two hosts, which share a folder: trains a tiny classifier, with checkpoints."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, TrainerCallback

from tests.distributed.ending import leave
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels

STEPS, SAVED_EVERY, CUT_AT = 8, 2, 5
ROWS_A_STEP = 16
LEARNING_RATE = 0.01


def model() -> Any:
    return build(BertForSequenceClassification, bert_config())


def rows() -> list[dict[str, Any]]:
    """Of different lengths, and as many as the steps take."""
    return with_labels(token_rows(STEPS * ROWS_A_STEP), lambda index, row: index % 2)


class Waits(TrainerCallback):
    """Stops before a step, after a checkpoint, until the test has cut the link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == CUT_AT:
            (self.folder / f"waits{args.process_index}").touch()
            while not (self.folder / "cut").exists():
                time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rank_timeout", type=float, required=True)
    parser.add_argument("--waits", action="store_true")
    parser.add_argument("--resume", action="store_true")
    asked = parser.parse_args()
    trainer = mbp_trainer(
        model(),
        rows(),
        asked.folder,
        per_device_train_batch_size=ROWS_A_STEP // 2,
        max_steps=STEPS,
        optim="adamw_torch",
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=SAVED_EVERY,
        rank_timeout=asked.rank_timeout,
        callbacks=[Waits(asked.folder)] if asked.waits else [],
        on_inexact="error",
    )
    trainer.train(resume_from_checkpoint=asked.resume or None)
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    torch.save(
        {"weights": weights, "log": trainer.state.log_history}, asked.folder / f"rank{trainer.args.process_index}.pt"
    )
    leave()


if __name__ == "__main__":
    main()
