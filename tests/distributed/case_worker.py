"""Run by several processes: trains the named cases and saves weights, losses and what stock reads, per rank."""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.plan import Layout
from tests.distributed.cases import CASES, Case, data_of, distributed_model_of, rows_of
from tests.distributed.ending import leave
from tests.helpers import Pad, arguments

LAYERS = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}
"""What FSDP wraps. Accelerate 1.15 by itself would wrap the token embeddings of BERT twice, and fail."""

ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}

DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": "auto",
}

NOTHING_STAYS_WHOLE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
"""ZeRO-3 would keep tiny models like these whole on all ranks."""

LEARNING_RATE = 0.1

STEPS_OF_STREAM = 7
"""Streams have no length: they are read again until there were that many steps, into the second epoch at least."""


@contextmanager
def deepspeed_on_cpus() -> Iterator[None]:
    """Accelerate looks for a GPU when it starts DeepSpeed, which itself runs on CPUs, too.

    There it would compile collectives of its own, in a minute or two; those of gloo do.
    """
    backend = ("gloo", DistributedType.MULTI_GPU)
    with (
        patch.object(PartialState, "_prepare_backend", lambda *_: backend),
        patch("deepspeed.comm.torch.build_shm_op", lambda: None),
    ):
        yield


def strategy_of(case: Case) -> dict[str, Any]:
    """What `TrainingArguments` are told about how the model is distributed."""
    if case.strategy == "ddp":
        return {}
    if case.is_zero:
        return {
            "deepspeed": {**DEEPSPEED, "zero_optimization": {"stage": ZERO_STAGES[case.strategy]}},
            "use_cpu": False,
        }
    config = {"version": 2, "transformer_layer_cls_to_wrap": [LAYERS[case.model]]}
    mesh = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)}
    return {"fsdp": True, "fsdp_config": config, **(mesh if case.strategy == "hsdp" else {})}


def arguments_of(case: Case, folder: Path, **changes: Any) -> TrainingArguments:
    """Plain SGD in the order of the rows."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # set by the case before
    with deepspeed_on_cpus() if case.is_zero else nullcontext():
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
    trainer = Trainer(
        distributed_model_of(case), args, train_dataset=data_of(case), data_collator=ReadRows(rows_of(case))
    )
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(STEPS_OF_STREAM if case.is_stream else 1):
        loader.set_epoch(epoch)
        epochs.append([batch["numbers"].tolist() for batch in loader])
    return epochs


def trainer_of(case: Case, folder: Path, **changes: Any) -> MBPTrainer:
    collates_in = "workers" if case.data == "collated in workers" else "main"
    return MBPTrainer(
        distributed_model_of(case),
        arguments_of(case, folder, **changes),
        train_dataset=data_of(case),
        data_collator=Pad(case.padding_side),
        mbp_config=MBPConfig(
            max_tokens_per_micro_batch=48,
            collate_in=collates_in,
            on_inexact="error",
            balance_ranks=case.balance,
            padding_free=case.padding_free,
        ),
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The whole weights, put together from all ranks."""
    with gathered(list(model.parameters())):
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
            for name, p in model.named_parameters()
        }


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """A context in which the parameters that ZeRO-3 has sharded are whole."""
    if not hasattr(parameters[0], "ds_numel"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def assert_distributed(case: Case, trainer: MBPTrainer) -> None:
    """Accelerate silently falls back to DistributedDataParallel on a CPU: then a test would prove nothing."""
    wrapped = trainer.model_wrapped
    if case.strategy == "ddp":
        assert type(wrapped).__name__ == "DistributedDataParallel"
        return
    if case.is_zero:
        assert type(wrapped).__name__ == "DeepSpeedEngine"
        assert wrapped.zero_optimization_stage() == ZERO_STAGES[case.strategy]
        whole = [p.ds_numel if hasattr(p, "ds_numel") else p.numel() for p in wrapped.parameters()]
        held = [p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in wrapped.parameters()]
        assert sum(held) == sum(whole) if case.strategy != "zero3" else sum(held) < 0.6 * sum(whole)
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
    assert (trainer.mbp_rows.layout is not Layout.PADDED) == bool(case.padding_free)
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
