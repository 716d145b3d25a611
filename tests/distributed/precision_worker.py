"""Run by several processes: the gradient of a bfloat16 model, summed in bfloat16 and in float32; saves it, per rank."""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from hf_mbp import run_mini_batch
from tests.distributed.ending import leave
from tests.helpers import Pad, Recorder, build, llama_config, masked_prefix, mbp_trainer, token_rows, with_labels

ROWS = 64
"""On both ranks together; each runs by itself, so that there are many sums to round."""


def rows_of() -> list[dict[str, Any]]:
    return with_labels(token_rows(ROWS, low=16), masked_prefix)


def trained(accumulation: int, accumulate_in_fp32: bool, folder: Path) -> dict[str, torch.Tensor]:
    recorder = Recorder()
    trainer = mbp_trainer(
        build(LlamaForCausalLM, llama_config()).bfloat16(),
        rows_of(),
        folder,
        callbacks=[recorder],
        per_device_train_batch_size=ROWS // 2 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_tokens_per_micro_batch=31,
        train_sampling_strategy="sequential",
        check_at_start=False,
        accumulate_in_fp32=accumulate_in_fp32,
        balance_ranks=False,  # so that both ranks run equally many
    )
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    assert trainer.state.log_history[0]["mbp_micro_batches"] == ROWS // 2
    return recorder.gradients[0]


def looped(accumulate_in_fp32: bool) -> dict[str, torch.Tensor]:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(build(LlamaForCausalLM, llama_config()).bfloat16())
    run_mini_batch(
        rows_of()[accelerator.process_index :: 2],
        model=model,
        loss=lambda inputs: model(**inputs).loss,
        collate_fn=Pad(),
        accelerator=accelerator,
        max_tokens=31,
        accumulate_in_fp32=accumulate_in_fp32,
    )
    return {name: p.grad for name, p in accelerator.unwrap_model(model).named_parameters()}


def main(folder: Path) -> None:
    outcome = {}
    for in_fp32 in (False, True):
        outcome[f"loop {in_fp32}"] = looped(in_fp32)
        for accumulation in (1, 4):
            outcome[f"trainer {accumulation} {in_fp32}"] = trained(accumulation, in_fp32, folder)
    torch.save(outcome, folder / f"rank{Accelerator().process_index}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
