"""Survives running out of memory in the middle of a mini-batch.

    1. The first micro-batch that there is no memory for ends the attempt. If there are other ranks, this one only keeps
       in step with their collectives from there on.
    2. After the last micro-batch the ranks tell each other who has run out of memory.
    3. If any has: what the attempt has changed is put back, memory is given back, and the mini-batch is planned again,
       in smaller micro-batches, and run from its first.

So a recovered mini-batch is, bit for bit, one that was planned like this in the first place. The longest micro-batches
run first: what is lost by starting again is little.

Put back are gradients, random states, and buffers that forward passes change. Other things that a model or a loss notes
for itself in attributes are not.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from hf_mbp import wrapped
from hf_mbp.collate import has_entry_for_each_row, num_rows_of, select_rows
from hf_mbp.distributed import Ranks
from hf_mbp.lockstep import Counts, LeavingOut
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory, reason_of
from hf_mbp.padding import can_be_cut, cut_columns
from hf_mbp.step import MicroBatch, as_filler

FILLER_WIDTH = 8
"""Tokens of the row with which a rank keeps in step: few, because it has no memory."""

Backward: TypeAlias = Callable[[MicroBatch], torch.Tensor]
"""Forward and backward of one micro-batch; returns its weighted loss, detached."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A micro-batch `[rows, width]` that there was no memory for.

    `reason`, and `row` where there was only one, are known to the rank that it happened on.
    """

    rank: int
    rows: int
    width: int
    is_checkpointed: bool
    reason: str = ""
    row: Any = field(default=None, repr=False)


class Guard:
    """Runs the micro-batches of one attempt; from the first that there is no memory for, it only keeps in step."""

    def __init__(self, backward: Backward, ranks: Ranks, modules: list[torch.nn.Module]) -> None:
        self.fault: Fault | None = None
        self._backward = backward
        self._ranks = ranks
        self._modules = modules
        self._made: Counts = {}

    def __call__(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Forward and backward, if there is memory for it; its weighted loss, or else zero."""
        was_well = self.fault is None
        if was_well and (loss := self._tried(micro_batch)) is not None:
            return loss
        if self._ranks.count > 1:
            self._keep_in_step(micro_batch, is_cut_short=was_well)
        return torch.zeros((), device=self._ranks.device)

    def _tried(self, micro_batch: MicroBatch) -> torch.Tensor | None:
        self._made = wrapped.sequence_numbers()
        try:
            return self._backward(micro_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.fault = _fault(micro_batch, self._ranks.index, reason_of(error))
        give_back_memory()  # outside of the except block, whose traceback holds the tensors of the pass
        return None

    def _keep_in_step(self, micro_batch: MicroBatch, *, is_cut_short: bool) -> None:
        filler = _smallest_filler(micro_batch)
        if not is_cut_short:
            self._backward(filler)
            return
        wrapped.reset_iteration(self._modules)
        with LeavingOut(self._made):
            self._backward(filler)


def _fault(micro_batch: MicroBatch, rank: int, reason: str) -> Fault:
    rows = micro_batch.num_rows or num_rows_of(micro_batch.inputs)
    return Fault(
        rank=rank,
        rows=rows,
        width=max(1, micro_batch.cells // rows),
        is_checkpointed=micro_batch.is_checkpointed,
        reason=reason,
        row=micro_batch.rows[0] if len(micro_batch.rows) == 1 else None,
    )


def _smallest_filler(micro_batch: MicroBatch) -> MicroBatch:
    """The beginning of a row, which adds nothing; as much more as cannot be taken away."""
    inputs = micro_batch.inputs
    if has_entry_for_each_row(inputs, num_rows_of(inputs)):
        inputs = select_rows(inputs, [num_rows_of(inputs) - 1])
    if can_be_cut(inputs):
        inputs = cut_columns(inputs, FILLER_WIDTH)
    return as_filler(replace(micro_batch, inputs=inputs))


class Recovery:
    """How one trainer, or loop, survives running out of memory.

    Args:
        ranks: those that train together.
        modules: whose gradients and buffers a mini-batch changes; asked for at each mini-batch.
    """

    def __init__(self, ranks: Ranks, modules: Callable[[], list[torch.nn.Module]]) -> None:
        self._ranks = ranks
        self._modules = modules
        self._buffers = ChangingBuffers()

    def restart(self) -> None:
        """For a new run of training, maybe of another model."""
        self._buffers = ChangingBuffers()

    def run(
        self,
        micro_batches: list[MicroBatch],
        attempt: Callable[[list[MicroBatch], Backward], torch.Tensor],
        backward: Backward,
        *,
        plan_again: Callable[[list[Fault]], list[MicroBatch]],
    ) -> torch.Tensor:
        """What `attempt` returns: the loss of the mini-batch.

        Args:
            micro_batches: of the mini-batch, as planned first.
            attempt: runs micro-batches by the function it is given, and leaves the sum of their gradients.
            backward: that function, while there is memory.
            plan_again: micro-batches of the same rows, after what each rank ran out of memory with. Called by all ranks
                alike, with gradients, buffers and random states as they were before the first attempt.
        """
        modules = self._modules()
        before = Before(modules, self._buffers)
        while True:
            guard = Guard(backward, self._ranks, modules)
            loss = attempt(micro_batches, guard)
            faults = self._of_all_ranks(guard.fault)
            if not faults:
                before.learn()
                return loss
            before.put_back()
            give_back_memory()
            micro_batches = plan_again(faults)

    def _of_all_ranks(self, fault: Fault | None) -> list[Fault]:
        if self._ranks.count == 1:
            return [fault] if fault else []
        own = (fault.rows, fault.width, fault.is_checkpointed) if fault else (0, 0, 0)
        faults = [
            Fault(rank=rank, rows=int(rows), width=int(width), is_checkpointed=bool(is_checkpointed))
            for rank, (rows, width, is_checkpointed) in enumerate(self._ranks.gather(*own))
            if rows
        ]
        return [fault if fault and fault.rank == other.rank else other for other in faults]


class Before:
    """What the gradients, the buffers that change, and the random states were before a mini-batch."""

    def __init__(self, modules: list[torch.nn.Module], buffers: "ChangingBuffers") -> None:
        wrapped.reset_iteration(modules)  # or ranks that have reset it once would make other collectives than the rest
        self._modules = modules
        self._parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if p.requires_grad))
        self._gradients = {p: p.grad.clone() for p in self._parameters if p.grad is not None}  # none as a rule
        self._changing = buffers
        self._buffers = buffers.copies(modules)
        self._random_states = _random_states()

    def learn(self) -> None:
        """Notes which of the buffers a mini-batch has changed, so that later ones copy only these."""
        self._changing.learn(self._buffers)

    def put_back(self) -> None:
        """Puts everything back."""
        wrapped.reset_iteration(self._modules)
        wrapped.sync_buffers_again(self._modules)
        for parameter in self._parameters:
            parameter.grad = self._gradients[parameter].clone() if parameter in self._gradients else None
        for kept in self._buffers:
            kept.put_back()
        _put_back_random_states(self._random_states)


