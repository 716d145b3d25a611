"""Whether the micro-batches of a run are padded or laid end to end: where that is possible, pays, and is exact."""

from dataclasses import dataclass
from math import isclose, isfinite
from typing import Any

from hf_mbp import equivalence, other_trainers, padding_free, wrapped
from hf_mbp.arrays import Ints
from hf_mbp.collate import num_rows_of
from hf_mbp.comparison import NothingToCompareError
from hf_mbp.distributed import Ranks
from hf_mbp.items import with_an_item
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory
from hf_mbp.plan import Layout
from hf_mbp.probe import modules_of
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.undisturbed import untouched

COMPARED_ROWS = 8
"""Rows that are compared, padded together and laid end to end in parts."""

ROWS_TO_CHOOSE_FROM = 32
"""The shortest rows of the first step, of which those are taken that tell most."""

MOST_POSITIONS = 4096
"""A model that knows more positions is not tried beyond them: it computes them, and has no table that could end."""

SAME_LOSS = 1e-2
"""Relative difference of two losses that half precision makes of one. A row that sees others, or that stands at other
places, has a loss that differs more, and a gradient that differs much more."""

REMEDY = "Leave padding_free at None, which pads where that is needed."


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How rows are laid, and what the reader is told about it; nothing where nobody asked."""

    layout: Layout = Layout.PADDED
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rank has found: why rows cannot be laid end to end, if it could tell."""

    reason: str = ""
    is_known: bool = True


def choose_layout(trainer: Any, ranks: Ranks, rows: list[Any], sizes: Ints) -> Choice:
    """How to lay the rows of a run of this trainer, the same on all ranks.

    End to end only where the gradient of the model itself, of some short ones of `rows`, which have `sizes`
    `[rows, parts]`, is that of the padded batch.

    Raises:
        ValueError: end to end was asked for, and cannot be.
    """
    asked = trainer.mbp_config.padding_free
    pays = wrapped.attends_in_segments(trainer.model)
    if asked is False or not (asked or pays):
        return Choice()
    layout = Layout.SEGMENTS if pays else Layout.ONE_ROW
    shortest: list[Any] = [rows[index] for index in sizes.sum(axis=1).argsort(kind="stable")[:ROWS_TO_CHOOSE_FROM]]
    with own_random_numbers(modules_of(trainer)), untouched(trainer):
        reason = _why_not(trainer, ranks, shortest, layout)
    if not reason:
        return Choice(layout=layout, note="Rows are laid end to end, which was checked to be exact.")
    if asked:
        raise ValueError(f"padding_free=True cannot be met: {reason}. {REMEDY}")
    return Choice(note=f"Rows are not laid end to end, because {reason}.")


def _why_not(trainer: Any, ranks: Ranks, rows: list[Any], layout: Layout) -> str:
    """Why rows cannot be laid so, the same on all ranks; empty if they can. What costs least is asked first."""
    if reason := _why_impossible(trainer) or _agreed(_why_not_these(trainer, rows), ranks):
        return reason
    return _agreed(_compared(trainer, ranks, rows, layout), ranks)


def _why_impossible(trainer: Any) -> str:
    """What the trainer itself, the same on all ranks, has against it."""
    if wrapped.is_sharded(trainer) and not wrapped.is_fsdp2(trainer):
        return "a model that DeepSpeed runs, or that was sharded when loaded, cannot be tried before it trains"
    if wrapped.compiles(trainer.accelerator, trainer.model):
        return "the model is compiled, which has not been tried with rows laid end to end"
    if wrapped.attention_chunk(trainer.model) and wrapped.attends_in_segments(trainer.model):
        return "flash attention knows no chunks, and together rows may be longer than one"
    if trainer.mbp_rows.has_targets:
        return "an encoder-decoder has two sequences for each row"
    if other_trainers.rows_each(trainer) > 1 or other_trainers.is_sentence_transformers(trainer):
        return "the loss looks at whole rows, not at tokens"
    if not wrapped.takes_by_name(trainer.model, padding_free.POSITIONS):
        return f"the model takes no {padding_free.POSITIONS}, by which it would know where rows begin"
    return ""


