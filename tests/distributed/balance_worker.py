"""Run by several processes, or one: trains with ranks balanced and not; saves weights and what was read, per rank."""

import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import BertForTokenClassification

from tests.distributed.ending import leave
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels

ROWS_A_STEP, STEPS = 32, 6


def rows() -> list[dict[str, Any]]:
    """96 rows, mostly short, three steps an epoch; some of their tokens have labels."""
    uneven = token_rows(84, low=3, high=10) + token_rows(12, low=30, high=60)
    return with_labels(uneven, lambda index, row: [-100 if t % 3 == 0 else t % 3 for t in row["input_ids"]])


def outcome(folder: Path, *, balance: bool, accumulation: int) -> dict[str, Any]:
    """Weights after some steps, and the lengths of the rows of each step of the first epoch."""
    trainer = mbp_trainer(
        build(BertForTokenClassification, bert_config(num_labels=3)),
        rows(),
        folder,
        per_device_train_batch_size=ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", 1)) // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=0.1,
        seed=3,
        on_inexact="error",
        balance_ranks=balance,
    )
    trainer.train()
    batches = [[len(row["input_ids"]) for row in batch.unpack()] for batch in trainer.get_train_dataloader()]
    starts = range(0, len(batches), accumulation)
    steps = [list(chain.from_iterable(batches[start : start + accumulation])) for start in starts]
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return {"weights": weights, "lengths": steps}


def check_beside_a_long_row(folder: Path) -> dict[str, Any]:
    """Rows of this rank in a step of which one is longer than all others together, and what the check says."""
    long_and_short = token_rows(1, low=300, high=300) + token_rows(15, low=3, high=10)
    model = build(BertForTokenClassification, bert_config(num_labels=3, max_position_embeddings=512))
    options = {"per_device_train_batch_size": 8, "max_steps": 1, "max_tokens_per_micro_batch": 1000}
    rows = with_labels(long_and_short, lambda index, row: [t % 3 for t in row["input_ids"]])
    trainer = mbp_trainer(model, rows, folder, **options)
    said, run = [], trainer.mbp_feed.check.run
    trainer.mbp_feed.check.run = lambda *args: said.append(run(*args)) or said[-1]
    trainer.train()
    (batch,) = trainer.get_train_dataloader()
    return {"rows": len(batch.unpack()), "check": said}


def main(folder: Path) -> None:
    outcomes: dict[Any, Any] = {
        (balance, accumulation): outcome(folder / "out", balance=balance, accumulation=accumulation)
        for balance in (False, True)
        for accumulation in (1, 2)
    }
    outcomes["long row"] = check_beside_a_long_row(folder / "out")
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
