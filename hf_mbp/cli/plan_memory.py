"""The memory that the micro-batches of a recipe will take: predicted, and the limit that it has to stay below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from hf_mbp import device_memory, memory
from hf_mbp.arrays import Ints
from hf_mbp.byte_sizes import format_bytes, parse_memory_limit
from hf_mbp.cli.errors import UserError, user_errors
from hf_mbp.cli.plan_groups import Group
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.estimate import MemoryEstimate, estimate_memory
from hf_mbp.fit import SAFETY, fit_budget
from hf_mbp.plan import Budget
from hf_mbp.sizing import probe_shapes


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the peak of micro-batches: what is always there, and `fit` for activations; `limit_bytes` caps it."""

    resident_bytes: int
    fit: Budget
    limit_bytes: int | None

    def peak(self, group: Group) -> float:
        """Bytes, without the reserve that the budget holds back for what no prediction sees."""
        return self.resident_bytes + float(self.fit.bytes(group.rows, group.width)) / SAFETY


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Estimates the memory of micro-batches under the options of a recipe."""

    recipe: Recipe
    setup: TaskSetup
    device: torch.device

    def estimate(self, rows: int, widths: Sequence[int]) -> MemoryEstimate:
        """Of so many rows of the data set; a pair is as wide as both its sides together."""
        train = self.recipe.train
        with user_errors("the memory cannot be predicted", (ValueError, ImportError)):
            estimate = estimate_memory(
                self.setup.model_with_loss or self.setup.model,
                rows,
                widths[0],
                optimizer=str(getattr(train.optim, "value", train.optim)),
                bf16=bool(train.bf16),
                fp16=bool(train.fp16),
                gradient_checkpointing=bool(train.gradient_checkpointing),
                attn_implementation=self.recipe.model.attn_implementation,
                target_width=widths[1] if len(widths) > 1 else None,
                inputs=self.setup.inputs_of,
                device=self.device.type,
            )
        return replace(
            estimate,
            parameter_bytes=estimate.parameter_bytes + self._reference_bytes,
            fixed_bytes=estimate.fixed_bytes + self._process_bytes,
        )

    @cached_property
    def _process_bytes(self) -> int:
        return _process_bytes(self.device)

    @cached_property
    def _reference_bytes(self) -> int:
        return reference_bytes(self.recipe, self.setup)

    def memory_model(self, longest: Ints, limit: int | None) -> MemoryModel:
        """Fitted as a run fits it: to a few small micro-batches, of the longest row, its parts cut in proportion."""
        length = int(longest.sum())
        shapes, _ = probe_shapes(length, is_cut=length > 1)
        cut = [(rows, tuple(max(1, round(part * width / length)) for part in longest)) for rows, width in shapes]
        estimates = [self.estimate(rows, widths) for rows, widths in cut]
        resident = max(estimate.resident_bytes for estimate in estimates)
        if limit is not None and limit <= resident:
            raise UserError(
                f"memory_limit is {format_bytes(limit)}, but weights, gradients, optimizer states and libraries "
                f"alone take {format_bytes(resident)}; raise it, or write another dtype, optim or model"
            )
        measured = [
            (rows, sum(widths), estimate.activation_bytes)
            for (rows, widths), estimate in zip(cut, estimates, strict=True)
        ]
        room = math.inf if limit is None else limit - resident
        fit = fit_budget(measured, 0)
        return MemoryModel(
            resident_bytes=resident,
            fit=replace(fit, max_bytes=room),
            limit_bytes=limit,
        )


def reference_bytes(recipe: Recipe, setup: TaskSetup) -> int:
    """Of a second model that is kept during training."""
    if setup.reference is None or getattr(recipe.train, "precompute_ref_log_probs", False):
        return 0
    model = setup.reference()
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def limit_bytes(recipe: Recipe, device: torch.device) -> int | None:
    """Bytes that training may take in all; `None` if only a number of tokens is given."""
    limit = parse_memory_limit(recipe.mbp.memory_limit)
    if isinstance(limit, int):
        return limit
    if limit is None and recipe.mbp.max_tokens_per_micro_batch is not None:
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here whose memory could be asked for; write the size of the one to plan for, such as "
            "--memory_limit 24GiB"
        )
    if limit is not None:
        return int(limit * device_memory.total_memory(device))
    return _process_bytes(device) + int(memory.DEFAULT_FRACTION * device_memory.free_memory(device))


def _process_bytes(device: torch.device) -> int:
    """What Python and its libraries hold: of a CPU's memory, which a limit counts, too."""
    return device_memory.used_memory(device) if device.type == "cpu" else 0
