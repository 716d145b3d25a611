"""Run by several processes: trains while one of them runs out of memory; saves gradients and logs, per rank."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM, TrainerCallback

from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.plan import Layout
from tests.distributed.ending import leave
from tests.faults import Faults
from tests.helpers import Pad, arguments, build, llama_config, masked_prefix, token_rows, with_labels

ROWS = with_labels(token_rows(24), masked_prefix)
ROWS_PER_RANK = 8

END_TO_END = "ddp, end to end"

COMPARED = {END_TO_END: 4}
"""Passes before the first step, in which it is compared whether rows may lie end to end."""

RANK = int(os.environ.get("RANK", 0))


def points(strategy: str) -> dict[str, tuple[int, str, str, int]]:
    """By name: the rank that runs out of memory, where, in which pass."""
    layers = ("model.layers.0", "model.layers.1", "lm_head")
    return {
        f"{stage} of {layer}, pass {position}, rank {(position + number) % 2}": (
            (position + number) % 2,
            stage,
            layer,
            position,
        )
        for stage in ("forward", "backward")
        for number, layer in enumerate(layers)
        for position in (number % 2, -1)
    }


class Gradients(TrainerCallback):
    """Whole gradients at each optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        self.steps.append(
            {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in gradients.items()}
        )


class SumOverRanks(torch.autograd.Function):
    """Collectives in the forward pass and in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


class Gathering(MBPTrainer):
    """A loss with collectives of its own: ranks that are not in step would hang."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self.is_in_train:
            return loss
        parts = [torch.zeros(1), torch.zeros(1)]
        torch.distributed.all_gather(parts, torch.ones(1))
        return loss + 0 * SumOverRanks.apply(loss)


def trainer_of(strategy: str, folder: Path) -> MBPTrainer:
    sharding = {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    args = arguments(
        folder,
        per_device_train_batch_size=ROWS_PER_RANK,
        train_sampling_strategy="sequential",
        max_steps=-1,
        num_train_epochs=1,
        **(sharding if strategy == "fsdp2" else {}),
    )
    if strategy == "fsdp2":  # Accelerate shards on GPUs only; torch does on CPUs, too
        args.device  # noqa: B018
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Gathering(
        build(LlamaForCausalLM, llama_config()),
        args,
        train_dataset=ROWS,
        data_collator=Pad(),
        mbp_config=MBPConfig(max_tokens_per_micro_batch=64, check_at_start=False, padding_free=strategy == END_TO_END),
    )


def outcome(strategy: str, folder: Path, point: tuple[int, str, str, int] | None, last: int) -> dict[str, Any]:
    trainer = trainer_of(strategy, folder)
    gradients = Gradients()
    trainer.add_callback(gradients)
    faults = None
    if point is not None:
        rank, stage, layer, position = point
        if rank == RANK:
            position = COMPARED.get(strategy, 0) + (position if position >= 0 else last)
            faults = Faults(trainer.model.get_submodule(layer), stage, {position})
            faults.install(trainer.model)
    trainer.train()
    assert isinstance(trainer.model_wrapped, FSDPModule) == (strategy == "fsdp2")
    assert (trainer.mbp_rows.layout is not Layout.PADDED) == (strategy == END_TO_END)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"gradients": gradients.steps, "logs": logs, "raised": faults.raised if faults else None}


def main(folder: Path, strategy: str) -> None:
    outcomes = {"none": outcome(strategy, folder, None, 0)}
    last = int(outcomes["none"]["logs"][0]["mbp_micro_batches"]) - 1
    for name, point in points(strategy).items():
        print(f"point: {name}", file=sys.stderr, flush=True)
        outcomes[name] = outcome(strategy, folder, point, last)
    torch.save(outcomes, folder / f"rank{RANK}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
