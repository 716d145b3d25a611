"""Checks on the user's own model, loss and rows that the split gradient is the whole one, and says why if it is not."""

import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_mbp import full_precision, wrapped
from hf_mbp.comparison import Comparison, Difference, NothingToCompareError
from hf_mbp.distributed import Ranks
from hf_mbp.findings import explain
from hf_mbp.probe import modules_of
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.stand_ins import StandIns
from hf_mbp.training_mode import evaluation_mode, training_mode_without_dropout
from hf_mbp.undisturbed import untouched

__all__ = ["EquivalenceReport", "InexactError", "NothingToCompareError", "check_equivalence", "compare", "settle"]

ROWS_TO_CHOOSE_FROM = 8
"""Rows that are read for each that is compared, so that there are short ones of unlike lengths and labels."""

NOT_EXPLAINED = (
    "What the reason is cannot be tried while the model is spread over several processes: run hf-mbp check, or "
    "check_equivalence(trainer), in one process."
)


@dataclass(frozen=True, kw_only=True)
class EquivalenceReport:
    """Outcome of `check_equivalence`; prints as a short table.

    Attributes:
        max_relative_error: the largest over the parameters of |split - whole| / |whole|, the gradients' norms.
        tolerance: the largest error that passes.
        findings: if it does not pass, what was found and what to do about it.
        num_rows: rows compared.
        num_micro_batches: micro-batches that they were split into.
        whole_loss: loss of the rows in one batch.
        split_loss: loss put together from the micro-batches.
        worst_parameter: the parameter with the largest error.
        half_precision_because: why the gradients were computed in half precision, which tells gross errors only;
            `None` if they were not.
        is_training_mode: whether they were computed in training mode, with dropout taken out; if not, because random
            parts of training mode remained, in evaluation mode.
    """

    max_relative_error: float
    tolerance: float
    findings: tuple[str, ...]
    num_rows: int
    num_micro_batches: int
    whole_loss: float
    split_loss: float
    worst_parameter: str = ""
    half_precision_because: str | None = None
    is_training_mode: bool = True

    @property
    def is_exact(self) -> bool:
        """Whether micro-batches give the gradient of the whole batch, up to rounding."""
        return self.max_relative_error <= self.tolerance

    @property
    def reservations(self) -> tuple[str, ...]:
        """What the check could not see."""
        half = f"only as far as half precision can tell ({self.half_precision_because})"
        mode = "in evaluation mode: random parts of training mode were left out"
        return (*([half] if self.half_precision_because else []), *([] if self.is_training_mode else [mode]))

    def __str__(self) -> str:
        lines = [
            f"{'rows':<26}{self.num_rows}, as one batch and as {self.num_micro_batches} micro-batches",
            f"{'loss whole, split':<26}{self.whole_loss:.8g}, {self.split_loss:.8g}",
            f"{'largest relative error':<26}{self.max_relative_error:.2g} (passes up to {self.tolerance:g})",
            f"{'of the gradient of':<26}{self.worst_parameter}",
            f"{'exact':<26}{'yes' if self.is_exact else 'no'}",
            *(f"{'checked':<26}{reservation}" for reservation in self.reservations),
        ]
        return "\n".join(lines + [f"- {finding}" for finding in self.findings])


class InexactError(ValueError):
    """Splitting would change the gradient, and `on_inexact="error"` was asked for."""


