"""Micro-batch processing without a Trainer: one mini-batch, for a training loop of your own."""

import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_mbp import collate, compat, device_memory, refusals, wrapped
from hf_mbp.accumulation import Float32Sums, half_precision
from hf_mbp.arrays import Ints
from hf_mbp.collate import Collator, Inputs
from hf_mbp.distributed import Ranks
from hf_mbp.items import checked_count, items_of
from hf_mbp.loss_value import scalar_of
from hf_mbp.plan import Budget, as_sizes, check_max_tokens, too_long_message
from hf_mbp.prefetch import Prefetch
from hf_mbp.probe import KnownTraits, LossTraits
from hf_mbp.recovery import Backward, ChangingBuffers, Fault, Recovery
from hf_mbp.sizing import cost_of
from hf_mbp.step import MicroBatch, RowFunctions, run_micro_batches, split_mini_batch, weigh

_TRAITS: "WeakKeyDictionary[torch.nn.Module, KnownTraits]" = WeakKeyDictionary()
"""What was found out about the losses of models, for as long as they live."""

_BUFFERS: "WeakKeyDictionary[torch.nn.Module, ChangingBuffers]" = WeakKeyDictionary()
"""And about their buffers."""

_LOSS_REMEDY = "Write for example loss=lambda inputs: model(**inputs).loss, outside torch.no_grad()."


