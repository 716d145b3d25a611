"""Runs the worst micro-batch of the whole data set on the side, before the first step, where the lengths are known."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from hf_mbp import collate, loaders
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.collate import Batch
from hf_mbp.control import AIM_OF_ONE, Reading, after_failure, corrected
from hf_mbp.gauge import Gauge
from hf_mbp.out_of_memory import unless_out_of_memory
from hf_mbp.padding import with_padding
from hf_mbp.plan import Cost, planned_groups
from hf_mbp.probe import loss_of, modules_of
from hf_mbp.profile import Profile
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.row_lengths import known_lengths
from hf_mbp.undisturbed import kept_collator, undisturbed, untouched

WORTH_IT = 0.5
"""Share of the budget below which the worst micro-batch is not tried: what it would show is far from the limit."""

WIDER = 2
"""How much longer than in the data a row may be made by its collator, for a first look at whether trying is worth it: a
longer one is only not tried."""

MOST_TRIALS = 6
"""A budget that is halved so often without fitting is wrong about something else."""

MOST_CHANGE = 2.0
"""Factor by which one trial changes a budget, at most."""


@dataclass(frozen=True, kw_only=True)
class Worst:
    """Rows of a micro-batch, its number of rows, width, and the bytes that are predicted for it."""

    rows: list[Any]
    width: int
    planned_bytes: float


def rehearse(trainer: Any, profile: Profile, gauge: Gauge, cost: Cost, num_rows: int) -> Profile:
    """The profile as the worst micro-batch corrects it; as it is, where that cannot be known or is far from the limit.

    Nothing of the trainer is changed. A micro-batch that runs out of memory halves the budget, and the worst that is
    left is tried. Single rows that ran out of it are then beyond the budget: the steps see to them.

    Args:
        trainer: with a model that is not sharded: what runs here is no collective.
        profile: with a budget of bytes.
        gauge: of the device.
        cost: that plans are made with.
        num_rows: of a mini-batch on this rank.
    """
    lengths = known_lengths(trainer.train_dataset, has_targets=trainer.mbp_rows.has_targets)
    if lengths is None or profile.size_of(num_rows, WIDER * float(lengths.max())) < WORTH_IT * profile.cap:
        return profile
    rows = longest_rows(trainer, num_rows)
    step = trainer.state.global_step
    for _ in range(MOST_TRIALS if rows else 0):
        worst = worst_of(trainer, rows, profile, cost)
        if worst is None:
            break
        taken = _taken(trainer, worst, gauge)
        if taken is not None:
            return _corrected(profile, worst, taken, step)
        profile = after_failure(profile, len(worst.rows), worst.width, step)
    return profile


def _corrected(profile: Profile, worst: Worst, taken: int, step: int) -> Profile:
    """The profile with the budget that this much memory for its worst micro-batch leads to."""
    room = profile.room
    if room is None or taken == 0:
        return profile
    reading = Reading(
        peak_bytes=room.resting_bytes + taken, planned_bytes=worst.planned_bytes, num_rows=len(worst.rows)
    )
    cap = min(max(corrected(room, reading, AIM_OF_ONE), profile.cap / MOST_CHANGE), profile.cap * MOST_CHANGE)
    why = (
        f"the worst micro-batch of the data, {len(worst.rows):,} rows of width {worst.width:,}, was tried and took "
        f"{format_bytes(taken)}, predicted were {format_bytes(worst.planned_bytes)}"
    )
    return profile.with_cap(cap, step, why)


def worst_of(trainer: Any, rows: list[Any], profile: Profile, cost: Cost) -> Worst | None:
    """Of the micro-batches that a mini-batch of these rows is planned as, the one that needs most; single rows beyond
    the budget aside. `None` if it needs little."""
    sizes = trainer.mbp_rows.sizes(rows)
    if collate.need_one_width(rows[0]):
        sizes = np.broadcast_to(sizes.max(axis=0), sizes.shape)
    found = None
    layout = trainer.mbp_rows.layout
    for group in planned_groups(layout, sizes, profile.budget, cost):
        cells = layout.cells(sizes[group])
        planned = float(profile.budget.bytes(*map(float, layout.shape(len(group), cells))))
        if planned <= profile.cap and (found is None or planned > found.planned_bytes):
            found = Worst(rows=[rows[index] for index in group], width=cells // len(group), planned_bytes=planned)
    return found if found is not None and found.planned_bytes >= WORTH_IT * profile.cap else None


def _taken(trainer: Any, worst: Worst, gauge: Gauge) -> int | None:
    """Bytes that the micro-batch took beside weights and gradients, 0 if unknown; `None` if there were not enough."""
    return unless_out_of_memory(partial(_run, trainer, worst, gauge))


def _run(trainer: Any, worst: Worst, gauge: Gauge) -> int:
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    beside = int(worst.planned_bytes) + sum(parameter.nbytes for parameter in trained)  # these need their gradients
    with undisturbed(modules_of(trainer), beside=beside), kept_collator(trainer.data_collator):
        trainer.model.train()
        (inputs,) = trainer.mbp_rows.collate([worst.rows])
        arranged = trainer.mbp_rows.arranged(inputs)
        inputs = with_padding(inputs) if arranged is inputs else arranged
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        num_items = max(1.0, trainer.num_items(inputs))
        gauge.release()
        gauge.restart()
        held = gauge.held_bytes()
        loss_of(trainer, inputs, num_items).backward()  # type: ignore[no-untyped-call]
        return max(0, gauge.peak_bytes() - held)


def longest_rows(trainer: Any, num_rows: int) -> list[Any]:
    """The longest rows of the training data, as the collator gets them; none where the lengths are not at hand."""
    lengths = known_lengths(trainer.train_dataset, has_targets=trainer.mbp_rows.has_targets)
    if lengths is None:
        return []
    longest = np.argsort(-lengths, kind="stable")[:num_rows]
    with ExitStack() as stack:
        stack.enter_context(own_random_numbers(modules_of(trainer)))
        stack.enter_context(untouched(trainer))
        loader = loaders.source_of(trainer.get_train_dataloader())
        if not hasattr(loader.dataset, "__getitem__") or len(loader.dataset) != len(lengths):
            return []
        batch = loader.collate_fn([loader.dataset[int(index)] for index in longest])
    return batch.unpack() if isinstance(batch, Batch) else []
