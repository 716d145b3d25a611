"""Run by several processes, of which the second comes close to its limit; saves the caps after each step."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForMaskedLM, TrainerCallback

from hf_mbp import control, device_memory
from tests.distributed.ending import leave
from tests.helpers import bert_config, build, masked_prefix, mbp_trainer, token_rows, with_labels
from tests.test_run_budget import Told

LIMIT = 3_000_000


class Looks(TrainerCallback):
    """Has the budget look at the device after each step."""

    trainer: Any

    def __init__(self) -> None:
        self.caps: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.mbp_feed.budget.after_step()
        self.caps.append(self.trainer.mbp_feed.budget._profile.cap)


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    control.FAILURE_HOLDS = 5  # so that the budget grows back within the run
    device_memory.used_memory = lambda _: 0
    device_memory.free_memory = lambda _: 10**9
    looks = Looks()
    trainer = mbp_trainer(
        build(BertForMaskedLM, bert_config()),
        with_labels(token_rows(256), masked_prefix),
        folder,
        per_device_train_batch_size=64,
        max_steps=24,
        max_tokens_per_micro_batch=None,
        memory_limit=LIMIT,
        callbacks=[looks],
    )
    looks.trainer = trainer
    trainer.mbp_feed.budget.gauge = Told(trainer, lambda step: 1.5 if rank == 1 and step < 3 else 0.5)
    trainer.train()
    weights = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    torch.save({"caps": looks.caps, "weights": weights}, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
