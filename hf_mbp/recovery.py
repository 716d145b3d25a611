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

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch

from hf_mbp import wrapped
from hf_mbp.distributed import Ranks
from hf_mbp.lockstep import Counts, LeavingOut
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory, reason_of
from hf_mbp.random_numbers import put_back_random_states, random_states
from hf_mbp.step import MicroBatch, as_shortest_filler

MOST_TIMES = 3
"""How often the same micro-batch may run out of memory in one mini-batch: others may have taken it for a moment."""

Backward: TypeAlias = Callable[[MicroBatch], torch.Tensor]
"""Forward and backward of one micro-batch; returns its weighted loss, detached."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A micro-batch `[rows, width]` that there was no memory for; one without rows was run to keep in step only.

    `times` says how often it has happened in this mini-batch. `reason`, and `row` where there was only one, are known
    to the rank that it happened on.
    """

    rank: int
    rows: int
    width: int
    is_checkpointed: bool
    times: int = 1
    reason: str = ""
    row: Any = field(default=None, repr=False)

    def can_be_checkpointed(self, *, can_checkpoint: bool) -> bool:
        """Whether it was a single row, which may fit with activation checkpointing, if the model can do that."""
        return self.rows == 1 and can_checkpoint and not self.is_checkpointed

    def is_hopeless(self, *, can_checkpoint: bool) -> bool:
        """Whether it was a single row that takes no less.

        Not at the first time: others may have taken memory for a moment, and what was cached has been given back.
        """
        return self.rows == 1 and not self.can_be_checkpointed(can_checkpoint=can_checkpoint) and self.times > 1

    def __str__(self) -> str:
        if not self.rows:
            return "a few tokens to keep in step with other processes"
        return f"a micro-batch of {self.rows:,} x {self.width:,} tokens"


