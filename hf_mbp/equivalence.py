"""Checks on the user's own model, loss and rows that the split gradient is the whole one, and explains if it is not."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch.linalg import vector_norm

from hf_mbp import compat
from hf_mbp.collate import Inputs, has_entry_for_each_row, select_rows
from hf_mbp.padding import is_left_padded, trim
from hf_mbp.precollated import CollatedRow
from hf_mbp.probe import batch_norms_of, kept_collator, loss_of, modules_of, undisturbed, without_dropout

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative error that passes, by the dtype of the computation: far above rounding (1e-7 in float64, because
heads compute losses in float32; 1e-5 in float32), far below what a wrong count gives (5 % and more)."""

HALF_PRECISION_TOLERANCE = 0.1
"""bf16 and fp16 round at 0.4 %, and gradients of few rows cancel; only gross errors can be told from rounding."""

SMALL_GRADIENT = 1e-3
"""A parameter whose gradient is a thousandth of the largest is compared with that: some, as the bias of attention
keys, have none but rounding."""

NO_GRADIENT = 1e-9
"""Norm below which a gradient is rounding, and a comparison would compare noise: rows that are all alike, say."""

CLEARLY_LONGER = 1.5
"""Ratio of lengths from which padding takes a visible part of the shorter row."""


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
    """

    max_relative_error: float
    tolerance: float
    findings: tuple[str, ...]
    num_rows: int
    num_micro_batches: int
    whole_loss: float
    split_loss: float

    @property
    def is_exact(self) -> bool:
        """Whether micro-batches give the gradient of the whole batch, up to rounding."""
        return self.max_relative_error <= self.tolerance

    def __str__(self) -> str:
        lines = [
            f"{'rows':<26}{self.num_rows}, as one batch and as {self.num_micro_batches} micro-batches",
            f"{'loss whole, split':<26}{self.whole_loss:.8g}, {self.split_loss:.8g}",
            f"{'largest relative error':<26}{self.max_relative_error:.2g} (passes up to {self.tolerance:g})",
            f"{'exact':<26}{'yes' if self.is_exact else 'no'}",
        ]
        return "\n".join(lines + [f"- {finding}" for finding in self.findings])


class InexactError(ValueError):
    """Splitting would change the gradient, and `on_inexact="error"` was asked for."""


class NothingToCompareError(ValueError):
    """There are not two rows with loss items, or they have no gradient."""


def check_equivalence(trainer: Any, num_rows: int = 8) -> EquivalenceReport:
    """Whether splitting is exact for this trainer's model, loss and data.

    Runs the shortest of the first rows of the training data as one batch and as micro-batches of uneven sizes,
    without dropout, and compares the gradient of every parameter. The model, random states, optimizer and data order
    stay as they were.

    Args:
        trainer: an `MBPTrainer`, or another trainer with `MBPMixin`.
        num_rows: how many rows to compare, at least 2.

    Raises:
        ValueError: there are fewer than two rows with loss items, they have no gradient, the training data comes
            ready-made in batches, or the model is sharded (FSDP, DeepSpeed), where one rank cannot run it alone.

    Example:
        `print(check_equivalence(trainer))` before `trainer.train()`.
    """
    if compat.is_sharded(trainer):
        raise ValueError(
            "check_equivalence needs the whole model on each rank, and FSDP and DeepSpeed shard it. Run the check "
            "once in one process without them."
        )
    with undisturbed(modules_of(trainer)), kept_collator(trainer.data_collator):
        rows = trainer.mbp_feed.sample(num_rows * 8)
    return compare(trainer, rows, num_rows)


def compare(trainer: Any, rows: list[Any], num_rows: int) -> EquivalenceReport:
    """`check_equivalence` on the shortest `num_rows` of the given rows."""
    with undisturbed(modules_of(trainer)), kept_collator(trainer.data_collator):
        without_dropout(trainer.model)
        return _Comparison(trainer, rows, num_rows).report()


def _uneven_groups(num_rows: int, smallest: int = 1) -> list[list[int]]:
    """Contiguous groups of `smallest`, `smallest` + 1, ... rows, so that no two weigh the same.

    Example:
        >>> _uneven_groups(8)
        [[0], [1, 2], [3, 4, 5, 6, 7]]
    """
    groups: list[list[int]] = []
    start = 0
    while start < num_rows:
        end = start + smallest + len(groups)
        is_last = end + smallest + len(groups) + 1 > num_rows
        groups.append(list(range(start, num_rows if is_last else end)))
        start = groups[-1][-1] + 1
    return groups


class _Comparison:
    """The rows as one batch and in parts, and what they tell."""

    def __init__(self, trainer: Any, rows: list[Any], num_rows: int) -> None:
        self.trainer = trainer
        self.parameters = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
        self.rows = self._telling_rows(rows, num_rows)
        if len(self.rows) < 2:
            raise NothingToCompareError(
                f"a split needs two rows with something to learn to compare; of {len(rows)} rows, "
                f"{len(self.rows)} will do (num_rows={num_rows})."
            )
        self.smallest = 2 if batch_norms_of(trainer.model) else 1  # one row has no variance to normalise by
        self.groups = _uneven_groups(len(self.rows), self.smallest)
        (self.whole,) = trainer.mbp_feed.collate([self.rows], keep_width=True)
        self.is_dense = has_entry_for_each_row(self.whole, len(self.rows))
        (again,) = trainer.mbp_feed.collate([self.rows], keep_width=True)
        self.is_random = self.is_dense and not _same(self.whole, again)
        self.parts = self.collate(self.groups)

    def _telling_rows(self, rows: list[Any], num_rows: int) -> list[Any]:
        """Short rows with items, the longest first, as unlike each other as there are.

        Rows of one length and one class would pass with any count and any padding. So there is one of each length and
        label before any comes twice, and one that is clearly longer than the others.
        """
        lengths = {id(row): int(self.trainer.mbp_feed.sizes([row]).sum()) for row in rows}
        by_length = sorted(rows, key=lambda row: lengths[id(row)])
        with_items = [row for row in by_length if self.items(*self.trainer.mbp_feed.collate([[row]])) > 0]
        firsts: list[Any] = []
        seconds: list[Any] = []
        seen = set()
        for row in with_items:
            kind = (lengths[id(row)], repr(_labels_of(row)))
            (seconds if kind in seen else firsts).append(row)
            seen.add(kind)
        labels = {repr(_labels_of(row)): row for row in reversed(firsts)}  # the shortest of each label
        chosen = [*list(labels.values())[: num_rows // 2], *firsts, *seconds]
        telling = list({id(row): row for row in chosen}.values())[:num_rows]
        longest = max((lengths[id(row)] for row in telling), default=0)
        longer = [row for row in with_items if lengths[id(row)] >= CLEARLY_LONGER * longest]
        if longer and len(telling) > 2:
            telling[-1] = longer[0]
        return sorted(telling, key=lambda row: lengths[id(row)], reverse=True)

    def collate(self, groups: list[list[int]]) -> list[Inputs]:
        """Groups of rows by the user's collator, or, if that draws random numbers, cut out of the whole."""
        if self.is_random:
            return [trim(select_rows(self.whole, group)) for group in groups]
        collated: list[Inputs] = self.trainer.mbp_feed.collate([[self.rows[i] for i in group] for group in groups])
        return collated

    def items(self, inputs: Inputs) -> float:
        return float(self.trainer.mbp_feed.num_items(inputs))

    def value(self, inputs: Inputs) -> float:
        with torch.no_grad():
            return float(loss_of(self.trainer, inputs, self.items(inputs)))

    def backward(self, parts: list[Inputs]) -> tuple[float, list[torch.Tensor]]:
        """Loss and gradients of the parts, put together by their shares."""
        for _, parameter in self.parameters:
            parameter.grad = None
        counts = [self.items(part) for part in parts]
        total = 0.0
        for part, count in zip(parts, counts, strict=True):
            if count > 0:
                loss = loss_of(self.trainer, part, count, weight=count / sum(counts))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total, [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self.parameters]

    def report(self) -> EquivalenceReport:
        whole_loss, whole = self.backward([self.whole])
        if max(map(_norm, whole), default=0.0) < NO_GRADIENT:
            raise NothingToCompareError("the rows that would be compared have no gradient.")
        split_loss, split = self.backward(self.parts)
        error = _relative_error(whole, split)
        return EquivalenceReport(
            max_relative_error=error,
            tolerance=self.tolerance,
            findings=() if error <= self.tolerance else tuple(explain(self)),
            num_rows=len(self.rows),
            num_micro_batches=len(self.parts),
            whole_loss=whole_loss,
            split_loss=split_loss,
        )

    @property
    def tolerance(self) -> float:
        """Largest relative error that is rounding, in the precision of this run."""
        autocasts = self.trainer.accelerator.mixed_precision != "no"
        dtypes = {parameter.dtype for _, parameter in self.parameters}
        if autocasts or any(dtype not in TOLERANCE for dtype in dtypes):
            return HALF_PRECISION_TOLERANCE
        return max((TOLERANCE[dtype] for dtype in dtypes), default=TOLERANCE[torch.float32])


