"""Contestants: the ways to train that are compared. All step the same optimizer over the same rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from benchmarks.packing import train_packed, train_padding_free
from benchmarks.plain import train_equal_parts, train_token_batches, train_unpadded
from benchmarks.task import Stopwatch, Task
from benchmarks.with_trainer import WithTrainer, under_max_tokens, under_memory_limit
from benchmarks.workloads import Shape, Workload
from hf_mbp import MBPTrainer
from hf_mbp.byte_sizes import parse_memory_limit


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package that is tried: its module, and how it is installed."""

    module: str
    install: str

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return find_spec(self.module) is not None


MBP_PYTORCH = Package(module="mbp", install="pip install --no-deps mbp-pytorch==0.2.6")
ODB = Package(module="odb", install="pip install --no-deps online-dynamic-batching==0.1.2")
TRL = Package(module="trl", install="pip install trl==1.16.0")


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to train: `train(task, model, stopwatch)` warms up and trains `task.steps` steps.

    `family` says who it is by. `needs_batches`: with one batch a step it would do what `trainer` does, and is left out.
    `package`: what it tries. `is_for_language_models`: it can train nothing else.
    """

    name: str
    title: str
    family: str
    train: Callable[[Task, Any, Stopwatch], None]
    needs_batches: bool = False
    package: Package | None = None
    is_for_language_models: bool = False

    @property
    def is_installed(self) -> bool:
        """Whether the package is there that it needs."""
        return self.package is None or self.package.is_installed

    def takes_part(self, workload: Workload, shape: Shape) -> bool:
        """Whether there is something to measure."""
        return (shape.batches > 1 or not self.needs_batches) and (
            workload.is_language_model or not self.is_for_language_models
        )


def parse_headroom(text: str) -> int:
    """Bytes of `1GiB`; raises `ValueError` for anything that is no size."""
    size = parse_memory_limit(text)
    if not isinstance(size, int):
        raise ValueError(f"memory_limit={text!r} is a fraction; write a size such as 1GiB")
    return size


OURS, STOCK, OTHERS, GOAL = "ours", "stock", "others", "goal"

CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        Contestant(name="mbp", title="MBPTrainer", family=OURS, train=WithTrainer(trainer_class=MBPTrainer)),
        Contestant(
            name="mbp_max_tokens",
            title="MBPTrainer, max_tokens",
            family=OURS,
            train=WithTrainer(trainer_class=MBPTrainer, options=under_max_tokens),
        ),
        Contestant(
            name="mbp_memory_limit",
            title="MBPTrainer, memory_limit",
            family=OURS,
            train=WithTrainer(trainer_class=MBPTrainer, options=under_memory_limit),
        ),
        Contestant(name="trainer", title="Trainer", family=STOCK, train=WithTrainer()),
        Contestant(
            name="group_by_length",
            title="Trainer, group_by_length",
            family=STOCK,
            train=WithTrainer(arguments={"train_sampling_strategy": "group_by_length"}),
            needs_batches=True,
        ),
        Contestant(
            name="batch_rebalance",
            title="Trainer, batch_rebalance",
            family=STOCK,
            train=WithTrainer(arguments={"train_sampling_strategy": "batch_rebalance"}),
            needs_batches=True,
        ),
        Contestant(
            name="mbp_pytorch", title="mbp-pytorch", family=OTHERS, train=train_equal_parts, package=MBP_PYTORCH
        ),
        Contestant(
            name="online_dynamic_batching",
            title="online-dynamic-batching",
            family=OTHERS,
            train=train_token_batches,
            package=ODB,
        ),
        Contestant(
            name="trl_padding_free",
            title="TRL, padding-free",
            family=OTHERS,
            train=train_padding_free,
            package=TRL,
            is_for_language_models=True,
        ),
        Contestant(
            name="trl_packing",
            title="TRL, packing (other samples a step)",
            family=OTHERS,
            train=train_packed,
            package=TRL,
            is_for_language_models=True,
        ),
        Contestant(name="limit", title="nothing padded, plain PyTorch", family=GOAL, train=train_unpadded),
    )
}
"""In the order in which they run. `trainer` and `limit` are what the others are compared with."""

BASELINE, LIMIT = "trainer", "limit"
