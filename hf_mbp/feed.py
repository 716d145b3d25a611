"""Feeds a trainer: turns the batches of an optimizer step into micro-batches, knowing its model, data and options."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from hf_mbp import collate, compat, loaders, other_trainers, wrapped
from hf_mbp.accumulation import half_precision
from hf_mbp.balance import deal
from hf_mbp.collate import Batch, Inputs, Rows
from hf_mbp.distributed import Ranks
from hf_mbp.layout_choice import choose_layout
from hf_mbp.look_ahead import LookAhead
from hf_mbp.plan import Budget, too_long_message
from hf_mbp.pools import Basis, Pool, Pooling, Prepared
from hf_mbp.probe import modules_of
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.recovery import Fault
from hf_mbp.report import (
    StepReport,
    balance_note,
    compiled_note,
    half_precision_note,
    padded_rows_note,
    retry_line,
    start_line,
)
from hf_mbp.row_reader import RowReader
from hf_mbp.run_budget import RunBudget
from hf_mbp.run_cost import RunCost
from hf_mbp.sizing import cost_of
from hf_mbp.start_check import CHECKED_ROWS, FEWEST_COMPARED, StartCheck
from hf_mbp.step import MicroBatch, weigh
from hf_mbp.too_large import too_large_error
from hf_mbp.undisturbed import CollatorState, untouched


class Feed:
    """What stands between the data loader and the steps of one trainer."""

    def __init__(self, trainer: Any, rows: RowReader, ranks: Ranks, report: StepReport) -> None:
        self.trainer = trainer
        self.rows = rows
        self.ranks = ranks
        self.report = report
        self.budget = RunBudget(trainer, ranks, self._tell)
        self.cost = RunCost(trainer, ranks, self._tell)
        self.check = StartCheck(trainer, ranks)
        self._pooling = Pooling(trainer, rows, ranks)
        self.look_ahead = LookAhead(trainer, self._pooling)
        self._filler: MicroBatch | None = None
        self._left_over: list[Any] = []
        self._pools_of_step: list[Pool] = []
        self._prepared: Prepared | None = None
        self._ready_made: list[Inputs] = []
        self._collator = CollatorState()
        self._has_told: set[str] = set()
        self._balance_note: str | None = None
        self._is_balanced = False
        self.is_compiled = False

    def restart(self) -> None:
        """Forgets what was found out about the model, data and memory; a new run of training finds it out again."""
        self.budget.forget()
        self.cost.forget()
        self._filler = None
        self._left_over = []
        self._pooling.restart()
        self.look_ahead.restart()
        self.check.restart()
        self.rows.restart()
        self.is_compiled = wrapped.compiles(self.trainer.accelerator, self.trainer.model)
        self.report.restart()

    def balanced(self, loader: Any) -> Any:
        """The training loader, with rows dealt to ranks by their cost, where that is asked for and can be done.

        Batches that the workers pad are planned one by one, so they are dealt one by one.
        """
        trainer = self.trainer
        if self.ranks.count == 1 or not trainer.mbp_config.balance_ranks:
            return loader
        why_not = loaders.why_not_balanced(loader)
        if other_trainers.is_sentence_transformers(trainer):
            why_not = "losses of sentence-transformers compare the rows of a batch"
        self._balance_note = balance_note(self.ranks.count, why_not)
        if why_not is not None:
            return loader
        batches_dealt = 1 if self.rows.workers_collate else trainer.args.gradient_accumulation_steps
        self._is_balanced = True
        cost = cost_of(trainer.model, trainer.args.device)
        # A loss of the user's may have collectives in it, as those of TRL do.
        in_lockstep = wrapped.is_sharded(trainer) or compat.has_own_loss(trainer)
        dealing = partial(deal, cost=cost, in_lockstep=in_lockstep)
        return loaders.balanced(loader, dealing, batches_dealt, has_targets=self.rows.has_targets)

    def as_many_as_others(self, batches: list[Any]) -> list[Any]:
        """The batches that were read, and empty ones where other ranks have read more: all stop at the same step.

        Only ranks that read streams may differ.
        """
        if self.ranks.count == 1 or not compat.reads_a_stream(self.trainer):
            return batches
        return batches + [Rows([])] * (self.ranks.highest(len(batches)) - len(batches))

    def whole_step(self, batches: list[Any], num_batches: int) -> list[Any]:
        """The batches of a whole optimizer step; those of a step that the end of the data cuts short wait for the next.

        Stock does not step then, and adds their gradient to that of the next step.
        """
        self._left_over += batches
        if len(batches) < num_batches:
            return []
        whole, self._left_over = self._left_over, []
        return whole

    def micro_batches(self, batches: list[Any]) -> list[MicroBatch]:
        """The weighed micro-batches of an optimizer step, from what its data loader returned."""
        is_deferred = all(isinstance(batch, Batch) for batch in batches)
        self._collator = CollatorState(self.trainer.data_collator)
        self._ready_made = [] if is_deferred else [_inputs(batch) for batch in batches if not isinstance(batch, Batch)]
        self._prepared = self.look_ahead.take(batches)
        self._pools_of_step = self._pools(batches) if is_deferred else []
        with wrapped.eagerly(self.is_compiled):  # or what is tried on the side would use up dynamo's recompilations
            return self._weighed(self._first_plan() if is_deferred else self._as_they_are())

    def _pools(self, batches: list[Any]) -> list[Pool]:
        return self._pooling.pools(batches) if self._prepared is None else self._prepared.pools

    def prepare_next(self) -> None:
        """What can be done for the next step before this one is over; once budget and cost are settled.

        Batches of a loader of the user's own need neither, and are left alone.
        """
        budget = self.budget.settled
        if budget is not None and self.cost.is_final:
            with wrapped.eagerly(self.is_compiled):
                self.look_ahead.prepare(budget, self.cost.of_step())

    def plan_again(self, faults: list[Fault]) -> list[MicroBatch]:
        """The weighed micro-batches of the same step, after memory ran out.

        Raises:
            MemoryError: for a single row, which cannot take less.
        """
        if hopeless := [fault for fault in faults if self._is_hopeless(fault)]:
            raise self._too_large(hopeless)
        for fault in faults:
            self._make_room(fault)
        self.report.retry()
        self._collator.put_back()
        with wrapped.eagerly(self.is_compiled):
            micro_batches = self._plan() if self._pools_of_step else self._as_they_are()
            self._tell(retry_line(self.trainer.state.global_step + 1, faults, micro_batches))
            return self._weighed(micro_batches)

    def _is_hopeless(self, fault: Fault) -> bool:
        return fault.is_hopeless(can_checkpoint=compat.can_checkpoint(self.trainer.model))

    def _make_room(self, fault: Fault) -> None:
        if fault.can_be_checkpointed(can_checkpoint=compat.can_checkpoint(self.trainer.model)):
            self.budget.checkpoint_from(fault.width)
        elif fault.rows > 1 and self._pools_of_step:
            self.budget.shrink(fault.rows, fault.width)
        self._ready_made = [part for inputs in self._ready_made for part in self._parts_of(inputs, fault)]

    def _parts_of(self, inputs: Inputs, fault: Fault) -> list[Inputs]:
        """Halves of a ready-made batch that is as large as one that did not fit."""
        num_rows, each = collate.num_rows_of(inputs), other_trainers.rows_each(self.trainer)
        count = num_rows // each
        is_small = self._cells(inputs) < fault.rows * fault.width
        if is_small or count < 2 or not collate.has_entry_for_each_row(inputs, num_rows):
            return [inputs]
        halves = [range(count // 2), range(count // 2, count)]
        return [collate.select_rows(inputs, collate.rows_of_examples(half, count, each)) for half in halves]

    def _too_large(self, faults: list[Fault]) -> MemoryError:
        own = next((fault for fault in faults if fault.reason), faults[0])
        budget = self.budget.settled
        need = float(budget.bytes(1, own.width)) if budget is not None and budget.max_bytes is not None else None
        return too_large_error(self.trainer, own, need, compat.save_checkpoint(self.trainer))

    # From rows to micro-batches

    def _first_plan(self) -> list[MicroBatch]:
        """The plan of a step, and before the first one what has to be found out for it, and said about it."""
        pools = self._pools_of_step
        largest = max(pools, key=lambda pool: pool.longest)
        is_first_step = not self.cost.is_settled
        if is_first_step and wrapped.is_sharded(self.trainer):
            self.rows.find_out_together(pools[0].rows)
        layout_note = self._choose_layout(self._enough_to_check(largest)) if is_first_step else ""
        budget = self.budget.settle(largest.rows, largest.sizes)
        max_tokens = self._warn_of_long_rows(budget, largest.longest)
        due = [self._enough_to_check(pool) for pool in pools if self.check.is_due(pool.rows[0])]
        checks = [self.check.run(pool.rows, pool.sizes, budget) for pool in due]
        micro_batches = self._plan()
        if is_first_step:
            batch_sizes = [sizes for pool in pools for sizes in pool.batch_sizes]
            num_rows = sum(map(len, batch_sizes))
            said = " ".join(filter(None, [layout_note, checks[0]]))
            budget_told, num_ranks = self.budget.describe(max_tokens), self.ranks.count
            self._tell(start_line(num_rows, micro_batches, batch_sizes, budget_told, said, num_ranks=num_ranks))
            self._tell(self._balance_note)
            self._tell(None if self.rows.multiple_of else padded_rows_note(micro_batches, batch_sizes))
            self._tell(compiled_note() if self.is_compiled else None)
            self._tell(half_precision_note(self._dtypes_summed_in_half(), len(micro_batches)))
        if (note := self.report.slow_collation_note()) and self._is_first("slow collation"):
            self._tell(note)
        if self.rows.why_padded and self._is_first("padded after all"):
            self._tell(f"hf_mbp: some micro-batches are padded all the same, because {self.rows.why_padded}.")
        return micro_batches

    def _choose_layout(self, pool: Pool) -> str:
        """Settles how the rows of this run are laid; says how."""
        choice = choose_layout(self.trainer, self.ranks, pool.rows, pool.sizes)
        self.rows.layout = choice.layout
        return choice.note

    def _plan(self) -> list[MicroBatch]:
        """The rows of the step in micro-batches, within the budget that is now."""
        pools = self._pools_of_step
        largest = max(pools, key=lambda pool: pool.longest)
        budget = self.budget.settle(largest.rows, largest.sizes)
        basis = Basis(budget=budget, cost=self.cost.of_step(), step=self.trainer.state.global_step)
        planned = self._pooling.micro_batches(pools, basis, self._prepared)
        batch_sizes = [sizes for pool in pools for sizes in pool.batch_sizes]
        self.report.plan_step(planned, batch_sizes, budget.tokens_at(largest.longest))
        micro_batches = [self._checkpointed(micro_batch) for micro_batch in planned]
        self.budget.planned(micro_batches)
        return micro_batches

    def _checkpointed(self, micro_batch: MicroBatch) -> MicroBatch:
        is_checkpointed = self.budget.is_checkpointed(micro_batch.num_rows, micro_batch.cells)
        return replace(micro_batch, is_checkpointed=is_checkpointed)

    def _as_they_are(self) -> list[MicroBatch]:
        """The batches of the user's own loader, each a micro-batch."""
        micro_batches = [self._checkpointed(self._whole(inputs)) for inputs in self._ready_made]
        self.report.plan_step(micro_batches, [], 0)
        return micro_batches

    def _enough_to_check(self, pool: Pool) -> Pool:
        """The pool; with the first rows of the data where dealing by cost has left this rank too few to compare."""
        if len(pool.rows) >= FEWEST_COMPARED or not self._is_balanced:
            return pool
        with own_random_numbers(modules_of(self.trainer)), untouched(self.trainer):
            return self._pooling.pool([pool.rows, self.rows.sample(CHECKED_ROWS)])

    def _dtypes_summed_in_half(self) -> list[str]:
        """Names of the half-precision dtypes in which gradients are summed; sharded models have rules of their own."""
        if self.trainer.mbp_config.accumulate_in_fp32 or wrapped.is_sharded(self.trainer):
            return []
        half = half_precision(p for p in self.trainer.model.parameters() if p.requires_grad)
        return sorted({str(parameter.dtype).removeprefix("torch.") for parameter in half})

    def _tell(self, note: str | None) -> None:
        """Prints a note, above the progress bar, on the first process."""
        if note and self.trainer.is_world_process_zero():
            tqdm.write(note)

    def _is_first(self, topic: str) -> bool:
        """Whether this is asked about a topic for the first time; readers want to hear of each once."""
        is_first = topic not in self._has_told
        self._has_told.add(topic)
        return is_first

    def _whole(self, inputs: Inputs) -> MicroBatch:
        cells = self._cells(inputs)
        return MicroBatch(
            inputs=inputs,
            num_rows=collate.num_rows_of(inputs),
            num_items=self.rows.num_items(dict(inputs)),
            cells=cells,
            tokens=cells,
        )

    def _cells(self, inputs: Inputs) -> int:
        return self.rows.num_cells(inputs) or collate.num_rows_of(inputs)

    def _weighed(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        weighed = weigh(micro_batches, self.ranks, self._filler)
        is_idle = all(micro_batch.is_idle for micro_batch in weighed)
        if is_idle and self._is_first("no items"):
            warnings.warn(
                f"Step {self.trainer.state.global_step + 1} has nothing to learn from, all its labels are -100: it "
                "leaves the weights as they are. Check the labels, and whether truncation cuts off what is to be "
                "learned.",
                stacklevel=2,
            )
        learning = [micro_batch for micro_batch in weighed if micro_batch.num_items > 0]
        if learning and self.ranks.count > 1:
            self._filler = learning[-1]
        return weighed

    def _warn_of_long_rows(self, budget: Budget, longest: int) -> int:
        """Cells that micro-batches of the longest rows may have; warns, once, if one row has more."""
        max_tokens = budget.tokens_at(longest)
        if not budget.fits(1, longest) and not self.budget.is_lowered and self._is_first("long row"):
            warnings.warn(too_long_message(longest, max_tokens), stacklevel=2)
        return max_tokens


def _inputs(batch: Any) -> Inputs:
    """A batch of the user's own loader."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"get_train_dataloader returned a batch of type {type(batch).__name__}: a batch must be a dictionary of "
            "the model's inputs. Return one from your collator, or build on super().get_train_dataloader()."
        )
    return dict(batch)