def _labels_of(row: Any) -> Any:
    """The label of a row if it is one value; rows with a label a token differ anyway."""
    fields = row.fields() if isinstance(row, CollatedRow) else row
    values = fields.items() if isinstance(fields, Mapping) else ()
    return [value for key, value in values if "label" in str(key) and np.ndim(value) == 0]


def _same(one: Inputs, other: Inputs) -> bool:
    return all(
        value.shape == other[key].shape and bool((value == other[key]).all())
        for key, value in one.items()
        if isinstance(value, torch.Tensor)
    )


def _relative_error(whole: list[torch.Tensor], split: list[torch.Tensor]) -> float:
    norms = [_norm(gradient) for gradient in whole]
    errors = [_norm(a - b) for a, b in zip(whole, split, strict=True)]
    floor = max(max(norms, default=0.0) * SMALL_GRADIENT, torch.finfo(torch.float64).tiny)
    worst = max((error / max(norm, floor) for error, norm in zip(errors, norms, strict=True)), default=0.0)
    return worst if worst == worst else float("inf")  # not a number is no agreement


def _norm(gradient: torch.Tensor) -> float:
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
    return float(vector_norm(gradient, dtype=dtype))


def explain(comparison: _Comparison) -> list[str]:
    """What makes splitting inexact, and what to do; each suspect is tried on the user's own rows."""
    if finding := _not_a_number(comparison) or _random(comparison) or _batch_norm(comparison):
        return [finding]  # the others would only be misled, or run single rows
    suspects: list[Callable[[_Comparison], str | None]] = [_router_loss, _padding_width, _reduction]
    return [finding for suspect in suspects if (finding := suspect(comparison))]


