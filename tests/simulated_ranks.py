"""Several ranks in one process, one after the other: each runs until it has to wait for the others.

Real processes take seconds to start; the tests in `distributed` have them. Here a run with any number of ranks takes a
fraction of a second, and goes the same way every time: only one thread runs at once, and a collective is where the next
one takes over.
"""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from transformers import Trainer, TrainerCallback

from hf_mbp import MBPMixin

Result = TypeVar("Result")


class World:
    """So many ranks, whose collectives meet here."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._said: dict[int, Any] = {}
        self._heard: dict[int, Any] = {}
        self._turn = 0
        self._is_done: set[int] = set()
        self._is_over = False
        self._changed = threading.Condition()

    def run(self, rank: Callable[[int], Result]) -> list[Result]:
        """What `rank` returns for each index; the first exception of any of them, if there is one."""
        results: dict[int, Result] = {}
        errors: list[BaseException] = []

        def one(index: int) -> None:
            try:
                self._wait_for_turn(index)
                results[index] = rank(index)
            except BaseException as error:  # of a thread, which would only print it
                errors.append(error)
                self._is_over = True
            self._is_done.add(index)
            self._pass_on(index)

        threads = [threading.Thread(target=one, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[index] for index in range(self.count)]

    def exchange(self, index: int, said: Any) -> list[Any]:
        """What every rank says at this place; to be called by all, like a collective."""
        assert not self._is_done, f"rank {index} waits for ranks {self._is_done}, which are done"
        self._said[index] = said
        if len(self._said) == self.count:
            everything = [self._said[rank] for rank in range(self.count)]
            self._heard, self._said = dict.fromkeys(range(self.count), everything), {}
        self._pass_on(index)
        self._wait_for_turn(index)
        return list(self._heard.pop(index))

    def _pass_on(self, index: int) -> None:
        with self._changed:
            self._turn = (index + 1) % self.count
            self._changed.notify_all()

    def _wait_for_turn(self, index: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._turn == index or self._is_over)
        if self._is_over:
            raise AssertionError("another rank has failed")


class OneOfRanks(Accelerator):
    """An accelerator that takes itself for one of the ranks of a world."""

    world: World
    index: int

    num_processes = property(lambda self: self.world.count)
    process_index = property(lambda self: self.index)

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.world.exchange(self.index, tensor))


class OnRank(Trainer):
    """A trainer on one of the ranks; its gradients stay its own."""

    def __init__(self, *args: Any, world: World, index: int, **kwargs: Any) -> None:
        self._place = world, index
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = OneOfRanks
        self.accelerator.world, self.accelerator.index = self._place


class MBPOnRank(MBPMixin, OnRank):
    """The same with micro-batches."""


class AverageGradients(TrainerCallback):
    """Puts the mean over the ranks in the place of each gradient before a step, as DDP does."""

    def __init__(self, world: World, index: int) -> None:
        self.world, self.index = world, index

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        of_all = self.world.exchange(self.index, own)
        assert all(gradients.keys() == own.keys() for gradients in of_all), "some ranks have gradients, others none"
        for name, parameter in model.named_parameters():
            if name in own:
                parameter.grad = sum(gradients[name] for gradients in of_all) / self.world.count