@dataclass(frozen=True, kw_only=True)
class MiniBatchReport:
    """What `run_mini_batch` did.

    Attributes:
        loss: mean loss of the mini-batch, over all ranks.
        num_items: what it is a mean over, on all ranks; 0 if there was nothing to learn, and then no gradient.
        num_micro_batches: that the rows of this rank were split into.
        cells: padded tokens that this rank has computed.
        tokens: those of them that are not padding.
        max_tokens: most padded tokens a micro-batch could have: as asked, or less if memory ran out. Ask for this many
            from then on.
        oom_retries: how often memory ran out, and the mini-batch was run again in smaller micro-batches.
    """

    loss: float
    num_items: float
    num_micro_batches: int
    cells: int
    tokens: int
    max_tokens: int
    oom_retries: int

    @property
    def padding_fraction(self) -> float:
        """Share of the cells that was padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0


def run_mini_batch(
    rows: Sequence[Any],
    *,
    model: torch.nn.Module,
    loss: Callable[[Inputs], torch.Tensor],
    collate_fn: Collator,
    accelerator: Any,
    max_tokens: int,
    num_items: Callable[[Mapping[str, Any]], float] | None = None,
    row_length: Callable[[Any], int] = collate.row_length,
    shifts_labels: bool | None = None,
    accumulate_in_fp32: bool = False,
) -> MiniBatchReport:
    """Forward and backward of a mini-batch in micro-batches; adds the gradient of its mean loss to the parameters.

    The algorithm of `MBPTrainer`, after Piao et al., IEEE Access 2023 (arXiv 2110.12484): plan, pad, weigh each
    micro-batch by its share of the items on all ranks, run one after the other. Call `optimizer.step()` and
    `optimizer.zero_grad()` yourself.

    Args:
        rows: of this rank, not padded yet, at least one.
        model: as `accelerator.prepare` returned it.
        loss: mean loss of collated inputs on the device, such as `lambda inputs: model(**inputs).loss`.
        collate_fn: pads rows into a dictionary of tensors, `[rows, width]`.
        accelerator: with `gradient_accumulation_steps=1`: the mini-batch is all of the step.
        max_tokens: most padded tokens, rows x width, of a micro-batch.
        num_items: what `loss` averages over, counted in collated inputs. Default: labels that are not -100, without
            the first column if the loss shifts them; rows where there are no labels.
        row_length: tokens of a row. Default: of its `input_ids`.
        shifts_labels: whether the loss predicts the next token, so that the first label of a row is no item. Default:
            found out by trying, once for each model; say it if a model has several losses.
        accumulate_in_fp32: sum the gradients of bfloat16 and float16 parameters in float32, and round once at the end.

    If memory runs out, the mini-batch is run again from its start, in smaller micro-batches; not under DeepSpeed. For
    that gradients that are there before are copied: with `zero_grad(set_to_none=False)` they take as much memory again.

    A mini-batch without any items leaves no gradient, and under fp16 one that makes the scaler skip the step.

    Raises:
        ValueError: there are no rows, `max_tokens` is not positive, the accelerator accumulates gradients itself,
            or `accumulate_in_fp32` is asked for under FSDP or DeepSpeed.
        TypeError: `rows` is no list of rows, or `loss` returns something else than a number with a gradient.
        MemoryError: a single row does not fit.

    Example: `scripts/accelerate_loop.py`.
    """
    _refuse(rows, accelerator, max_tokens)
    device_memory.keep_address_space_free()
    if accumulate_in_fp32:
        refusals.refuse_float32_sums(is_sharded=wrapped.shards(accelerator))
    base = accelerator.unwrap_model(model)
    said = None if shifts_labels is None else KnownTraits(shifts_labels=shifts_labels)
    traits = LossTraits(accelerator, said or _TRAITS.setdefault(base, KnownTraits()))
    loop = _Loop(
        model=model,
        base=base,
        loss=loss,
        collate_fn=collate_fn,
        accelerator=accelerator,
        traits=traits,
        half=half_precision(base.parameters()) if accumulate_in_fp32 else [],
        is_compiled=wrapped.compiles(accelerator, model),
        prefetch=Prefetch(accelerator.device, pins=True),
    )
    sizes = loop.sizes(rows, row_length)
    longest = int(sizes.sum(axis=1).max())
    if longest > max_tokens:
        warnings.warn(too_long_message(longest, max_tokens), stacklevel=2)
    count = loop.num_items if num_items is None else num_items
    functions = RowFunctions(
        collate=loop.collate, num_items=lambda inputs: checked_count(count(inputs)), num_cells=loop.num_cells
    )
    ranks = Ranks(accelerator)
    split = partial(
        split_mini_batch, rows, sizes, cost=cost_of(base, accelerator.device), functions=functions, ranks=ranks
    )
    mini_batch = _MiniBatch(split, ranks, max_tokens, can_checkpoint=compat.can_checkpoint(base))
    loss_value = loop.run(mini_batch, ranks)
    return mini_batch.report(loss_value)


@dataclass(frozen=True, kw_only=True)
class _Loop:
    """What a loop knows of its model, data and loss."""

    model: torch.nn.Module
    base: torch.nn.Module
    loss: Callable[[Inputs], torch.Tensor]
    collate_fn: Collator
    accelerator: Any
    traits: LossTraits
    half: list[torch.nn.Parameter]
    is_compiled: bool
    prefetch: Prefetch
    sums: Float32Sums = field(default_factory=Float32Sums)

    @property
    def has_targets(self) -> bool:
        return collate.has_targets(self.base)

    def sizes(self, rows: Sequence[Any], row_length: Callable[[Any], int]) -> Ints:
        sizes = as_sizes([(row_length(row), collate.target_length(row) * self.has_targets) for row in rows])
        if collate.need_one_width(rows[0]):
            sizes[:] = sizes.max(axis=0)
        return sizes

    def collate(self, groups: list[list[Any]]) -> list[Inputs]:
        collated = collate.collated(self.collate_fn, groups)
        return [self.traits.settled(self.on_the_side, [self.base], inputs) for inputs in collated]

    def num_items(self, inputs: Inputs) -> int:
        shifts = partial(self.traits.shifts_labels, self.on_the_side, [self.base])
        return items_of(inputs, getattr(self.base, "config", None), shifts)

    def num_cells(self, inputs: Inputs) -> int | None:
        return collate.count_cells(inputs, with_targets=self.has_targets)

    def on_the_side(self, inputs: Inputs, _: float) -> torch.Tensor:
        with compat.without_buffer_sync(self.model), wrapped.eagerly(self.is_compiled):
            return self.value(inputs)

    def value(self, inputs: Inputs) -> torch.Tensor:
        on_device = compat.to_device(self.accelerator, inputs)
        if self.is_compiled:
            wrapped.mark_varying(on_device)
        with self.accelerator.autocast():
            return self.loss(on_device)

    def backward(self, micro_batch: MicroBatch) -> torch.Tensor:
        checkpointing = compat.checkpointed(self.base) if micro_batch.is_checkpointed else nullcontext()
        with checkpointing, self.prefetch.on_device(micro_batch) as inputs:
            value = scalar_of(self.value(inputs), function="loss", remedy=_LOSS_REMEDY)
            self.accelerator.backward(value * micro_batch.weight)
        self.sums.add(self.half)
        return value.detach() * micro_batch.weight

    def run(self, mini_batch: "_MiniBatch", ranks: Ranks) -> float:
        """Forward and backward of all that are not idle; the sum of their weighted losses."""
        if wrapped.recovers(self.accelerator):
            modules = compat.prepared_modules(self.accelerator, [self.base, self.model])
            parameters = partial(compat.prepared_parameters, self.accelerator, modules)
            buffers = _BUFFERS.setdefault(self.base, ChangingBuffers())
            recovery = Recovery(ranks, lambda: modules, parameters, buffers)
            first, again = mini_batch.plan(), mini_batch.plan_again
            loss = recovery.run(first, self.attempt, self.backward, plan_again=again)
        else:
            loss = self.attempt(mini_batch.plan(), self.backward)
        self.sums.give()
        if all(micro_batch.is_idle for micro_batch in mini_batch.micro_batches):
            compat.void_step(self.accelerator, self.base)
        elif (replicated := wrapped.replicated_in(self.model)) is not None:
            wrapped.reduce_gradients(replicated)
        return float(loss)

    def attempt(self, micro_batches: list[MicroBatch], backward: Backward) -> torch.Tensor:
        if all(micro_batch.is_idle for micro_batch in micro_batches):
            return torch.zeros((), device=self.accelerator.device)
        self.sums.restart()
        self.sums.add(self.half)
        self.prefetch.start(micro_batches)
        return run_micro_batches(
            micro_batches,
            backward,
            defer_sync=partial(compat.local_gradients, self.accelerator, self.model),
            syncs_last=wrapped.replicated_in(self.model) is None,
        )


class _MiniBatch:
    """The rows of one call, and the micro-batches that they are split into."""

    def __init__(
        self, split: Callable[..., list[MicroBatch]], ranks: Ranks, max_tokens: int, *, can_checkpoint: bool
    ) -> None:
        self.micro_batches: list[MicroBatch] = []
        self._split = split
        self._ranks = ranks
        self._max_tokens = max_tokens
        self._can_checkpoint = can_checkpoint
        self._checkpoint_from: int | None = None
        self._retries = 0

    def plan(self) -> list[MicroBatch]:
        split = weigh(self._split(budget=Budget(max_tokens=self._max_tokens)), self._ranks)
        self.micro_batches = [replace(mb, is_checkpointed=self._is_checkpointed(mb)) for mb in split]
        return self.micro_batches

    def plan_again(self, faults: list[Fault]) -> list[MicroBatch]:
        self._retries += 1
        for fault in faults:
            if fault.rows > 1:
                self._max_tokens = min(self._max_tokens, max(1, fault.rows * fault.width // 2))
            elif fault.can_be_checkpointed(can_checkpoint=self._can_checkpoint):
                self._checkpoint_from = min(self._checkpoint_from or fault.width, fault.width)
            elif fault.is_hopeless(can_checkpoint=self._can_checkpoint):
                raise MemoryError(
                    f"A row of {fault.width:,} tokens does not fit the memory by itself ({fault.reason}). Shorten such "
                    "rows, or take a smaller model or dtype."
                )
        return self.plan()

    def _is_checkpointed(self, micro_batch: MicroBatch) -> bool:
        from_width = self._checkpoint_from
        return from_width is not None and micro_batch.num_rows == 1 and micro_batch.cells >= from_width

    def report(self, loss: float) -> MiniBatchReport:
        run = self.micro_batches
        gathered = self._ranks.gather(loss, sum(micro_batch.num_items for micro_batch in run))
        return MiniBatchReport(
            loss=sum(row[0] for row in gathered) / self._ranks.count,
            num_items=sum(row[1] for row in gathered),
            num_micro_batches=sum(micro_batch.num_rows > 0 for micro_batch in run),
            cells=sum(micro_batch.cells for micro_batch in run),
            tokens=sum(micro_batch.tokens for micro_batch in run),
            max_tokens=self._max_tokens,
            oom_retries=self._retries,
        )


def _refuse(rows: Sequence[Any], accelerator: Any, max_tokens: int) -> None:
    check_max_tokens(max_tokens, "max_tokens")
    if isinstance(rows, Mapping) or not isinstance(rows, Sized):
        raise TypeError(
            f"rows is a {type(rows).__name__}, and must be a list of rows: [data[index] for index in range(64)], or "
            "collate_fn=list in the data loader."
        )
    if len(rows) == 0:
        raise ValueError("rows is empty: a mini-batch needs at least one row on every rank.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"The accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, by which it "
            "would divide the loss. Make it with 1, and give run_mini_batch all rows of the step."
        )