def _not_a_number(comparison: _Comparison) -> str | None:
    if isfinite(comparison.value(comparison.whole)):
        return None
    return (
        "The loss of these rows is not a finite number, split or not. Look for weights that are not finite, and for "
        "labels that the loss cannot take."
    )


def _random(comparison: _Comparison) -> str | None:
    """Compares the loss of the rows with itself."""
    first, second = comparison.value(comparison.whole), comparison.value(comparison.whole)
    if abs(first - second) <= comparison.tolerance * abs(first):
        return None
    return (
        f"The loss of the same rows differs from one call to the next ({first:.6g}, {second:.6g}): model or loss draw "
        "random numbers even in evaluation mode, so whether splitting is exact cannot be told. Draw them in training "
        "mode only."
    )


def _batch_norm(comparison: _Comparison) -> str | None:
    if comparison.smallest > 1:
        return (
            "Batch normalisation uses the mean of the batch that runs, which after splitting is the micro-batch. "
            "Freeze it (module.eval()), or use a model with layer normalisation."
        )
    return None


def _router_loss(comparison: _Comparison) -> str | None:
    config = getattr(comparison.trainer.model, "config", None)
    if getattr(config, "output_router_logits", False):
        return (
            "The load-balancing loss of the experts is computed from the tokens that run together, and is not a mean "
            "over items. Set output_router_logits=False, or accept that it balances each micro-batch."
        )
    return None


