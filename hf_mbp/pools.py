"""The rows of an optimizer step on one rank: pooled, planned, and padded into micro-batches."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from hf_mbp import compat
from hf_mbp.arrays import Ints
from hf_mbp.distributed import Ranks
from hf_mbp.plan import Budget, Cost, planned_groups
from hf_mbp.random_numbers import seeded
from hf_mbp.row_reader import RowReader, need_one_width
from hf_mbp.step import Groups, MicroBatch, RowFunctions, agreed_groups, as_filler, collate_groups
from hf_mbp.undisturbed import CollatorState


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Rows that are planned together.

    `sizes` are theirs, `[rows, parts]`, and `batch_sizes` those of the batches they were read in, to compare with.
    """

    rows: list[Any]
    sizes: Ints
    batch_sizes: list[Ints]

    @property
    def is_borrowed(self) -> bool:
        """Whether this rank had no rows to read, and has to take part with one that adds nothing."""
        return not self.batch_sizes

    @property
    def longest(self) -> int:
        """Cells of the longest row."""
        return int(self.sizes.sum(axis=1).max())


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What rows are planned and padded with: budget, cost, and the step that random numbers of collators belong to."""

    budget: Budget
    cost: Cost
    step: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A step that was planned by this rank alone, and padded, before its time.

    The collator is as it was `before`; padding has left it in the state `after`.
    """

    batches: list[Any]
    pools: list[Pool]
    basis: Basis
    plans: list[Groups]
    micro_batches: list[MicroBatch]
    before: CollatorState
    after: CollatorState


class Pooling:
    """Makes micro-batches of the rows of one trainer, on one rank of those that train together."""

    def __init__(self, trainer: Any, rows: RowReader, ranks: Ranks) -> None:
        self._trainer = trainer
        self._rows = rows
        self._ranks = ranks
        self.restart()

    def restart(self) -> None:
        """For a new run."""
        self._spare: list[Any] = []

    def pools(self, batches: list[Any]) -> list[Pool]:
        """Pools of the rows of all batches together; of each batch by itself, where the workers have padded it."""
        unpacked = [batch.unpack() for batch in batches]
        groups = [[rows] for rows in unpacked] if self._rows.workers_collate else [unpacked]
        pools = [self.pool([rows for rows in group if rows]) for group in groups]
        last = pools[-1]
        if not last.is_borrowed:
            self._spare = [last.rows[int(last.sizes.sum(axis=1).argmin())]]
        return pools

    def pool(self, batches: list[list[Any]]) -> Pool:
        """One of the rows of some batches, or of a borrowed row if there are none."""
        rows = list(chain.from_iterable(batches)) or self._spare_row()
        sizes = self._rows.sizes(rows)
        batch_sizes = np.split(sizes, np.cumsum([len(batch) for batch in batches])[:-1]) if batches else []
        if need_one_width(rows):
            sizes = np.broadcast_to(sizes.max(axis=0), sizes.shape)
        return Pool(rows=rows, sizes=sizes, batch_sizes=batch_sizes)

    def _spare_row(self) -> list[Any]:
        """A row to take part with, where this rank has none and others have."""
        with compat.kept_loaders(self._trainer.accelerator):
            row = self._spare or self._rows.sample(1)
        if row:
            return row
        raise ValueError(
            f"Process {self._trainer.args.process_index} has no training data at all: its share is empty. Start fewer "
            "processes, or let the first one read for all: accelerator_config={'dispatch_batches': True}."
        )

    def micro_batches(self, pools: list[Pool], basis: Basis, prepared: Prepared | None = None) -> list[MicroBatch]:
        """All rows of the pools, the longest of each first; to be called by all ranks, which agree on their numbers.

        What was `prepared` is taken where it is what would be made now.
        """
        if prepared is not None and not self._still_holds(prepared, basis):
            prepared = None
        own = [self._plan(pool, basis) for pool in pools] if prepared is None else prepared.plans
        plans = [self._agreed(pool, plan, basis) for pool, plan in zip(pools, own, strict=True)]
        if prepared is None or plans != prepared.plans:
            return self._padded(pools, plans, basis)
        prepared.after.put_back()
        return prepared.micro_batches

    def prepared(self, batches: list[Any], basis: Basis) -> Prepared:
        """A step that is still to come, as this rank would run it alone; waits for no other rank, and leaves the
        collator as it is."""
        pools = self.pools(batches)
        plans = [self._plan(pool, basis) for pool in pools]
        before = CollatorState(self._trainer.data_collator)
        try:
            micro_batches = self._padded(pools, plans, basis)
            after = CollatorState(self._trainer.data_collator)
        finally:
            before.put_back()
        return Prepared(
            batches=batches,
            pools=pools,
            basis=basis,
            plans=plans,
            micro_batches=micro_batches,
            before=before,
            after=after,
        )

    def _still_holds(self, prepared: Prepared, basis: Basis) -> bool:
        return prepared.basis == basis and prepared.before.is_of(self._trainer.data_collator)

    def _plan(self, pool: Pool, basis: Basis) -> Groups:
        return planned_groups(self._rows.layout, pool.sizes, basis.budget, basis.cost)

    def _agreed(self, pool: Pool, own: Groups, basis: Basis) -> Groups:
        layout, budget, cost = self._rows.layout, basis.budget, basis.cost
        return agreed_groups(own, pool.sizes, layout=layout, budget=budget, cost=cost, ranks=self._ranks)

    def _padded(self, pools: list[Pool], plans: list[Groups], basis: Basis) -> list[MicroBatch]:
        args = self._trainer.args
        with seeded(args.seed, basis.step, args.process_index):
            padded = [self._collated(pool, plan, basis.budget) for pool, plan in zip(pools, plans, strict=True)]
        return list(chain.from_iterable(padded))

    def _collated(self, pool: Pool, plan: Groups, budget: Budget) -> list[MicroBatch]:
        functions = RowFunctions(
            collate=self._rows.collate_arranged,
            num_items=self._rows.num_items,
            num_cells=self._rows.num_cells,
            layout=self._rows.layout,
        )
        micro_batches = collate_groups(pool.rows, pool.sizes, plan, budget, functions)
        return [as_filler(micro_batch) for micro_batch in micro_batches] if pool.is_borrowed else micro_batches
