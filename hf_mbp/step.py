"""The algorithm: the micro-batches of one mini-batch. After Piao et al., IEEE Access 2023 (arXiv 2110.12484).

    1. `split_mini_batch`   the rows of the step -> a plan under the budget -> padded micro-batches, the longest first
    2. `weigh`              each micro-batch gets its share of the items that the loss averages over, on all ranks
    3. `run_micro_batches`  one after the other: forward, backward; gradients are synchronised at the last, or after it

The gradients that are left are those of the whole mini-batch, because its loss is a mean over items (see `items.py`).
Nothing here knows a Trainer.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_mbp.arrays import Ints
from hf_mbp.collate import Inputs
from hf_mbp.distributed import Ranks
from hf_mbp.filler import filler_of, shortest_filler_of
from hf_mbp.padding_free import is_laid_end_to_end
from hf_mbp.plan import Budget, Cost, Layout, planned_groups

Groups = list[list[int]]
"""Rows that run together, by their indices."""


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that run together, collated, on the host.

    `weight` is the share of the micro-batch times the number of ranks: gradients are averaged over the ranks, and the
    share is of all their items together. An idle micro-batch has nothing to learn: it is not run, only counted. A
    checkpointed one computes its activations again in the backward pass, and so takes less memory. `layout` is how its
    rows lie.
    """

    inputs: Inputs
    rows: tuple[Any, ...] = ()
    num_rows: int
    num_items: float
    cells: int
    tokens: int
    weight: float = 0.0
    is_idle: bool = False
    is_checkpointed: bool = False
    layout: Layout = Layout.PADDED


@dataclass(frozen=True, kw_only=True)
class RowFunctions:
    """What has to be known about the user's rows.

    `collate` pads each of the given groups of rows, `num_items` and `num_cells` count what it returns; `None` for cells
    that cannot be counted, as of images: then they are what was planned. `layout` is how it lays rows where it can.
    """

    collate: Callable[[list[list[Any]]], list[Inputs]]
    num_items: Callable[[Inputs], float]
    num_cells: Callable[[Inputs], int | None]
    layout: Layout = Layout.PADDED


def split_mini_batch(
    rows: Sequence[Any], sizes: Ints, *, budget: Budget, cost: Cost, functions: RowFunctions, ranks: Ranks
) -> list[MicroBatch]:
    """Micro-batches of all `rows`, each once, within `budget`, the longest first.

    Ranks plan for the same number of micro-batches, so that none waits for another.
    """
    own = planned_groups(functions.layout, sizes, budget, cost)
    plan = agreed_groups(own, sizes, layout=functions.layout, budget=budget, cost=cost, ranks=ranks)
    return collate_groups(rows, sizes, plan, budget, functions)


def agreed_groups(own: Groups, sizes: Ints, *, layout: Layout, budget: Budget, cost: Cost, ranks: Ranks) -> Groups:
    """As many groups as the rank has that has most: those this one has planned by itself, or a plan of so many."""
    agreed = min(ranks.highest(len(own)), len(sizes))
    if agreed <= len(own):
        return own
    return planned_groups(layout, sizes, budget, cost, num_micro_batches=agreed)


def collate_groups(
    rows: Sequence[Any], sizes: Ints, groups: Groups, budget: Budget, functions: RowFunctions
) -> list[MicroBatch]:
    """Pads each group; a group that the collator pads beyond the budget is halved until it fits.

    That happens with collators that pad to more than the longest row, and to rows that lie end to end as one long one.
    """
    micro_batches = []
    for group, inputs in zip(groups, functions.collate([[rows[i] for i in group] for group in groups]), strict=True):
        counted = functions.num_cells(inputs)
        cells = len(group) * int(sizes[group].max(axis=0).sum()) if counted is None else counted
        layout = functions.layout if is_laid_end_to_end(inputs) else Layout.PADDED
        if len(group) > 1 and not budget.fits(*layout.shape(len(group), cells)):
            half = len(group) // 2
            micro_batches += collate_groups(rows, sizes, [group[:half], group[half:]], budget, functions)
            continue
        micro_batches.append(
            MicroBatch(
                inputs=inputs,
                rows=tuple(rows[i] for i in group),
                num_rows=len(group),
                num_items=functions.num_items(inputs),
                cells=cells,
                tokens=_useful_tokens(inputs, int(sizes[group].sum()), cells),
                layout=layout,
            )
        )
    return micro_batches


