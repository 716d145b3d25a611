"""Micro-batch processing without a Trainer: one mini-batch, for a training loop of your own."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from hf_mbp import collate, compat
from hf_mbp.collate import Collator, Inputs
from hf_mbp.distributed import Ranks
from hf_mbp.items import items_of
from hf_mbp.plan import Budget, as_sizes, check_max_tokens, too_long_message
from hf_mbp.probe import LossTraits
from hf_mbp.sizing import cost_of
from hf_mbp.step import MicroBatch, RowFunctions, run_micro_batches, split_mini_batch, weigh

_TRAITS: "WeakKeyDictionary[torch.nn.Module, LossTraits]" = WeakKeyDictionary()
"""What was found out about the losses of models, for as long as they live."""


@dataclass(frozen=True, kw_only=True)
class MiniBatchReport:
    """What `run_mini_batch` did.

    Attributes:
        loss: mean loss of the mini-batch, over all ranks.
        num_items: what it is a mean over, on all ranks; 0 if there was nothing to learn, and then no gradient.
        num_micro_batches: that the rows of this rank were split into.
        cells: padded tokens that this rank has computed.
        tokens: those of them that are not padding.
    """

    loss: float
    num_items: float
    num_micro_batches: int
    cells: int
    tokens: int

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
            the first column if the loss shifts them, which is found out by trying; rows where there are no labels.
        row_length: tokens of a row. Default: of its `input_ids`.

    Raises:
        ValueError: there are no rows, `max_tokens` is not positive, or the accelerator accumulates gradients itself.

    Example: `scripts/accelerate_loop.py`.
    """
    _refuse(rows, accelerator, max_tokens)
    ranks, base = Ranks(accelerator), accelerator.unwrap_model(model)
    traits, config = _TRAITS.setdefault(base, LossTraits()), getattr(base, "config", None)
    has_targets = bool(getattr(config, "is_encoder_decoder", False))
    sizes = as_sizes([(row_length(row), collate.target_length(row) if has_targets else 0) for row in rows])
    if collate.need_one_width(rows[0]):
        sizes[:] = sizes.max(axis=0)
    budget = Budget(max_tokens=max_tokens)
    _warn_of_long_row(budget, int(sizes.sum(axis=1).max()))

    def on_device(inputs: Inputs, _: float = 1) -> torch.Tensor:
        with accelerator.autocast():
            return loss(compat.to_device(accelerator, inputs))

    def count(inputs: Inputs) -> float:
        return items_of(inputs, config, lambda asked: traits.shifts_labels(on_device, [base], asked))

    def collate_groups(groups: list[list[Any]]) -> list[Inputs]:
        return [traits.settled(on_device, [base], inputs) for inputs in collate.collated(collate_fn, groups)]

    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        weighted = on_device(micro_batch.inputs) * micro_batch.weight
        accelerator.backward(weighted)
        return weighted.detach()

    micro_batches = split_mini_batch(
        rows,
        sizes,
        budget=budget,
        cost=cost_of(base, accelerator.device),
        functions=RowFunctions(
            collate=collate_groups,
            num_items=num_items or count,
            num_cells=lambda inputs: collate.count_cells(inputs, with_targets=has_targets),
        ),
        ranks=ranks,
    )
    weighed = weigh(micro_batches, ranks)
    total = torch.zeros(())
    if not all(micro_batch.is_idle for micro_batch in weighed):
        total = run_micro_batches(weighed, backward, defer_sync=lambda: compat.local_gradients(accelerator, model))
    return _report(micro_batches, float(total), ranks)


def _refuse(rows: Sequence[Any], accelerator: Any, max_tokens: int) -> None:
    check_max_tokens(max_tokens, "max_tokens")
    if len(rows) == 0:
        raise ValueError("rows is empty: a mini-batch needs at least one row on every rank.")
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"The accelerator has gradient_accumulation_steps={accelerator.gradient_accumulation_steps}, by which it "
            "would divide the loss. Make it with 1, and give run_mini_batch all rows of the step."
        )


def _warn_of_long_row(budget: Budget, longest: int) -> None:
    if not budget.fits(1, longest):
        warnings.warn(too_long_message(longest, budget.tokens_at(longest)), stacklevel=3)


def _report(micro_batches: list[MicroBatch], loss: float, ranks: Ranks) -> MiniBatchReport:
    gathered = ranks.gather(loss, sum(micro_batch.num_items for micro_batch in micro_batches))
    return MiniBatchReport(
        loss=sum(row[0] for row in gathered) / ranks.count,
        num_items=sum(row[1] for row in gathered),
        num_micro_batches=len(micro_batches),
        cells=sum(micro_batch.cells for micro_batch in micro_batches),
        tokens=sum(micro_batch.tokens for micro_batch in micro_batches),
    )
