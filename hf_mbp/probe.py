"""Runs the user's model and loss on the side, and leaves no trace."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isclose, isnan
from typing import Any

import torch

from hf_mbp import compat, wrapped
from hf_mbp.collate import Inputs, has_entry_for_each_row
from hf_mbp.full_precision import in_float32, on_the_side
from hf_mbp.items import changed_first_labels, count_items, has_token_labels, shift_probes
from hf_mbp.padding import is_left_padded, settle_left_padding, width_of, without_padding
from hf_mbp.random_numbers import reseed
from hf_mbp.stand_ins import StandIns
from hf_mbp.undisturbed import kept_notes

LossFunction = Callable[[Inputs, float], torch.Tensor]
"""The mean loss of collated inputs, which have so many items."""

ROUNDING = 1e-6
"""Relative difference of two losses that a device may make of one; a label more makes a larger one."""


def modules_of(trainer: Any) -> list[torch.nn.Module]:
    """The trainer's model, and other modules it holds: a reference model, or a loss with weights of its own."""
    held = [trainer.model]
    for value in vars(trainer).values():
        values = value.values() if isinstance(value, dict) else [value]
        held += [module for module in values if isinstance(module, torch.nn.Module)]
    return held


def loss_of(trainer: Any, inputs: Inputs, num_items: float, *, weight: float = 1.0) -> torch.Tensor:
    """The weighted mean loss of one micro-batch, as the training step computes it, of the model without wrappers."""
    with (
        kept_notes(trainer),
        compat.local_gathers(trainer),
        compat.replaced(trainer, log=lambda *_, **__: None),
        compat.weighted_loss(trainer, weight, num_items),
        compat.unwrapped_in_losses(trainer, modules_of(trainer)),
        trainer.compute_loss_context_manager(),
    ):
        loss: torch.Tensor = trainer.compute_loss(trainer.model, compat.prepare_inputs(trainer, inputs))
    return loss


@dataclass
class KnownTraits:
    """What is known about a loss so far; `None` where it was not tried yet. Refers to nothing, so that it may be kept.

    `shifts_labels` says whether the loss predicts the next token, `counts_from_zero` whether the model places an
    unpadded row at the positions 0, 1, ...; some start later, or number images.
    """

    shifts_labels: bool | None = None
    counts_from_zero: bool | None = None


class LossTraits:
    """What a model's loss makes of labels and padding, found out by trying, once, and noted in `known`."""

    def __init__(self, accelerator: Any, known: KnownTraits | None = None) -> None:
        self.values = partial(_values, accelerator)
        self._known = known or KnownTraits()

    def shifts_labels(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> bool:
        """Whether the loss predicts the next token, so that a label in the first column changes nothing.

        Neither the name nor the loss mapping of a model tells: BartForCausalLM does not shift, GPT-2 does and has no
        loss type.
        """
        if self._known.shifts_labels is None:
            try:
                one, other = self.values(loss, modules, *shift_probes(inputs))
            except (IndexError, RuntimeError, ValueError):  # -100 is no label for this loss
                one, other = self.values(loss, modules, *changed_first_labels(inputs))
            self._known.shifts_labels = isclose(one, other, rel_tol=ROUNDING) or (isnan(one) and isnan(other))
        return self._known.shifts_labels

    def find_out(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> None:
        """Tries everything there is to try now, whatever the inputs of this rank, so that no rank has to try alone."""
        if not has_token_labels(inputs) or "shift_labels" in inputs or not self.shifts_labels(loss, modules, inputs):
            return
        if width_of(inputs) is not None:
            self._counts_from_zero(loss, modules, inputs)

    def settled(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> Inputs:
        """Inputs that do not depend on the width they are padded to; see `padding.settle_left_padding`."""
        if not is_left_padded(inputs) or not has_token_labels(inputs) or not self.shifts_labels(loss, modules, inputs):
            return inputs
        return settle_left_padding(inputs, add_position_ids=self._counts_from_zero(loss, modules, inputs))

    def _counts_from_zero(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> bool:
        if self._known.counts_from_zero is None:
            accepts = wrapped.accepts(modules[0], "position_ids")
            self._known.counts_from_zero = accepts and self._places_from_zero(loss, modules, inputs)
        return self._known.counts_from_zero

    def _places_from_zero(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> bool:
        if not has_entry_for_each_row(inputs, len(inputs["attention_mask"])):
            return False  # packed images: such models number their positions by the mask
        unpadded = without_padding(inputs)
        positions = torch.arange(unpadded["input_ids"].shape[-1]).expand_as(unpadded["input_ids"])
        try:
            plain, placed = self.values(loss, modules, unpadded, {**unpadded, "position_ids": positions})
        except TypeError:  # a forward pass with **kwargs, which something below it does not take
            return False
        return isclose(plain, placed, rel_tol=ROUNDING)


def _values(accelerator: Any, loss: LossFunction, modules: list[torch.nn.Module], *probes: Inputs) -> list[float]:
    """The losses of some inputs, each from the same state, without dropout and in float32 where that can be."""

    def run(stand_ins: StandIns, why_half: str | None) -> list[float]:
        for module in modules:
            module.eval()
        stand_ins.remember()
        values = []
        for inputs in probes:
            stand_ins.reset()
            reseed(0, modules)
            values.append(float(loss(inputs if why_half else in_float32(inputs), _num_items(inputs))))
        return values

    with torch.no_grad():
        return on_the_side(accelerator, modules, run)


def _num_items(inputs: Inputs) -> int:
    return max(1, count_items(inputs, shifts=True))
