"""Run by several processes: rows that count as nothing, by a count of the user's own; saves weights and final loss."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

from hf_mbp import MBPTrainer
from tests.distributed.ending import leave
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels

WEIGHTS = torch.tensor([0.0, 4.0], dtype=torch.float64)
LEARNING_RATE, ROWS_A_STEP = 0.1, 16


class Weighted(MBPTrainer):
    """Class-weighted, as in the README; rows of the first class alone have a loss of 0/0."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        return torch.nn.functional.cross_entropy(model(**inputs).logits, labels, weight=WEIGHTS)

    def num_items(self, micro_batch: Any) -> float:
        return float(WEIGHTS[micro_batch["labels"]].sum())


def rows() -> list[dict[str, Any]]:
    """32 rows, of which few count, and on the second rank in the second step only one."""
    counted = {0, 5, 9, 14, 17, 20, 21, 27}
    return with_labels(token_rows(32), lambda index, row: int(index in counted))


def model() -> Any:
    return build(BertForSequenceClassification, bert_config(num_labels=2))


def main(folder: Path) -> None:
    trainer = mbp_trainer(
        model(),
        rows(),
        folder,
        trainer_class=Weighted,
        per_device_train_batch_size=ROWS_A_STEP // 2,
        max_steps=2,
        learning_rate=LEARNING_RATE,
        train_sampling_strategy="sequential",
        logging_steps=500,
        max_tokens_per_micro_batch=32,
        balance_ranks=False,  # or the second rank would have other rows
    )
    metrics = trainer.train().metrics
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    torch.save({"weights": weights, "loss": metrics["train_loss"]}, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