def check_equivalence(trainer: Any, num_rows: int = 8) -> EquivalenceReport:
    """Whether splitting is exact for this trainer's model, loss and data.

    Runs the shortest of the first rows of the training data as one batch and as micro-batches of uneven sizes, and
    compares the gradient of every parameter. In training mode without dropout, or in evaluation mode if other random
    parts remain; in float32 in the place of half precision, unless that cannot be, which the report then says. The
    model, random states, optimizer and data order stay as they were.

    Args:
        trainer: an `MBPTrainer`, or another trainer with `MBPMixin`.
        num_rows: how many rows to compare, at least 2.

    Raises:
        ValueError: there are fewer than two rows with loss items, they have no gradient, the training data comes
            ready-made in batches, or the model is sharded (FSDP, DeepSpeed), where one rank cannot run it alone.

    Example:
        `print(check_equivalence(trainer))` before `trainer.train()`.
    """
    if wrapped.is_sharded(trainer):
        raise ValueError(
            "check_equivalence needs the whole model on each rank, and FSDP and DeepSpeed shard it. Run the check "
            "once in one process without them. (Under FSDP2, train() runs it when it starts.)"
        )
    with own_random_numbers(modules_of(trainer)), untouched(trainer):
        rows = trainer.mbp_rows.sample(num_rows * ROWS_TO_CHOOSE_FROM)
    return compare(trainer, rows, num_rows)


def compare(
    trainer: Any, rows: list[Any], num_rows: int, *, together: Ranks | None = None, explains: bool = True
) -> EquivalenceReport:
    """`check_equivalence` on the shortest `num_rows` of the given rows.

    Args:
        trainer: whose rows they are.
        rows: to choose from.
        num_rows: how many to compare.
        together: the ranks, if they share one model.
        explains: whether to find out why, if splitting is not exact.
    """
    with untouched(trainer):
        run = partial(_report, trainer, rows, num_rows, together, explains)
        return full_precision.on_the_side(trainer.accelerator, modules_of(trainer), run)


def _report(
    trainer: Any,
    rows: list[Any],
    num_rows: int,
    together: Ranks | None,
    explains: bool,
    stand_ins: StandIns,
    why_half: str | None,
) -> EquivalenceReport:
    """In training mode, and again in evaluation mode if that draws random numbers which matter."""
    model, others = trainer.model, modules_of(trainer)
    with training_mode_without_dropout(model, others):
        stand_ins.remember()
        comparison = Comparison(trainer, rows, num_rows, stand_ins=stand_ins, why_half=why_half, together=together)
        report = _outcome(comparison, explains, is_training_mode=True)
        if report is not None:
            return report
        stand_ins.reset()
    with evaluation_mode(model):
        stand_ins.remember()
        report = _outcome(comparison, explains, is_training_mode=False)
    assert report is not None, "in evaluation mode there is an outcome"  # noqa: S101
    return report


def _outcome(comparison: Comparison, explains: bool, *, is_training_mode: bool) -> EquivalenceReport | None:
    """What a comparison shows; `None` if random parts of training mode keep it from showing anything."""
    difference = comparison.measure()
    is_exact = comparison.passes(difference)
    if is_training_mode and not is_exact and comparison.is_finite and comparison.varies_at_random():
        return None
    return EquivalenceReport(
        max_relative_error=difference.error,
        tolerance=comparison.tolerance,
        findings=() if is_exact or not explains else _findings(comparison, difference),
        num_rows=len(comparison.rows),
        num_micro_batches=len(comparison.parts),
        whole_loss=comparison.whole_loss,
        split_loss=comparison.split_loss,
        worst_parameter=difference.parameter,
        half_precision_because=comparison.why_half,
        is_training_mode=is_training_mode,
    )


def _findings(comparison: Comparison, difference: Difference) -> tuple[str, ...]:
    if comparison.together:
        return (NOT_EXPLAINED,)
    return tuple(explain(comparison, difference))


def settle(report: EquivalenceReport | None, is_exact_everywhere: bool, on_inexact: str) -> None:
    """Warns of, or refuses on all ranks alike, what is not exact."""
    if is_exact_everywhere:
        return
    finding = str(report) if report is not None and not report.is_exact else "(found by another rank)"
    message = (
        f"Splitting the batch changes the gradient of this model, loss and data:\n{finding}\n"
        "Set check_at_start=False if that is what you want."
    )
    if on_inexact == "error":
        raise InexactError(message)
    warnings.warn(message, stacklevel=2)