class Guard:
    """Runs the micro-batches of one attempt; from the first that there is no memory for, it only keeps in step."""

    def __init__(self, backward: Backward, ranks: Ranks, modules: list[torch.nn.Module]) -> None:
        self.fault: Fault | None = None
        self._backward = backward
        self._ranks = ranks
        self._modules = modules
        self._made: Counts = {}
        self._syncs_buffers: list[bool] = []
        self._has_left = False

    def __call__(self, micro_batch: MicroBatch) -> torch.Tensor:
        """Forward and backward, if there is memory for it; its weighted loss, or else zero."""
        was_well = self.fault is None
        if was_well and (loss := self._tried(micro_batch)) is not None:
            return loss
        if self._ranks.count > 1 and not self._has_left:
            self._keep_in_step(micro_batch, is_cut_short=was_well)
        return torch.zeros((), device=self._ranks.device)

    def _tried(self, micro_batch: MicroBatch) -> torch.Tensor | None:
        self._made, self._syncs_buffers = wrapped.sequence_numbers(), wrapped.buffer_syncs(self._modules)
        try:
            return self._backward(micro_batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.fault = _fault(micro_batch, self._ranks.index, reason_of(error))
        give_back_memory()  # outside of the except block, whose traceback holds the tensors of the pass
        return None

    def _keep_in_step(self, micro_batch: MicroBatch, *, is_cut_short: bool) -> None:
        try:
            self._take_part(as_shortest_filler(micro_batch), is_cut_short=is_cut_short)
        except Exception as error:
            if not is_out_of_memory(error) or wrapped.holds_shards(self._modules):
                raise
            self._has_left = True  # where no parameters are gathered, the others wait at the end only, as a rule
        if self._has_left:
            give_back_memory()
            if wrapped.sequence_numbers() == self._made:  # the others wait for the buffers that DDP broadcasts first
                wrapped.broadcast_buffers(self._modules)

    def _take_part(self, filler: MicroBatch, *, is_cut_short: bool) -> None:
        if not is_cut_short:
            self._backward(filler)
            return
        wrapped.reset_iteration(self._modules)
        wrapped.set_buffer_syncs(self._modules, self._syncs_buffers)
        with LeavingOut(self._made):
            self._backward(filler)


def _fault(micro_batch: MicroBatch, rank: int, reason: str) -> Fault:
    return Fault(
        rank=rank,
        rows=micro_batch.num_rows,
        width=max(1, micro_batch.cells // max(1, micro_batch.num_rows)),
        is_checkpointed=micro_batch.is_checkpointed,
        reason=reason,
        row=micro_batch.rows[0] if len(micro_batch.rows) == 1 else None,
    )


class Recovery:
    """How one trainer, or loop, survives running out of memory.

    Args:
        ranks: those that train together.
        modules: whose buffers a mini-batch changes; asked for at each mini-batch.
        parameters: whose gradients it changes.
        buffers: what is known of their buffers.
    """

    def __init__(
        self,
        ranks: Ranks,
        modules: Callable[[], list[torch.nn.Module]],
        parameters: Callable[[], list[torch.nn.Parameter]],
        buffers: "ChangingBuffers | None" = None,
    ) -> None:
        self._ranks = ranks
        self._modules = modules
        self._parameters = parameters
        self._buffers = buffers or ChangingBuffers()

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

        Raises:
            MemoryError: the same micro-batch, which cannot be planned otherwise, has run out of memory several times.
        """
        modules = self._modules()
        before = Before(modules, self._parameters(), self._buffers)
        seen: Counter[tuple[int, int, int, bool]] = Counter()
        while True:
            guard = Guard(backward, self._ranks, modules)
            loss = attempt(micro_batches, guard)
            faults = self._of_all_ranks(guard.fault)
            if not faults:
                if not all(micro_batch.is_idle for micro_batch in micro_batches):
                    before.learn()
                return loss
            before.put_back()
            give_back_memory()
            micro_batches = plan_again([_counted(fault, seen) for fault in faults])

    def _of_all_ranks(self, fault: Fault | None) -> list[Fault]:
        if self._ranks.count == 1:
            return [fault] if fault else []
        own = (True, fault.rows, fault.width, fault.is_checkpointed) if fault else (False, 0, 0, False)
        faults = [
            Fault(rank=rank, rows=int(rows), width=int(width), is_checkpointed=bool(is_checkpointed))
            for rank, (is_fault, rows, width, is_checkpointed) in enumerate(self._ranks.gather(*own))
            if is_fault
        ]
        return [fault if fault and fault.rank == other.rank else other for other in faults]


def _counted(fault: Fault, seen: Counter[tuple[int, int, int, bool]]) -> Fault:
    key = (fault.rank, fault.rows, fault.width, fault.is_checkpointed)
    seen[key] += 1
    if seen[key] > MOST_TIMES:
        reason = f" ({fault.reason})" if fault.reason else ""
        raise MemoryError(
            f"Process {fault.rank} has run out of memory {seen[key]} times with {fault}{reason}, which cannot be split "
            "further. Shorten its rows, take a smaller model or dtype, or give it more memory."
        )
    return replace(fault, times=seen[key])


class Before:
    """What gradients, the buffers that change, and random states were before a mini-batch."""

    def __init__(
        self, modules: list[torch.nn.Module], parameters: list[torch.nn.Parameter], buffers: "ChangingBuffers"
    ) -> None:
        wrapped.reset_iteration(modules)  # or ranks that have reset it once would make other collectives than the rest
        self._modules = modules
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._gradients = {p: p.grad.clone() for p in self._parameters if p.grad is not None}  # none as a rule
        self._changing = buffers
        self._buffers = buffers.copies(modules)
        self._numbers = [(owner, _numbers_of(owner)) for owner in {kept.module: None for kept in self._buffers}]
        self._syncs_buffers = wrapped.buffer_syncs(modules)
        self._random_states = random_states(parameter.device for parameter in self._parameters)

    def learn(self) -> None:
        """Notes which of the buffers a mini-batch has changed, so that later ones copy only these."""
        self._changing.learn(self._buffers)

    def put_back(self) -> None:
        """Puts everything back."""
        wrapped.reset_iteration(self._modules)
        wrapped.set_buffer_syncs(self._modules, self._syncs_buffers)
        for parameter in self._parameters:
            parameter.grad = self._gradients[parameter].clone() if parameter in self._gradients else None
        for kept in self._buffers:
            kept.put_back()
        for owner, numbers in self._numbers:  # such as the length that a rotary embedding was last computed for
            vars(owner).update(numbers)
        put_back_random_states(self._random_states)


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


SMALL_BUFFER = 2**16
"""Elements up to which a buffer is copied for each mini-batch, whether it has changed before or not."""


class ChangingBuffers:
    """The buffers that the forward passes of a model may change, such as running means.

    Small ones, and of the large ones those that the first mini-batch has changed. Large ones of integers are taken for
    constants: quantized weights are kept as such. Keeps no module alive.
    """

    def __init__(self) -> None:
        self._names: WeakKeyDictionary[torch.nn.Module, set[str]] | None = None

    def copies(self, modules: list[torch.nn.Module]) -> list[_Kept]:
        """Copies of those that may change; of all, as long as that is not known."""
        every = dict.fromkeys(module for held in modules for module in held.modules())
        return [
            _Kept(module, name, buffer, buffer.clone())
            for module in every
            for name, buffer in module._buffers.items()
            if buffer is not None and self._may_change(module, name, buffer)
        ]

    def _may_change(self, module: torch.nn.Module, name: str, buffer: torch.Tensor) -> bool:
        if buffer.numel() <= SMALL_BUFFER:
            return True
        return buffer.is_floating_point() if self._names is None else name in self._names.get(module, ())

    def learn(self, kept: list[_Kept]) -> None:
        """Notes which of the large ones have changed."""
        if self._names is None:
            self._names = WeakKeyDictionary()
            for one in kept:
                if one.buffer.numel() > SMALL_BUFFER and one.has_changed:
                    self._names.setdefault(one.module, set()).add(one.name)


def _numbers_of(module: torch.nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, (int, float))}
