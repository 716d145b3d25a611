"""The rows of a step in micro-batches, as the trainer groups them, beside the batches of the plain one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hf_mbp.arrays import Ints
from hf_mbp.plan import Budget, Cost, plan_rows


@dataclass(frozen=True, kw_only=True)
class Group:
    """A micro-batch: the lengths of its rows, the longest first, and what they are padded to.

    A row of an encoder-decoder has two parts, source and target, each with a width of its own; its length is the sum.
    """

    lengths: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(cls, sizes: Ints, padded: Ints | None = None) -> Group:
        """Rows of `sizes`, `[rows, parts]`, padded to the longest of them, or of their `padded` sizes."""
        widths = (sizes if padded is None else padded).max(axis=0)
        return cls(lengths=tuple(sorted(sizes.sum(axis=1).tolist(), reverse=True)), widths=tuple(widths.tolist()))

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """What the rows are padded to, all parts together."""
        return sum(self.widths)

    @property
    def cells(self) -> int:
        """Padded tokens."""
        return self.rows * self.width

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The rows of one optimizer step, as micro-batches and as the plain Trainer has them: in the batches read."""

    split: tuple[Group, ...]
    plain: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class StepPlanner:
    """Groups the rows of a step as the trainer does.

    With `has_one_width` all micro-batches of a mini-batch are as wide as its longest row: the loss is over padding,
    too (see `hf_mbp.collate.need_one_width`). With `pools_batches` the rows of all batches of a step are one pool;
    where the workers pad, each batch stays by itself.
    """

    budget: Budget
    cost: Cost
    has_one_width: bool
    pools_batches: bool

    def step(self, batches: list[Ints]) -> StepPlan:
        """Plan a step for the sizes of its rows, `[rows, parts]` for each batch that is read."""
        pools = [np.concatenate(batches)] if self.pools_batches else batches
        return StepPlan(
            split=tuple(group for pool in pools for group in self._micro_batches(pool)),
            plain=tuple(map(Group.of, batches)),
        )

    def _micro_batches(self, sizes: Ints) -> list[Group]:
        padded = np.broadcast_to(sizes.max(axis=0), sizes.shape) if self.has_one_width else sizes
        return [Group.of(sizes[rows], padded[rows]) for rows in plan_rows(padded, self.budget, self.cost)]
