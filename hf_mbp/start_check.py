"""The check before the first step: on which rows it runs, on all ranks alike, and how it went."""

from typing import Any

import numpy as np

from hf_mbp import equivalence, other_trainers, wrapped
from hf_mbp.arrays import Ints
from hf_mbp.comparison import NothingToCompareError
from hf_mbp.distributed import Ranks
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory
from hf_mbp.plan import Budget
from hf_mbp.precollated import CollatedRow

CHECKED_ROWS = 8
"""Rows of the first step that exactness is checked on, the shortest: enough for uneven micro-batches, and cheap."""

FEWEST_COMPARED = 4
"""Rows that can be compared with any model: two groups, of two rows each where batch normalisation needs a variance."""


class StartCheck:
    """The check of one trainer's run; `outcome` says how it went, in words, once it has run."""

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._checked: set[Any] = set()
        self.outcome: str | None = None

    def restart(self) -> None:
        """For a new run."""
        self._checked = set()
        self.outcome = None

    def is_due(self, row: Any) -> bool:
        """Whether no rank has seen a row of this kind: each data set of sentence-transformers has a loss of its own."""
        kind: Any = None
        if other_trainers.is_sentence_transformers(self._trainer) and isinstance(row, CollatedRow):
            kind = (row.batch.inputs.get("dataset_name"), *sorted(row.batch.inputs))
        is_new: bool = kind not in self._checked
        self._checked.add(kind)
        return is_new if kind is None else bool(self._ranks.highest(is_new))

    def run(self, rows: list[Any], sizes: Ints, budget: Budget) -> str:
        """Runs it on short ones of `rows`, which have `sizes` `[rows, parts]`; says how it went."""
        self.outcome = self._run(rows, sizes, budget)
        return self.outcome

    def _run(self, rows: list[Any], sizes: Ints, budget: Budget) -> str:
        if not self._trainer.mbp_config.check_at_start:
            return "Exactness was not checked (check_at_start=False)."
        if wrapped.is_sharded(self._trainer) and not wrapped.is_fsdp2(self._trainer):
            return (
                "Exactness was not checked: a model that DeepSpeed runs, or that was sharded when loaded, cannot be "
                "tried. Run hf-mbp check, or check_equivalence(trainer), once in one process."
            )
        report, outcome = None, ""
        try:
            report = self._compare(rows, sizes, budget)
        except NothingToCompareError as nothing:
            outcome = f"Exactness was not checked: {nothing}"
        except Exception as error:
            if not is_out_of_memory(error) or wrapped.is_fsdp2(self._trainer):  # whose ranks compare in lockstep
                raise
            outcome = "Exactness was not checked: there was no memory for it. Run hf-mbp check once on its own."
        if report is None:
            give_back_memory()
        is_exact = all(exact for (exact,) in self._ranks.gather(report is None or report.is_exact))
        is_refused = other_trainers.is_sentence_transformers(self._trainer)
        equivalence.settle(report, is_exact, "error" if is_refused else self._trainer.mbp_config.on_inexact)
        return outcome if report is None else _told(report, is_exact)

    def _compare(self, rows: list[Any], sizes: Ints, budget: Budget) -> equivalence.EquivalenceReport:
        together = self._ranks if wrapped.is_fsdp2(self._trainer) else None
        num_rows, fitting = _fitting(sizes, budget)
        if num_rows == 0:
            if together:
                together.lowest(0)
            raise NothingToCompareError("two rows of the first step do not fit the memory together.")
        return equivalence.compare(self._trainer, [rows[index] for index in fitting], num_rows, together=together)


def _fitting(sizes: Ints, budget: Budget) -> tuple[int, list[int]]:
    """How many rows may run as one batch, and of which any so many fit the budget; none if no two do.

    A cap on tokens that is less than two rows is exceeded: it is somebody's wish, and not the end of the memory.
    """
    order = sizes.sum(axis=1).argsort(kind="stable")
    widths = np.maximum.accumulate(sizes[order], axis=0).sum(axis=1)
    for num_rows in range(min(CHECKED_ROWS, len(order)), 1, -1):
        shortest = [int(index) for index, width in zip(order, widths, strict=True) if budget.fits(num_rows, int(width))]
        if len(shortest) >= num_rows:
            return num_rows, shortest
    if budget.max_bytes is not None and len(order) > 1:
        return 0, []
    return 2, order[:2].tolist()


def _told(report: equivalence.EquivalenceReport, is_exact: bool) -> str:
    verdict = "Checked to be exact" if is_exact else "NOT exact"
    verdict += "".join(f", {reservation}" for reservation in report.reservations)
    return f"{verdict}: split and whole gradient differ by {report.max_relative_error:.1g}."
