"""Run by several processes: trains on uneven rows and saves gradients and logs of the first step, per rank."""

import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hf_mbp import MBPTrainer
from tests.distributed.ending import leave
from tests.helpers import Recorder, build, llama_config, masked_prefix, mbp_trainer, token_rows, with_labels
from tests.test_losses import AsksTheNextClass


def rows_of(kind: str) -> list[dict[str, Any]]:
    """32 rows; of `sparse` ones the second rank's long rows have no label."""
    rows = with_labels(token_rows(32), masked_prefix)
    if kind == "sparse":
        for row in rows[8:16]:
            if len(row["input_ids"]) > 12:
                row["labels"] = [-100] * len(row["labels"])
    return rows


def main(folder: Path, accumulation: int, kind: str) -> None:
    model = build(LlamaForCausalLM, llama_config())
    rows = rows_of(kind)
    trainer = mbp_trainer(
        model,
        rows,
        folder,
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=-1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        on_inexact="error",
        balance_ranks=kind != "sparse",  # or the second rank would have other rows
        trainer_class=AsksTheNextClass if kind == "sparse" else MBPTrainer,
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    outcome = {"gradients": recorder.gradients, "logs": trainer.state.log_history}
    torch.save(outcome, folder / f"rank{trainer.args.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
