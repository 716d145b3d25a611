"""Reads, plans and pads the next step while the device still works off this one."""

import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from typing import Any

from hf_mbp import compat
from hf_mbp.plan import Budget, Cost
from hf_mbp.pools import Basis, Pooling, Prepared
from hf_mbp.prefetch import HAVE_STREAMS
from hf_mbp.undisturbed import draws_own_numbers


class LookAhead:
    """The next step of one trainer, prepared in the time in which the host would only wait for the device.

    A GPU works off a queue. When the last micro-batch of a step is in it, the host has nothing left to do before
    `Trainer` looks at the loss, for which it waits. Nothing here waits for the device or for other ranks, and no thread
    is needed.

    Rows are read a step early, in the same order, and not beyond the epoch or the last step of the run. Streams are
    left alone, and so is what the first rank reads for all, and what a collator pads that has a random generator of its
    own: an evaluation between the steps may draw from it, too.

    Args:
        trainer: whose steps they are.
        pooling: makes micro-batches of its rows.
    """

    def __init__(self, trainer: Any, pooling: Pooling) -> None:
        self._trainer = trainer
        self._pooling = pooling
        self.restart()

    def restart(self) -> None:
        """For a new run."""
        self._reader: ReadAhead | None = None
        self._prepared: Prepared | None = None

    def reading(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """The batches of an epoch, from which the next step may be read early; what was read of another is dropped."""
        if self._reader is None or not self._reader.is_of(epoch_iterator):
            is_of_accelerate = isinstance(epoch_iterator, Generator)
            self._reader = ReadAhead(epoch_iterator) if is_of_accelerate and self._may_read() else None
        return epoch_iterator if self._reader is None else self._reader

    def prepare(self, budget: Budget, cost: Cost) -> None:
        """Prepares the step that comes after the one the trainer is at, if there is one and it may be read.

        An error of the data is raised when the step is read, and one of the collator when the step is padded again.
        """
        step, args = self._trainer.state.global_step + 1, self._trainer.args
        if self._reader is None or not self._may_read() or step >= self._trainer.state.max_steps:
            return
        batches = self._reader.read(args.gradient_accumulation_steps, self._has_ended)
        with suppress(Exception):
            if batches:
                self._prepared = self._pooling.prepared(batches, Basis(budget=budget, cost=cost, step=step))

    def take(self, batches: list[Any]) -> Prepared | None:
        """What was prepared of these batches, once; `None` if it was not, or of others."""
        prepared, self._prepared = self._prepared, None
        if prepared is None or not _are_the_same(prepared.batches, batches):
            return None
        return prepared

    def _may_read(self) -> bool:
        trainer = self._trainer
        is_left_alone = (
            compat.reads_a_stream(trainer)
            or trainer.accelerator.dataloader_config.dispatch_batches
            or draws_own_numbers(trainer.data_collator)
        )
        return trainer.args.device.type in HAVE_STREAMS and not is_left_alone

    def _has_ended(self) -> bool:
        """Whether the loader has given the last batch of the epoch."""
        return bool(self._trainer.accelerator.gradient_state.end_of_dataloader)


class ReadAhead(Iterator[Any]):
    """An iterator that can be read before its items are wanted; an error is raised when the item would be."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = weakref.ref(source)  # kept by the loop; workers of a loader end when it lets go
        self._read: deque[Any] = deque()
        self._error: Exception | None = None

    def is_of(self, source: Iterator[Any]) -> bool:
        """Whether it reads from this one."""
        return self._source() is source

    def read(self, count: int, has_ended: Callable[[], bool]) -> list[Any]:
        """The next items, at most `count`; no more are read once the source has ended."""
        while len(self._read) < count and self._error is None and not has_ended():
            try:
                self._read.append(self._next())
            except Exception as error:  # StopIteration, too
                self._error = error
        return list(self._read)[:count]

    def __next__(self) -> Any:
        if self._read:
            return self._read.popleft()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._next()

    def _next(self) -> Any:
        source = self._source()
        if source is None:
            raise StopIteration
        return next(source)


def _are_the_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))
