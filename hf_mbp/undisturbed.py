"""Puts everything back that running a model on the side may change: weights, buffers, attributes, random states."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_mbp import compat
from hf_mbp.random_numbers import own_random_numbers, restorer
from hf_mbp.stand_ins import Attributes, StandIns

NOTES = ("_metrics", "accum_loss_components")
"""Where trainers of TRL and sentence-transformers collect the metrics that they log."""


@contextmanager
def undisturbed(modules: list[nn.Module], *, half_as: torch.dtype | None = None, beside: int = 0) -> Iterator[StandIns]:
    """Runs the block on copies of the modules' tensors, and puts everything back when it is left.

    Parameters, gradients, buffers, attributes and training flags of the modules, the fields of their configurations,
    and the random states of Python, numpy and torch, on every device that the modules are on. Parameters are not
    copied where there is no room for it and `beside` bytes more, frozen ones first, nor sharded ones.
    """
    with own_random_numbers(modules):
        stand_ins = StandIns(modules, half_as, beside=beside)
        try:
            yield stand_ins
        finally:
            stand_ins.put_back()


@contextmanager
def kept_collator(collator: Any) -> Iterator[None]:
    """Restores the attributes of a collator, and the states of the random generators of its own among them."""
    put_back = remembered_collator(collator)
    try:
        yield
    finally:
        put_back()


def remembered_collator(collator: Any) -> Callable[[], None]:
    """What puts back the attributes of a collator, and the states of the random generators of its own among them."""
    if not hasattr(collator, "__dict__") or isinstance(collator, type):
        return lambda: None
    return partial(Attributes(collator).put_back, with_generators=True)


@contextmanager
def kept_generators(owner: Any) -> Iterator[None]:
    """Restores the states of the random generators among the attributes of a data set, which may transform its rows."""
    restore = [restorer(value) for value in getattr(owner, "__dict__", {}).values()]
    try:
        yield
    finally:
        for put_back in restore:
            put_back()


@contextmanager
def kept_notes(trainer: Any) -> Iterator[None]:
    """Restores what subclasses of the trainer note at each call of `compute_loss`."""
    put_back = remembered_notes(trainer)
    try:
        yield
    finally:
        put_back()


def remembered_notes(trainer: Any) -> Callable[[], None]:
    """What puts back the notes of a trainer: numbers of its own, such as TRL's count of tokens, and `NOTES`."""
    numbers = {name: value for name, value in vars(trainer).items() if isinstance(value, (int, float))}
    notes = {name: copy.deepcopy(vars(trainer)[name]) for name in NOTES if name in vars(trainer)}
    return lambda: vars(trainer).update(numbers | copy.deepcopy(notes))


@contextmanager
def untouched(trainer: Any) -> Iterator[None]:
    """Restores what drawing rows from a trainer's data, and padding them, may change."""
    with ExitStack() as stack:
        stack.enter_context(kept_collator(trainer.data_collator))
        stack.enter_context(kept_generators(trainer.train_dataset))
        stack.enter_context(compat.kept_loaders(trainer.accelerator))
        yield