def _useful_tokens(inputs: Inputs, planned: int, cells: int) -> int:
    """Cells that are not padding: by the mask, which knows about rows that came padded, or by the rows' lengths."""
    mask, token_ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if isinstance(mask, torch.Tensor) and isinstance(token_ids, torch.Tensor) and mask.shape == token_ids.shape:
        padding = mask.numel() - int((mask != 0).sum())
        return min(planned, cells - padding)
    return min(planned, cells)


def weigh(micro_batches: list[MicroBatch], ranks: Ranks, filler: MicroBatch | None = None) -> list[MicroBatch]:
    """The micro-batches with their weights, the idle ones first.

    Those without items are idle: they add nothing, and their mean is 0/0. Several ranks run equally many of the others,
    or their collectives would pair up wrongly: the beginning of `filler`, or of the last with items, stands in, at
    weight zero, where a rank has fewer. If no rank has any items, all are idle.
    """
    learning = [micro_batch for micro_batch in micro_batches if micro_batch.num_items > 0]
    idle = [replace(micro_batch, is_idle=True) for micro_batch in micro_batches if micro_batch.num_items == 0]
    counts = ranks.gather(len(learning), sum(micro_batch.num_items for micro_batch in learning))
    most, total_items = int(max(count for count, _ in counts)), sum(items for _, items in counts)
    weighed = [replace(mb, weight=mb.num_items / total_items * ranks.count) for mb in learning]
    if most > len(weighed):
        stand_in = filler or (learning or micro_batches)[-1]
        weighed += [as_shortest_filler(stand_in)] * (most - len(weighed))
    return idle + weighed


def as_filler(micro_batch: MicroBatch) -> MicroBatch:
    """A micro-batch that runs so that this rank takes part, and adds and counts nothing."""
    return _with_no_weight(micro_batch, filler_of(micro_batch.inputs, micro_batch.num_rows))


def as_shortest_filler(micro_batch: MicroBatch) -> MicroBatch:
    """The same with as few tokens as can be."""
    return _with_no_weight(micro_batch, shortest_filler_of(micro_batch.inputs, micro_batch.num_rows))


def _with_no_weight(micro_batch: MicroBatch, inputs: Inputs) -> MicroBatch:
    return replace(micro_batch, inputs=inputs, rows=(), num_rows=0, num_items=0, cells=0, tokens=0, weight=0.0)


def run_micro_batches(
    micro_batches: Sequence[MicroBatch],
    backward: Callable[[MicroBatch], torch.Tensor],
    *,
    defer_sync: Callable[[], AbstractContextManager[Any]] = nullcontext,
    syncs_last: bool = True,
) -> torch.Tensor:
    """Runs the micro-batches one after the other and leaves the sum of their weighted gradients.

    Args:
        micro_batches: at least one that is not idle.
        backward: forward and backward of one micro-batch; returns its weighted loss, detached.
        defer_sync: a context in which gradients are added up locally.
        syncs_last: whether the last is run outside of it, and synchronises the gradients of all.

    Returns:
        The sum of the weighted losses: the loss of the mini-batch, on one process.

    Raises:
        ValueError: the loss of a filler is no finite number, which times a weight of zero is none either.
    """
    *before, last = [micro_batch for micro_batch in micro_batches if not micro_batch.is_idle]
    losses = []
    for micro_batch in before:
        with defer_sync():
            losses.append(backward(micro_batch))
    with nullcontext() if syncs_last else defer_sync():
        losses.append(backward(last))
    fillers = [loss for loss, micro_batch in zip(losses, [*before, last], strict=True) if micro_batch.weight == 0]
    _check_finite(fillers)
    return sum(losses[1:], losses[0])


def _check_finite(losses_of_fillers: list[torch.Tensor]) -> None:
    """After the last micro-batch: to look at a number, the host waits for the device to have computed it."""
    if losses_of_fillers and not bool(torch.isfinite(torch.stack(losses_of_fillers)).all()):
        raise ValueError(
            "This process has nothing to learn from in this step, and takes part with rows whose loss is no finite "
            "number, which would spoil the gradient of the others. If num_items is overridden, let rows that count as "
            "nothing have a finite loss: divide by max(1, items)."
        )
