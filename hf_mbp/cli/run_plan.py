"""The steps of a run before it: which rows run together, with what padding, time and memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from hf_mbp.arrays import Ints
from hf_mbp.cli.plan_groups import Group, StepPlan, StepPlanner
from hf_mbp.cli.plan_memory import Estimator, MemoryModel, limit_bytes
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.shapes import row_sizes, set_up
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.collate import need_one_width
from hf_mbp.estimate import MemoryEstimate
from hf_mbp.plan import Budget, Cost
from hf_mbp.sizing import cost_of

MOST_STEPS = 500
"""Steps that are planned at most; with more, what is said of the run is said of these."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What would happen."""

    lengths: Ints
    num_steps: int
    steps: tuple[StepPlan, ...]
    budget: Budget
    cost: Cost
    memory: MemoryModel
    largest: tuple[Group, MemoryEstimate]
    largest_plain: tuple[Group, MemoryEstimate]

    def groups(self, *, plain: bool = False) -> list[Group]:
        """The micro-batches of all steps."""
        return [group for step in self.steps for group in (step.plain if plain else step.split)]

    def padding(self, *, plain: bool = False) -> float:
        """Share of the cells that are padding."""
        groups = self.groups(plain=plain)
        return 1 - sum(group.tokens for group in groups) / sum(group.cells for group in groups)

    def modelled_time(self, *, plain: bool = False) -> float:
        """By the cost model of the planner, in its unit."""
        groups = self.groups(plain=plain)
        rows, widths = np.array([group.rows for group in groups]), np.array([group.width for group in groups])
        return float(self.cost(rows, widths).sum())

    @property
    def speedup(self) -> float:
        """How much less time micro-batches are modelled to take than the plain Trainer's batches."""
        return self.modelled_time(plain=True) / self.modelled_time()


def plan_run(recipe: Recipe, device: torch.device) -> RunPlan:
    """Tokenize the recipe's rows, make its model without weights, and plan the steps of training.

    Which rows meet in a step is drawn at random: the padding is that of the run, the rows are others.

    Raises:
        UserError: data or model cannot be loaded, or the model does not fit the limit.
    """
    return plan_of(recipe, device, set_up(recipe))


def plan_of(recipe: Recipe, device: torch.device, setup: TaskSetup) -> RunPlan:
    """`plan_run` for a model without weights and rows that are there already."""
    sizes = row_sizes(recipe, setup)
    lengths = sizes.sum(axis=1)
    estimator = Estimator(recipe=recipe, setup=setup, device=device)
    fitted = estimator.memory_model(sizes[lengths.argmax()], limit_bytes(recipe, device))
    planner = StepPlanner(
        budget=_budget(recipe, fitted),
        cost=cost_of(setup.model, device),
        has_one_width=need_one_width(setup.train[0]),
        pools_batches=recipe.mbp.collate_in != "workers",
    )
    num_steps = _num_steps(recipe, len(lengths))
    steps = tuple(map(planner.step, _draw_steps(sizes, recipe, min(num_steps, MOST_STEPS))))
    largest = max((group for step in steps for group in step.split), key=fitted.peak)
    largest_plain = max((group for step in steps for group in step.plain), key=fitted.peak)
    return RunPlan(
        lengths=lengths,
        num_steps=num_steps,
        steps=steps,
        budget=planner.budget,
        cost=planner.cost,
        memory=fitted,
        largest=(largest, estimator.estimate(largest.rows, largest.widths)),
        largest_plain=(largest_plain, estimator.estimate(largest_plain.rows, largest_plain.widths)),
    )


def _budget(recipe: Recipe, fitted: MemoryModel) -> Budget:
    max_tokens = recipe.mbp.max_tokens_per_micro_batch
    if fitted.limit_bytes is None:
        return Budget(max_tokens=max_tokens)
    return replace(fitted.fit, max_tokens=max_tokens)


def _num_steps(recipe: Recipe, num_rows: int) -> int:
    train = recipe.train
    if train.max_steps > 0:
        return int(train.max_steps)
    batches = num_rows / (train.per_device_train_batch_size * train.world_size)
    batches = max(1, math.floor(batches) if train.dataloader_drop_last else math.ceil(batches))
    steps: float = train.num_train_epochs * math.ceil(batches / train.gradient_accumulation_steps)
    return math.ceil(steps)


def _draw_steps(sizes: Ints, recipe: Recipe, most: int) -> list[list[Ints]]:
    """Sizes of rows in random batches, those of each step; no more than an epoch has are needed to tell."""
    batch_size, accumulated = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    order = np.random.default_rng(recipe.train.seed).permutation(len(sizes))
    batches = [sizes[order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return [batches[start : start + accumulated] for start in range(0, len(batches), accumulated)][:most]
