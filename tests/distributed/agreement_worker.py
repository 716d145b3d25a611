"""Run by several processes that have unlike memory and the same rows; saves their budgets and random masks."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling

from hf_mbp import MBPTrainer, device_memory
from tests.distributed.ending import leave
from tests.helpers import bert_config, build, mbp_trainer, token_rows, tokenizer

FREE = (2**30, 2**28)


class KeepsMasks(MBPTrainer):
    """Keeps the labels of what it trains on."""

    labels: list[torch.Tensor]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.labels = [micro_batch.inputs["labels"] for micro_batch in inputs.micro_batches if micro_batch.num_rows]
        return super().training_step(model, inputs, num_items_in_batch)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    device_memory.free_memory = lambda _: FREE[rank]
    trainer = mbp_trainer(
        build(BertForMaskedLM, bert_config()),
        token_rows(8) * 2,  # the same 8 rows on either rank
        folder,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4),
        max_tokens_per_micro_batch=None,
        trainer_class=KeepsMasks,
        balance_ranks=False,
    )
    trainer.train()
    budget = trainer.mbp_feed.budget.settle([], [])
    torch.save({"budget": asdict(budget), "labels": trainer.labels}, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
