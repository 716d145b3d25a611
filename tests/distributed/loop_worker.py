"""Run by several processes: one mini-batch in a loop without a Trainer; saves gradients and report, per rank."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM

from hf_mbp import run_mini_batch
from tests.distributed.ending import leave
from tests.distributed.worker import rows_of
from tests.helpers import Pad, build, llama_config


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(build(LlamaForCausalLM, llama_config()))
    rank = accelerator.process_index
    own = rows_of("sparse")[:13] if rank == 0 else rows_of("sparse")[13:16]  # 13 rows and 3: fillers are needed
    report = run_mini_batch(
        own,
        model=model,
        loss=lambda inputs: model(**inputs).loss,
        collate_fn=Pad(),
        accelerator=accelerator,
        max_tokens=40,
    )
    base = accelerator.unwrap_model(model)
    outcome = {"gradients": {name: p.grad for name, p in base.named_parameters()}, "report": asdict(report)}
    torch.save(outcome, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