def _why_not_these(trainer: Any, rows: list[Any]) -> Finding:
    (inputs,) = trainer.mbp_rows.collate([rows])
    if num_rows_of(inputs) != len(rows):
        return Finding(reason="the collator does not return one row for each that it gets")
    return Finding(reason=padding_free.why_padded(inputs) or "")


def _compared(trainer: Any, ranks: Ranks, rows: list[Any], layout: Layout) -> Finding:
    """Whether rows laid end to end have the gradient of the same rows padded; tried on all ranks alike.

    Raises:
        RuntimeError: the trial fails under FSDP2, where the other ranks wait inside the model for this one.
    """
    together = ranks if wrapped.is_fsdp2(trainer) else None
    trainer.mbp_rows.layout = layout
    try:
        report = equivalence.compare(trainer, rows, COMPARED_ROWS, together=together, explains=False)
        finding = Finding(reason=_why_inexact(trainer, report) or _why_not_long(trainer, rows[0]))
    except NothingToCompareError as nothing:
        finding = Finding(reason=f"it could not be checked: {str(nothing).removesuffix('.')}", is_known=False)
    except Exception as error:  # whatever a model says to inputs of a kind that it may not know
        if together is not None:
            raise RuntimeError(
                f"Whether rows can be laid end to end could not be tried: {_failure(error)}. "
                "MBPConfig(padding_free=False) pads them, and tries nothing."
            ) from error
        finding = Finding(reason=_failure(error))
    finally:
        trainer.mbp_rows.layout = Layout.PADDED
    if finding.reason:
        give_back_memory()
    return finding


def _why_inexact(trainer: Any, report: equivalence.EquivalenceReport) -> str:
    if report.is_exact:
        return ""
    if not isfinite(report.max_relative_error):
        return "their gradient, or that of the same rows padded, is not finite"
    return (
        f"laid end to end, rows have another gradient than padded (relative error {report.max_relative_error:.1g}): "
        f"with {wrapped.attention_of(trainer.model)} attention this model lets rows see each other, or places them "
        "otherwise"
    )


def _why_not_long(trainer: Any, row: Any) -> str:
    """What happens to a row so many times, end to end, that all of it is longer than any row may be.

    The rows of a micro-batch are that, as a rule; the few short ones that were compared are not.
    """
    reader, positions = trainer.mbp_rows, wrapped.most_positions(trainer.model)
    cap = trainer.mbp_config.max_tokens_per_micro_batch
    if not positions or positions > MOST_POSITIONS or (cap is not None and cap <= positions):
        return ""
    (inputs,) = reader.collate([[row]])
    one = with_an_item(inputs)
    times = positions // one["input_ids"].numel() + 1
    many = {key: value.repeat(times, 1) for key, value in one.items()}
    alone, together = reader.losses(one, reader.arranged(many))
    if isclose(alone, together, rel_tol=SAME_LOSS):
        return ""
    return (
        f"{times:,} times the same row, more than the model has positions, has a loss of {together:.4g}, and the row "
        f"alone of {alone:.4g}"
    )


def _failure(error: Exception) -> str:
    if is_out_of_memory(error):
        return "there was no memory to check it"
    return f"the model or its loss fails on rows laid end to end ({type(error).__name__}: {error})"


def _agreed(finding: Finding, ranks: Ranks) -> str:
    """The reason of this rank or another one, empty if there is none and at least one rank could tell."""
    found = ranks.gather(finding.is_known, finding.is_known and bool(finding.reason))
    if any(is_known for is_known, _ in found) and not any(has_reason for _, has_reason in found):
        return ""
    return finding.reason or "another process says so"