def _padding_width(comparison: _Comparison) -> str | None:
    """Compares one short row at its own width and at the width of the whole batch."""
    if not comparison.is_dense:
        return None
    shortest = len(comparison.rows) - 1
    padded = select_rows(comparison.whole, [shortest])
    (alone,) = comparison.collate([[shortest]])
    if comparison.items(padded) == 0:
        return None
    at_whole_width, at_its_own = comparison.value(padded), comparison.value(alone)
    if abs(at_whole_width - at_its_own) <= comparison.tolerance * abs(at_whole_width):
        return None
    finding = (
        f"The loss of a row depends on how wide it is padded ({at_its_own:.6g} alone, {at_whole_width:.6g} beside "
        "longer rows): padding is not left out. "
    )
    if is_left_padded(comparison.whole):
        return finding + "The rows are padded on the left and positions may be absolute: set padding_side='right'."
    if "attention_mask" not in comparison.whole:
        return finding + "The collator returns no attention_mask: return one, or pad all rows to one length."
    return finding + (
        "If the loss counts tokens by attention_mask and not by labels, override num_items(micro_batch); if the model "
        "mixes padding into the rows (as FNet does), pad all rows to one length."
    )


def _reduction(comparison: _Comparison) -> str | None:
    """Finds how the loss puts rows together, from the losses of single rows and of pairs, all at one width."""
    if not comparison.is_dense:
        return "The loss is not a mean over what num_items(micro_batch) counts: override it to count its items."
    rows = [select_rows(comparison.whole, [index]) for index in range(len(comparison.rows))]
    rows = [row for row in rows if comparison.items(row) > 0]
    single = [comparison.value(row) for row in rows]
    whole = comparison.value(comparison.whole)
    counts = [comparison.items(row) for row in rows]

    def explains(value: float) -> bool:
        return abs(value - whole) <= comparison.tolerance * abs(whole)

    if explains(sum(value * count for value, count in zip(single, counts, strict=True)) / sum(counts)):
        return None
    if explains(sum(single)):
        return (
            "The loss is a sum over the rows, not a mean. Ask for a mean (for CTC, config.ctc_loss_reduction='mean', "
            "and num_items to return the rows), or divide by num_items_in_batch in your compute_loss."
        )
    if max(map(abs, single)) <= 1e-3 * abs(whole):
        return (
            "The loss compares the rows of a batch with each other (a contrastive loss): a row alone has none, and "
            "micro-batches have fewer rows to compare. It cannot be split by rows: train it unsplit, in "
            "sentence-transformers with one of the Cached losses."
        )
    weights = _item_weights(comparison, single)
    if weights and explains(sum(w * value for w, value in zip(weights, single, strict=True)) / sum(weights)):
        found = ", ".join(f"{weight * counts[0]:.4g}" for weight in weights[:4])
        expected = ", ".join(f"{count:.4g}" for count in counts[:4])
        return (
            f"The loss is a mean over other items than num_items(micro_batch) counts: the first rows weigh as {found}, "
            f"but are counted as {expected}. Override num_items to return what the loss divides by; for a "
            "class-weighted cross-entropy that is the sum of the labels' weights."
        )
    return (
        "No count of items explains the loss: it may add up means over different things (a token loss and a sentence "
        "loss, say), or rows of a batch may influence each other. Such a loss cannot be split by rows exactly; compute "
        "its parts as one mean in compute_loss, or train it unsplit."
    )


def _item_weights(comparison: _Comparison, single: list[float]) -> list[float] | None:
    """Items of each row relative to the first, from loss(pair) = (w1 l1 + w2 l2) / (w1 + w2)."""
    weights = [1.0]
    for index in range(1, len(single)):
        pair = comparison.value(select_rows(comparison.whole, [0, index]))
        difference = pair - single[index]
        if difference == 0 or (single[0] - pair) / difference <= 0:
            return None
        weights.append((single[0] - pair) / difference)
    return weights


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
