"""Feeds a trainer: turns the batches of an optimizer step into micro-batches, knowing its model, data and options."""

import warnings
from collections.abc import Mapping
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_mbp import collate, compat, equivalence, memory, other_trainers, probe
from hf_mbp.accumulation import half_precision
from hf_mbp.collate import Batch, Inputs, KeepRows
from hf_mbp.distributed import Ranks
from hf_mbp.equivalence import NothingToCompareError
from hf_mbp.items import checked_count
from hf_mbp.plan import Budget, Cost, Ints, as_sizes, round_up, too_long_message
from hf_mbp.precollated import CollatedRow, CollateInWorkers, cut_out
from hf_mbp.probe import LossFunction, LossTraits
from hf_mbp.report import StepReport, compiled_note, half_precision_note, padded_rows_note, start_line
from hf_mbp.run_budget import RunBudget
from hf_mbp.sizing import cost_of
from hf_mbp.step import MicroBatch, RowFunctions, split_mini_batch, weigh

CHECKED_ROWS = 8
"""Rows of the first step that exactness is checked on, the shortest: enough for uneven micro-batches, and cheap."""


class Feed:
    """What stands between the data loader and the steps of one trainer."""

    def __init__(self, trainer: Any, ranks: Ranks, report: StepReport) -> None:
        self.trainer = trainer
        self.ranks = ranks
        self.report = report
        self.budget = RunBudget(trainer, ranks)
        self._cost: Cost | None = None
        self._traits = LossTraits()
        self._filler: MicroBatch | None = None
        self._left_over: list[Any] = []
        self._checked: set[Any] = set()
        self._has_told: set[str] = set()
        self.is_compiled = False

    def restart(self) -> None:
        """Forgets what was found out about the model, data and memory; a new run of training finds it out again."""
        self.budget.forget()
        self._cost, self._filler = None, None
        self._left_over = []
        self._checked = set()
        self._traits = LossTraits()
        self.is_compiled = compat.compiles(self.trainer.accelerator, self.trainer.model)
        self.report.restart()

    def whole_step(self, batches: list[Any], num_batches: int) -> list[Any]:
        """The batches of a whole optimizer step; those of a step that the end of the data cuts short wait for the next.

        Stock does not step then, and adds their gradient to that of the next step.
        """
        self._left_over += batches
        if len(batches) < num_batches and self.ranks.count == 1:
            return []
        whole, self._left_over = self._left_over, []
        return whole

    def micro_batches(self, batches: list[Any]) -> list[MicroBatch]:
        """The weighed micro-batches of an optimizer step, from what its data loader returned."""
        if all(isinstance(batch, Batch) for batch in batches):
            with compat.eagerly(self.is_compiled):  # or what is tried on the side would use up dynamo's recompilations
                return self._weighed(self._split([batch.unpack() for batch in batches]))
        micro_batches = [self._ready_made(batch) for batch in batches]
        self.report.add_step(micro_batches, [], 0)
        return self._weighed(micro_batches)

    def loader_collator(self) -> KeepRows:
        """What the training loader has in place of the user's collator."""
        collator = self.trainer.data_collator
        if self.trainer.mbp_config.collate_in == "workers" or other_trainers.is_sentence_transformers(self.trainer):
            return CollateInWorkers(collator)
        return KeepRows(collator)

    # Questions about rows and inputs

    def sizes(self, rows: list[Any]) -> Ints:
        """Lengths of rows, `[rows, parts]`, as the collator will pad them; two parts for an encoder-decoder."""
        return round_up(as_sizes([self._parts(row) for row in rows]), self._multiple_of())

    def _parts(self, row: Any) -> tuple[int, ...]:
        if isinstance(row, CollatedRow):
            parts = row.parts or (self.trainer.row_length(row.fields()),)
            return (*parts, row.num_targets) if self._has_targets() else parts
        length = self.trainer.row_length(row)
        return (length, collate.target_length(row)) if self._has_targets() else (length,)

    def _multiple_of(self) -> int | None:
        return getattr(self.trainer.data_collator, "pad_to_multiple_of", None)

    def collate(self, groups: list[list[Any]], *, keep_width: bool = False) -> list[Inputs]:
        """Each group of rows, padded by the user's collator; all to one width where the loss needs that.

        Rows that were collated in the workers lose the padding that none of their group needs, unless `keep_width`.
        """
        if isinstance(groups[0][0], CollatedRow):
            return [self._settled(self._cut_out(group, keep_width=keep_width)) for group in groups]
        with self.report.collation():
            collated = collate.collated(self.trainer.data_collator, groups)
        return [self._settled(inputs) for inputs in collated]

    def _cut_out(self, rows: list[CollatedRow], *, keep_width: bool) -> Inputs:
        return cut_out(
            rows,
            has_targets=self._has_targets(),
            multiple_of=self._multiple_of() or 1,
            keep_width=keep_width or _need_one_width(rows),
        )

    def sample(self, num_rows: int) -> list[Any]:
        """The first rows of the training data, as the collator gets them.

        Raises:
            ValueError: the user's own loader pads its batches itself.
        """
        loader = self.trainer.get_train_dataloader()
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            rows = list(islice(loader.dataset, num_rows))
        else:
            rows = [loader.dataset[index] for index in range(min(num_rows, len(loader.dataset)))]
        batch = loader.collate_fn([row for row in rows if _is_alike(row, rows[0])])
        if not isinstance(batch, Batch):
            raise ValueError(
                "get_train_dataloader is overridden and returns ready-made batches, which are never split. To have "
                "them split, leave it as it is, or build on super().get_train_dataloader()."
            )
        return batch.unpack()

    def shifts_labels(self, inputs: Inputs) -> bool:
        """Whether the loss predicts the next token, so that the first label of a row is no item; found by trying."""
        return self._traits.shifts_labels(*self._loss_and_modules(), inputs)

    def _settled(self, inputs: Inputs) -> Inputs:
        return self._traits.settled(*self._loss_and_modules(), inputs)

    def _loss_and_modules(self) -> tuple[LossFunction, list[torch.nn.Module]]:
        return partial(probe.loss_of, self.trainer), probe.modules_of(self.trainer)

    def num_items(self, inputs: Inputs) -> float:
        """What the trainer's `num_items` says, which users may override.

        Raises:
            ValueError: it is not a number of items.
        """
        return checked_count(self.trainer.num_items(inputs))

    def _has_targets(self) -> bool:
        return bool(getattr(getattr(self.trainer.model, "config", None), "is_encoder_decoder", False))

    def _num_cells(self, inputs: Mapping[str, Any]) -> int | None:
        return collate.count_cells(inputs, with_targets=self._has_targets())

    # From rows to micro-batches

    def _split(self, batches: list[list[Any]]) -> list[MicroBatch]:
        batch_sizes = [self.sizes(batch) for batch in batches]
        pools = _pools(batches, batch_sizes)
        rows, sizes = max(pools, key=lambda pool: _longest(pool[1]))
        budget = self.budget.settle(rows, sizes)
        max_tokens = self._warn_of_long_rows(budget, _longest(sizes))
        is_first_step, cost = self._cost is None, self._cost_of_model()
        checks = [self._check(pool_rows) for pool_rows, _ in pools if self._is_unchecked(pool_rows[0])]
        functions = RowFunctions(collate=self.collate, num_items=self.num_items, num_cells=self._num_cells)
        split = partial(split_mini_batch, budget=budget, cost=cost, functions=functions, ranks=self.ranks)
        with collate.seeded(self.trainer.args.seed, self.trainer.state.global_step, self.trainer.args.process_index):
            micro_batches = [micro_batch for pool in pools for micro_batch in split(*pool)]
        self.report.add_step(micro_batches, batch_sizes, max_tokens)
        if is_first_step:
            num_rows = sum(map(len, batches))
            self._tell(start_line(num_rows, micro_batches, batch_sizes, _describe(budget, max_tokens), checks[0]))
            self._tell(None if self._multiple_of() else padded_rows_note(micro_batches, batch_sizes))
            self._tell(compiled_note() if self.is_compiled else None)
            self._tell(half_precision_note(self._dtypes_summed_in_half(), len(micro_batches)))
        if (note := self.report.slow_collation_note()) and self._is_first("slow collation"):
            self._tell(note)
        return micro_batches

    def _dtypes_summed_in_half(self) -> list[str]:
        """Names of the half-precision dtypes in which gradients are summed; sharded models have rules of their own."""
        if self.trainer.mbp_config.accumulate_in_fp32 or compat.is_sharded(self.trainer):
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

    def _ready_made(self, batch: Any) -> MicroBatch:
        """A batch of the user's own loader: one micro-batch, as it is."""
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"get_train_dataloader returned a batch of type {type(batch).__name__}: a batch must be a dictionary "
                "of the model's inputs. Return one from your collator, or build on super().get_train_dataloader()."
            )
        cells = self._num_cells(batch) or collate.num_rows_of(batch)
        return MicroBatch(
            inputs=dict(batch),
            num_rows=collate.num_rows_of(batch),
            num_items=self.num_items(dict(batch)),
            cells=cells,
            tokens=cells,
        )

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
        if not is_idle and self.ranks.count > 1:
            self._filler = weighed[-1]
        return weighed

    def _warn_of_long_rows(self, budget: Budget, longest: int) -> int:
        """Cells that micro-batches of the longest rows may have; warns, once, if one row has more."""
        max_tokens = budget.tokens_at(longest)
        if not budget.fits(1, longest) and self._is_first("long row"):
            warnings.warn(too_long_message(longest, max_tokens), stacklevel=2)
        return max_tokens

    # Before the first step

    def _cost_of_model(self) -> Cost:
        if self._cost is None:
            self._cost = cost_of(self.trainer.model, self.trainer.args.device)
        return self._cost

    def _is_unchecked(self, row: Any) -> bool:
        """Whether no rank has seen a row of this kind: each data set of sentence-transformers has a loss of its own."""
        kind: Any = None
        if other_trainers.is_sentence_transformers(self.trainer) and isinstance(row, CollatedRow):
            kind = (row.batch.inputs.get("dataset_name"), *sorted(row.batch.inputs))
        is_new: bool = kind not in self._checked
        self._checked.add(kind)
        return is_new if kind is None else bool(self.ranks.highest(is_new))

    def _check(self, rows: list[Any]) -> str:
        """Runs the equivalence check on rows of the first step; says how it went."""
        if not self.trainer.mbp_config.check_at_start:
            return "Exactness was not checked (check_at_start=False)."
        if compat.is_sharded(self.trainer):
            return "Exactness was not checked: the model is sharded over the ranks."
        report, outcome = None, ""
        try:
            report = equivalence.compare(self.trainer, rows, num_rows=CHECKED_ROWS)
        except NothingToCompareError as nothing:
            outcome = f"Exactness was not checked: {nothing}"
        is_exact = all(exact for (exact,) in self.ranks.gather(report is None or report.is_exact))
        is_refused = other_trainers.is_sentence_transformers(self.trainer)
        equivalence.settle(report, is_exact, "error" if is_refused else self.trainer.mbp_config.on_inexact)
        if report is None:
            return outcome
        verdict = "Checked to be exact" if is_exact else "NOT exact"
        if is_exact and report.tolerance == equivalence.HALF_PRECISION_TOLERANCE:
            verdict = "Checked as far as half precision can tell"
        return f"{verdict}: split and whole gradient differ by {report.max_relative_error:.1g}."


