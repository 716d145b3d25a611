"""Run by several processes: evaluations, stock and split, on ranks with very uneven rows; saves what each gives."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForMaskedLM, BertForTokenClassification, GPT2LMHeadModel, Trainer

from hf_mbp import MBPTrainer
from tests.distributed.ending import leave
from tests.helpers import bert_config, build, gpt2_config, masked_prefix, token_rows, with_labels
from tests.test_evaluation import Shapes, accuracy, next_token_accuracy, picked, token_classes, trainer_of
from tests.trl_runs import CASES, dataset
from tests.trl_runs import trainer_of as trl_trainer

BATCH = 8

PICKED = {"compute_metrics": next_token_accuracy, "preprocess_logits_for_metrics": picked}

HEADS: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "token classes": (
        BertForTokenClassification,
        bert_config(num_labels=5),
        token_classes,
        {"compute_metrics": accuracy, "include_for_metrics": ["inputs"]},
    ),
    "causal LM": (GPT2LMHeadModel, gpt2_config(), masked_prefix, PICKED),
    "per rank": (GPT2LMHeadModel, gpt2_config(), masked_prefix, {**PICKED, "average_tokens_across_devices": False}),
    "masked LM": (BertForMaskedLM, bert_config(), masked_prefix, {}),
}
"""GPT-2 divides by the count of items on all ranks, the other heads ignore it; stock multiplies by the ranks."""

TRL = ("sft-completion", "reward", "dpo-sigmoid")

LONG, SHORT = (9, 16, 14), (1, 2, 1)


def uneven_rows() -> list[dict[str, Any]]:
    """29 rows: the batches of rank 0 are long, those of rank 1 short, and the last ones are not full."""
    long, short = token_rows(16, low=20, high=30), token_rows(13, low=3, high=6, seed=1)
    return long[:8] + short[:8] + long[8:] + short[8:]


def of_heads(folder: Path) -> dict[str, Any]:
    found = {}
    for name, (model_class, config, label, options) in HEADS.items():
        rows, model = with_labels(uneven_rows(), label), build(model_class, config)
        for kind in (Trainer, MBPTrainer):
            trainer = trainer_of(kind, model, folder, per_device_eval_batch_size=BATCH, **options)
            shapes = Shapes(model)
            prediction = trainer.predict(rows)
            found[f"{name} {kind.__name__}"] = {
                "predictions": torch.as_tensor(prediction.predictions),
                "labels": torch.as_tensor(prediction.label_ids),
                "metrics": prediction.metrics,
                "shapes": shapes.shapes,
            }
    return found


def of_trl(folder: Path) -> dict[str, Any]:
    sizes = [LONG] * 8 + [SHORT] * 8 + [LONG] * 8 + [SHORT] * 8
    uneven = [(a + index % 2, b + index % 3, c + index % 2) for index, (a, b, c) in enumerate(sizes)]
    found = {}
    for name in TRL:
        for split in (False, True):
            rows = dataset(CASES[name].rows, uneven)
            trainer = trl_trainer(CASES[name], rows, folder, split=split, per_device_eval_batch_size=BATCH)
            trainer.evaluate(trainer.train_dataset)
            found[f"{name} {split}"] = trainer.state.log_history[-1]
    return found


def main(folder: Path) -> None:
    torch.save({"heads": of_heads(folder), "trl": of_trl(folder)}, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