@dataclass(frozen=True)
class _Kept:
    """A buffer of a module, and a copy of it as it was."""

    module: torch.nn.Module
    name: str
    buffer: torch.Tensor
    copy: torch.Tensor

    @property
    def has_changed(self) -> bool:
        """By its values: batch normalisation changes its running means behind the back of their version."""
        return self.module._buffers.get(self.name) is not self.buffer or not torch.equal(self.buffer, self.copy)

    def put_back(self) -> None:
        with torch.no_grad():
            self.buffer.copy_(self.copy)
        self.module._buffers[self.name] = self.buffer


class ChangingBuffers:
    """The buffers that the forward passes of a model change, such as running means: found in its first mini-batch.

    Integers, but for counters, are taken for constants: quantized weights are kept as such.
    """

    def __init__(self) -> None:
        self._names: set[tuple[torch.nn.Module, str]] | None = None

    def copies(self, modules: list[torch.nn.Module]) -> list[_Kept]:
        """Copies of those that are known to change; of all, as long as that is not known."""
        if self._names is not None:
            named = [(module, name, module._buffers[name]) for module, name in self._names]
        else:
            every = dict.fromkeys(module for held in modules for module in held.modules())
            named = [(module, name, buffer) for module in every for name, buffer in module._buffers.items()]
        return [
            _Kept(module, name, buffer, buffer.clone())
            for module, name, buffer in named
            if buffer is not None and (buffer.is_floating_point() or buffer.numel() == 1)
        ]

    def learn(self, kept: list[_Kept]) -> None:
        """Notes which have changed."""
        if self._names is None:
            self._names = {(one.module, one.name) for one in kept if one.has_changed}


def _random_states() -> tuple[Any, ...]:
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), device


def _put_back_random_states(states: tuple[Any, ...]) -> None:
    python, numpy, host, device = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
