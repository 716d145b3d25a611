"""Runs the user's model and loss on the side, and leaves no trace."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from math import isclose, isnan
from typing import Any

import torch

from hf_mbp import compat
from hf_mbp.collate import Inputs, seeded
from hf_mbp.items import count_items, shift_probes
from hf_mbp.padding import without_padding

ROUNDING = 1e-6
"""Relative difference of two losses that a device may make of one; a label more makes a larger one."""


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Restores gradients, buffers, training flags and random states when the block is left."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    flags = [(module, module.training) for module in model.modules()]
    config: Any = getattr(model, "config", None)
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
            for buffer, value in buffers:
                buffer.data.copy_(value)
            for module, was_training in flags:
                module.training = was_training
            if hasattr(config, "problem_type"):
                config.problem_type = problem_type


@contextmanager
def kept_metrics(trainer: Any) -> Iterator[None]:
    """Restores what subclasses of the trainer note in `_metrics` at each call of `compute_loss`, as those of TRL do."""
    if not hasattr(trainer, "_metrics"):
        yield
        return
    before = copy.deepcopy(trainer._metrics)
    try:
        yield
    finally:
        trainer._metrics = before


def loss_of(trainer: Any, inputs: Inputs, num_items: float) -> torch.Tensor:
    """The mean loss of one micro-batch, as the training step computes it, of the model without wrappers."""
    with (
        kept_metrics(trainer),
        compat.replaced(trainer, log=lambda *_, **__: None),
        compat.weighted_loss(trainer, 1.0, num_items),
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


def loss_shifts_labels(trainer: Any, inputs: Inputs) -> bool:
    """Whether the loss predicts the next token, so that a label in the first column changes nothing.

    Neither the name nor the loss mapping of a model tells: BartForCausalLM does not shift, GPT-2 does and has no loss
    type.
    """
    with undisturbed(trainer.model), torch.no_grad():
        trainer.model.eval()
        without, with_first = (float(loss_of(trainer, probe, num_items=1)) for probe in shift_probes(inputs))
    return isclose(without, with_first, rel_tol=ROUNDING) or (isnan(without) and isnan(with_first))


def counts_positions_from_zero(trainer: Any, inputs: Inputs) -> bool:
    """Whether the model places an unpadded row at the positions 0, 1, ...; some start elsewhere, or number images."""
    unpadded = without_padding(inputs)
    positions = torch.arange(unpadded["input_ids"].shape[-1]).expand_as(unpadded["input_ids"])
    num_items = max(1, count_items(unpadded, shifts=True))
    with undisturbed(trainer.model), torch.no_grad():
        trainer.model.eval()
        probes = (unpadded, {**unpadded, "position_ids": positions})
        plain, placed = (float(loss_of(trainer, probe, num_items)) for probe in probes)
    return isclose(plain, placed, rel_tol=ROUNDING)
