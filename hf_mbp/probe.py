"""Runs the user's model and loss on the side, and leaves no trace."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from math import isclose, isnan
from typing import Any

import numpy as np
import torch

from hf_mbp import compat
from hf_mbp.collate import Inputs, has_entry_for_each_row, seeded
from hf_mbp.items import changed_first_labels, count_items, has_token_labels, shift_probes
from hf_mbp.padding import is_left_padded, settle_left_padding, width_of, without_padding

LossFunction = Callable[[Inputs, float], torch.Tensor]
"""The mean loss of collated inputs, which have so many items."""

NOTES = ("_metrics", "accum_loss_components")
"""Where trainers of TRL and sentence-transformers collect the metrics that they log."""

ROUNDING = 1e-6
"""Relative difference of two losses that a device may make of one; a label more makes a larger one."""


def modules_of(trainer: Any) -> list[torch.nn.Module]:
    """The trainer's model, and other modules it holds: a reference model, or a loss with weights of its own."""
    held = [trainer.model]
    for value in vars(trainer).values():
        values = value.values() if isinstance(value, dict) else [value]
        held += [module for module in values if isinstance(module, torch.nn.Module)]
    return held


@contextmanager
def undisturbed(modules: list[torch.nn.Module]) -> Iterator[None]:
    """Restores gradients, buffers, training flags and random states when the block is left."""
    every = list(dict.fromkeys(module for held in modules for module in held.modules()))
    gradients = [(parameter, parameter.grad) for module in every for parameter in module.parameters(recurse=False)]
    buffers = [(module, dict(module._buffers)) for module in every]  # a forward pass may put others in their place
    values = [
        (buffer, buffer.detach().clone()) for _, named in buffers for buffer in named.values() if buffer is not None
    ]
    flags = [(module, module.training) for module in every]
    config: Any = getattr(modules[0], "config", None)
    problem_type = getattr(config, "problem_type", None)  # sequence classification sets it at its first loss
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), seeded(0):
        try:
            for parameter, _ in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients:
                parameter.grad = gradient
            for module, named in buffers:
                module._buffers.update(named)
            for buffer, value in values:
                buffer.data.copy_(value)
            for module, was_training in flags:
                module.training = was_training
            if hasattr(config, "problem_type"):
                config.problem_type = problem_type


@contextmanager
def kept_collator(collator: Any) -> Iterator[None]:
    """Restores the attributes of a collator, and the states of the random generators of its own among them."""
    attributes = {} if isinstance(collator, type) else getattr(collator, "__dict__", {})
    before = dict(attributes)
    restore = [_restorer(value) for value in before.values()]
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)
        for put_back in restore:
            put_back()


def _restorer(generator: Any) -> Callable[[], Any]:
    """What puts a random generator into the state it has now; does nothing for anything else."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return lambda: None


@contextmanager
def kept_notes(trainer: Any) -> Iterator[None]:
    """Restores what subclasses of the trainer note at each call of `compute_loss`, as those of TRL do.

    Numbers of its own, such as counts of tokens, and `NOTES`.
    """
    before = {name: value for name, value in vars(trainer).items() if isinstance(value, (int, float))}
    metrics = {name: copy.deepcopy(vars(trainer)[name]) for name in NOTES if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before | metrics)


def loss_of(trainer: Any, inputs: Inputs, num_items: float, *, weight: float = 1.0) -> torch.Tensor:
    """The weighted mean loss of one micro-batch, as the training step computes it, of the model without wrappers."""
    with (
        kept_notes(trainer),
        compat.local_gathers(trainer),
        compat.replaced(trainer, log=lambda *_, **__: None),
        compat.weighted_loss(trainer, weight, num_items),
        trainer.compute_loss_context_manager(),
    ):
        loss: torch.Tensor = trainer.compute_loss(trainer.model, compat.prepare_inputs(trainer, inputs))
    return loss


def without_dropout(model: torch.nn.Module) -> None:
    """Evaluation mode, except for batch normalisation, whose dependence on the batch is not to be hidden."""
    model.train()
    normalised_by_batch = batch_norms_of(model)
    model.eval()
    for module in normalised_by_batch:
        module.train()


def batch_norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Batch normalisations that use the mean of the batch that runs."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kinds) and module.training]


class LossTraits:
    """What a model's loss makes of labels and padding, found out by trying, once."""

    def __init__(self, shifts_labels: bool | None = None) -> None:
        self._shifts = shifts_labels
        self._from_zero: bool | None = None

    def shifts_labels(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> bool:
        """Whether the loss predicts the next token, so that a label in the first column changes nothing.

        Neither the name nor the loss mapping of a model tells: BartForCausalLM does not shift, GPT-2 does and has no
        loss type.
        """
        if self._shifts is None:
            try:
                one, other = _values(loss, modules, *shift_probes(inputs))
            except (IndexError, RuntimeError, ValueError):  # -100 is no label for this loss
                one, other = _values(loss, modules, *changed_first_labels(inputs))
            self._shifts = isclose(one, other, rel_tol=ROUNDING) or (isnan(one) and isnan(other))
        return self._shifts

    def find_out(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> None:
        """Tries everything there is to try now, whatever the inputs of this rank, so that no rank has to try alone."""
        if not has_token_labels(inputs) or "shift_labels" in inputs or not self.shifts_labels(loss, modules, inputs):
            return
        if width_of(inputs) is not None:
            self._from_zero = compat.accepts(modules[0], "position_ids") and _counts_from_zero(loss, modules, inputs)

    def settled(self, loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> Inputs:
        """Inputs that do not depend on the width they are padded to; see `padding.settle_left_padding`."""
        if not is_left_padded(inputs) or not has_token_labels(inputs) or not self.shifts_labels(loss, modules, inputs):
            return inputs
        if self._from_zero is None:
            self._from_zero = compat.accepts(modules[0], "position_ids") and _counts_from_zero(loss, modules, inputs)
        return settle_left_padding(inputs, add_position_ids=self._from_zero)


def _counts_from_zero(loss: LossFunction, modules: list[torch.nn.Module], inputs: Inputs) -> bool:
    """Whether the model places an unpadded row at the positions 0, 1, ...; some start elsewhere, or number images."""
    if not has_entry_for_each_row(inputs, len(inputs["attention_mask"])):
        return False  # packed images: such models number their positions by the mask
    unpadded = without_padding(inputs)
    positions = torch.arange(unpadded["input_ids"].shape[-1]).expand_as(unpadded["input_ids"])
    try:
        plain, placed = _values(loss, modules, unpadded, {**unpadded, "position_ids": positions})
    except TypeError:  # a forward pass with **kwargs, which something below it does not take
        return False
    return isclose(plain, placed, rel_tol=ROUNDING)


def _values(loss: LossFunction, modules: list[torch.nn.Module], *probes: Inputs) -> list[float]:
    """The losses of some inputs, without dropout."""
    with undisturbed(modules), torch.no_grad():
        for module in modules:
            module.eval()
        return [float(loss(inputs, max(1, count_items(inputs, shifts=True)))) for inputs in probes]
