"""Puts everything back that running a model on the side may change: weights, buffers, attributes, random states."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from hf_mbp import compat
from hf_mbp.random_numbers import is_generator, own_random_numbers, restorer
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
    state = CollatorState(collator)
    try:
        yield
    finally:
        state.put_back()


class CollatorState:
    """The attributes of a collator as they are now, and the states of the random generators of its own among them."""

    def __init__(self, collator: Any = None) -> None:
        self._collator = collator
        has_state = hasattr(collator, "__dict__") and not isinstance(collator, type)
        self._attributes = Attributes(collator) if has_state else None

    def put_back(self) -> None:
        """Makes the collator what it was then."""
        if self._attributes is not None:
            self._attributes.put_back(with_generators=True)

    def is_of(self, collator: Any) -> bool:
        """Whether it is of this collator, whose attributes nobody has changed since."""
        return collator is self._collator and (self._attributes is None or self._attributes.is_as_then())


def draws_own_numbers(collator: Any) -> bool:
    """Whether a collator has a random generator of its own among its attributes."""
    return any(map(is_generator, getattr(collator, "__dict__", {}).values()))


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
