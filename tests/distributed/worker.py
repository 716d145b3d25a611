"""Run by several processes: trains on uneven rows and saves gradients and logs of the first step, per rank."""

import sys
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.helpers import Recorder, build, llama_config, masked_prefix, mbp_trainer, token_rows, with_labels


def main(folder: Path, accumulation: int, num_rows: int) -> None:
    model = build(LlamaForCausalLM, llama_config())
    rows = with_labels(token_rows(num_rows), masked_prefix)
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
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    outcome = {"gradients": recorder.gradients, "logs": trainer.state.log_history}
    torch.save(outcome, folder / f"rank{trainer.args.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