def _pools(batches: list[list[Any]], batch_sizes: list[Ints]) -> list[tuple[list[Any], Ints]]:
    """Rows that are planned together, and their sizes: those of all batches; padded ones with those of their batch."""
    pools = [(list(chain.from_iterable(batches)), np.concatenate(batch_sizes))]
    if isinstance(batches[0][0], CollatedRow):
        pools = [(rows, sizes.copy()) for rows, sizes in zip(batches, batch_sizes, strict=True)]
    for rows, sizes in pools:
        if _need_one_width(rows):
            sizes[:] = sizes.max(axis=0)
    return pools


def _is_alike(row: Any, other: Any) -> bool:
    """Whether two rows come from one data set, where a trainer of sentence-transformers has several."""
    if not isinstance(row, Mapping):
        return True
    return bool(row.keys() == other.keys() and row.get("dataset_name") == other.get("dataset_name"))


def _longest(sizes: Ints) -> int:
    return int(sizes.sum(axis=1).max())


def _need_one_width(rows: list[Any]) -> bool:
    first = rows[0]
    return collate.need_one_width(first.batch.inputs if isinstance(first, CollatedRow) else first)


def _describe(budget: Budget, max_tokens: int) -> str:
    if budget.max_bytes is None:
        return f"at most {max_tokens:,} tokens each, as asked"
    return f"at most {max_tokens:,} tokens each, sized for {memory.format_bytes(budget.max_bytes)} of activations"
