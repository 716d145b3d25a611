"""Run by several processes: sentence-transformers on two data sets, stock and with the mixin; saves gradients."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from sentence_transformers.sentence_transformer import losses

from hf_mbp import MBPConfig
from tests.distributed.ending import leave
from tests.helpers import Recorder
from tests.test_sentence_transformers import SENTENCE, sentence_rows


def trained(model: Any, folder: Path, *, mixed: bool) -> dict[str, Any]:
    """Gradients and losses of two runs of one trainer: at the second one its losses hold DDP's wrapper."""
    stock, with_mixin, arguments, _ = SENTENCE
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        learning_rate=0.01,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    rows = DatasetDict(one=sentence_rows(32), other=sentence_rows(16).rename_columns({"first": "a", "second": "b"}))
    options = {"mbp_config": MBPConfig(max_tokens_per_micro_batch=100)} if mixed else {}
    trainer = (with_mixin if mixed else stock)(
        model=model,
        args=args,
        train_dataset=rows,
        loss={"one": losses.CosineSimilarityLoss(model), "other": losses.ContrastiveLoss(model)},
        **options,
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    return {"gradients": recorder.gradients, "losses": [log["loss"] for log in recorder.logs]}


def main(folder: Path) -> None:
    rank = os.environ["RANK"]
    own = folder / f"files{rank}"
    own.mkdir()
    stock, mixed = SENTENCE[-1](own), SENTENCE[-1](own)  # before there are ranks, of which only the first saves models
    outcome = {"stock": trained(stock, own, mixed=False), "mixed": trained(mixed, own, mixed=True)}
    torch.save(outcome, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
