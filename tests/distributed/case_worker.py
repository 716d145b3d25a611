"""Run by several processes: trains the named cases and saves weights, losses and what stock would have read, per rank."""

import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer
from tests.distributed.cases import CASES, Case, data_of, model_of, rows_of
from tests.distributed.ending import leave
from tests.helpers import Pad, arguments

LAYERS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}
"""What FSDP wraps. For BERT it has to be said: by itself Accelerate 1.15 wraps the token embeddings twice, and fails."""

LEARNING_RATE = 0.1

STEPS_OF_STREAM = 7
"""Streams have no length: they are read again until there were that many steps, into the second epoch at least."""


def strategy_of(case: Case) -> dict[str, Any]:
    """What `TrainingArguments` are told about how the model is distributed."""
    if case.strategy == "ddp":
        return {}
    config = {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS[case.model]]}
    mesh = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
    return {"fsdp": True, "fsdp_config": config, **(mesh if case.strategy == "hsdp" else {})}


def arguments_of(case: Case, folder: Path, **changes: Any) -> TrainingArguments:
    """Plain SGD in the order of the rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the case before
    made = arguments(
        folder,
        **{
            "per_device_train_batch_size": 4,
            "train_sampling_strategy": "sequential",
            "learning_rate": LEARNING_RATE,
            "accelerator_config": copy.deepcopy(case.accelerator),  # stock writes into it
            "max_steps": STEPS_OF_STREAM if case.is_stream else -1,
            "num_train_epochs": 1,
            **strategy_of(case),
            **case.arguments,
            **changes,
        },
    )
    if case.strategy in ("fsdp2", "hsdp"):  # Accelerate shards on GPUs only; torch does on CPUs, too
        made.device  # noqa: B018
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


class ReadRows:
    """A collator that tells which rows it was given."""

    def __init__(self, rows: list[Any]) -> None:
        self.index = {tuple(row["input_ids"]): number for number, row in enumerate(rows)}

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        return {"numbers": torch.tensor([self.index[tuple(row["input_ids"])] for row in rows])}


def read_by_stock(case: Case, folder: Path) -> list[list[list[int]]]:
    """The rows of each batch that stock gives this rank, for each epoch."""
    args = arguments_of(case, folder)
    trainer = Trainer(model_of(case), args, train_dataset=data_of(case), data_collator=ReadRows(rows_of(case)))
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(STEPS_OF_STREAM if case.is_stream else 1):
        loader.set_epoch(epoch)
        epochs.append([batch["numbers"].tolist() for batch in loader])
    return epochs


def trainer_of(case: Case, folder: Path, **changes: Any) -> MBPTrainer:
    collates_in = "workers" if case.data == "collated in workers" else "main"
    return MBPTrainer(
        model_of(case),
        arguments_of(case, folder, **changes),
        train_dataset=data_of(case),
        data_collator=Pad(case.padding_side),
        mbp_config=MBPConfig(max_tokens_per_micro_batch=48, collate_in=collates_in, on_inexact="error"),
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights, put together from all ranks."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in model.named_parameters()
    }


def assert_distributed(case: Case, trainer: MBPTrainer) -> None:
    """Accelerate silently falls back to DistributedDataParallel on a CPU: then a test would prove nothing."""
    wrapped = trainer.model_wrapped
    if case.strategy == "ddp":
        assert type(wrapped).__name__ == "DistributedDataParallel"
        return
    assert isinstance(wrapped, FSDPModule)
    parameters = list(wrapped.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    assert parameters[0].device_mesh.ndim == (2 if case.strategy == "hsdp" else 1)
    assert any(parameter.to_local().numel() < parameter.numel() for parameter in parameters)


def outcome_of(case: Case, folder: Path) -> dict[str, Any]:
    read = read_by_stock(case, folder)
    trainer = trainer_of(case, folder, **({"save_strategy": "steps", "save_steps": 2} if case.resumes else {}))
    trainer.train()
    if case.resumes:
        trainer = trainer_of(case, folder)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_distributed(case, trainer)
    return {
        "read": read,
        "weights": weights_of(trainer.model),
        "steps": trainer.state.global_step,
        "logs": copy.deepcopy(trainer.state.log_history),
    }


def main(folder: Path, names: list[str]) -> None:
    outcomes = {}
    for number, name in enumerate(names):
        print(f"case: {name}", file=sys.stderr, flush=True)
        outcomes[name] = outcome_of(CASES[name], folder / str(number))
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
