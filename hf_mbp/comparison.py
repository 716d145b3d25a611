"""Runs the same rows as one batch and in parts, and compares what comes out."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm

from hf_mbp.collate import Inputs, has_entry_for_each_row, select_rows
from hf_mbp.distributed import Ranks
from hf_mbp.full_precision import in_float32
from hf_mbp.items import with_an_item
from hf_mbp.padding import trim
from hf_mbp.precollated import CollatedRow
from hf_mbp.probe import loss_of, modules_of
from hf_mbp.random_numbers import reseed
from hf_mbp.stand_ins import StandIns
from hf_mbp.training_mode import batch_norms_of
from hf_mbp.two_passes import Part

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""Largest relative error that passes, by the dtype of the computation: far above rounding (1e-7 in float64, because
heads compute losses in float32; 1e-5 in float32), far below what a wrong count gives (5 % and more)."""

HALF_PRECISION_TOLERANCE = 0.1
"""bf16 and fp16 round at 0.4 %, and gradients of few rows cancel; only gross errors can be told from rounding."""

SMALL_GRADIENT = 1e-3
"""A parameter whose gradient is a thousandth of the largest is compared with that: some, as the bias of attention
keys, have none but rounding."""

NORM_ELEMENTS = 2**20
"""Elements of a gradient that are turned into float64 at a time, to take their norm."""

NO_GRADIENT = 1e-9
"""Norm below which a gradient is rounding, and a comparison would compare noise: rows that are all alike, say."""

CLEARLY_LONGER = 1.5
"""Ratio of lengths from which padding takes a visible part of the shorter row."""

Gradients = list[torch.Tensor]


class NothingToCompareError(ValueError):
    """There are not two rows with loss items, or they have no gradient."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far two gradients are apart, and where most."""

    error: float
    parameter: str


class Comparison:
    """Rows of a trainer as one batch and in parts, and what can be tried with them.

    Every run begins in the state that `stand_ins` remember and with the same random numbers, unless it says otherwise.
    Ranks that share one model make it `together`: the same runs, each on rows of its own, and gradients are means over
    the ranks.
    """

    def __init__(
        self,
        trainer: Any,
        rows: list[Any],
        num_rows: int,
        *,
        stand_ins: StandIns,
        why_half: str | None,
        together: Ranks | None = None,
    ) -> None:
        self.trainer = trainer
        self.together = together
        self.stand_ins = stand_ins
        self.why_half = why_half
        self.modules = modules_of(trainer)
        self.parameters = _trainable(self.modules)
        self.smallest = 2 if batch_norms_of(trainer.model) else 1  # one row has no variance to normalise by
        self.rows = self._telling_rows(rows, num_rows)
        if together:
            self.rows = self.rows[: int(together.lowest(len(self.rows)))]
        if len(self.rows) < 2 * self.smallest:
            raise NothingToCompareError(
                f"a split needs {2 * self.smallest} rows with something to learn to compare; of {len(rows)} rows, "
                f"{len(self.rows)} will do (num_rows={num_rows})."
            )
        self.whole = self._collated_whole()
        self.is_dense = has_entry_for_each_row(self.whole, len(self.rows))
        self.is_random_collator = self.is_dense and not _same(self.whole, self._collated_whole())
        parts = self.collate(_uneven_groups(len(self.rows), self.smallest))
        self.parts = [trainer.mbp_rows.arranged(part) for part in parts]

    # Rows and inputs

    def _telling_rows(self, rows: list[Any], num_rows: int) -> list[Any]:
        """Short rows with items, the longest first, as unlike each other as there are.

        Rows of one length and one class would pass with any count and any padding. So there is one of each length and
        label before any comes twice, and one that is clearly longer than the others.
        """
        lengths = {id(row): int(self.trainer.mbp_rows.sizes([row]).sum()) for row in rows}
        by_length = sorted(rows, key=lambda row: lengths[id(row)])
        with_items = [row for row in by_length if self.items(*self.trainer.mbp_rows.collate([[row]])) > 0]
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

    def _collated_whole(self) -> Inputs:
        (whole,) = self.trainer.mbp_rows.collate([self.rows], keep_width=True)
        return self._in_precision(whole)

    def _in_precision(self, inputs: Inputs) -> Inputs:
        return inputs if self.why_half else in_float32(inputs)

    def collate(self, groups: list[list[int]]) -> list[Inputs]:
        """Groups of rows by the user's collator, or, if that draws random numbers, cut out of the whole."""
        if self.is_random_collator:
            return [trim(select_rows(self.whole, group)) for group in groups]
        collated = self.trainer.mbp_rows.collate([[self.rows[i] for i in group] for group in groups])
        return [self._in_precision(inputs) for inputs in collated]

    def items(self, inputs: Inputs) -> float:
        """What the trainer says the loss of these inputs is a mean over."""
        return float(self.trainer.mbp_rows.num_items(inputs))

    # Runs

    def start_again(self, seed: int = 0) -> None:
        """Puts the state back, and draws random numbers from a seed."""
        self.stand_ins.reset()
        reseed(seed, self.modules)

    def value(self, inputs: Inputs) -> float:
        """The loss of inputs."""
        self.start_again()
        with torch.no_grad():
            return float(loss_of(self.trainer, inputs, self.items(inputs)))

    def gradients(self, inputs: Inputs) -> Gradients:
        """The gradient of the loss of inputs."""
        return self.backward([inputs])[1]

    def pull(self, inputs: Inputs) -> float:
        """How far the gradient of inputs goes the way of that of the whole, which goes 1.

        Put together from rows as their losses are, and more telling: at the start of training losses are all alike.
        """
        length = sum(_dot(gradient, gradient) for gradient in self.whole_gradients)
        return sum(map(_dot, self.gradients(inputs), self.whole_gradients)) / length

    def backward(self, parts: list[Inputs], *, seed: int = 0, after: int = 0) -> tuple[float, Gradients]:
        """Loss and gradients of the parts, put together by their shares; `after` so many runs of the whole."""
        self.start_again(seed)
        for _ in range(after):
            loss_of(self.trainer, self.whole, self.items(self.whole))
            reseed(seed, self.modules)
        for _, parameter in self.parameters:
            parameter.grad = None
        counts = [self.items(part) for part in parts]
        total = 0.0
        second = self._first_pass(parts, counts)
        for part, count in zip(parts, counts, strict=True):
            if count > 0 or self.together:
                with second(part):
                    inputs = part if count > 0 else with_an_item(part)
                    loss = loss_of(self.trainer, inputs, count or 1, weight=count / sum(counts))
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
        return total, [torch.zeros_like(p) if p.grad is None else p.grad for _, p in self.parameters]

    def _first_pass(self, parts: list[Inputs], counts: list[float]) -> Callable[[Inputs], AbstractContextManager[None]]:
        """Where the loss compares all rows, that of the parts; and in what the second of each is to run."""
        two_passes = self.trainer.mbp_two_passes
        if two_passes is None or len(parts) == 1:
            return lambda part: nullcontext()  # noqa: ARG005
        shares = [count / sum(counts) for count in counts]
        together = [Part(key=part, inputs=part, share=share) for part, share in zip(parts, shares, strict=True)]
        two_passes.first(self.trainer.model, together)
        return two_passes.second  # type: ignore[no-any-return]

    def measure(self) -> Difference:
        """Compares the gradient of the whole with that of the parts; the same runs, whatever they give.

        Raises:
            NothingToCompareError: there is no gradient.
        """
        self.whole_loss, self.whole_gradients = self.backward([self.whole])
        if max(map(_norm, self.whole_gradients), default=0.0) < NO_GRADIENT:
            raise NothingToCompareError("the rows that would be compared have no gradient.")
        self.split_loss, split = self.backward(self.parts)
        return self.difference(self.whole_gradients, split)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient of the whole are numbers."""
        return isfinite(self.whole_loss) and all(isfinite(_norm(gradient)) for gradient in self.whole_gradients)

    def passes(self, difference: Difference) -> bool:
        """Whether a difference is rounding."""
        return difference.error <= self.tolerance

    def varies_at_random(self) -> bool:
        """Whether other random numbers give the whole another gradient."""
        other = self.backward([self.whole], seed=1)[1]
        return not self.passes(self.difference(self.whole_gradients, other))

    def drift(self) -> list[str] | None:
        """What runs of the whole change, if a later one gives another gradient; `None` if that is the same."""
        later = self.backward([self.whole], after=len(self.parts))[1]
        changed = self.stand_ins.changed()
        return None if self.passes(self.difference(self.whole_gradients, later)) else changed

    def difference(self, expected: Gradients, gradients: Gradients) -> Difference:
        """The largest relative error of gradients over the parameters."""
        norms = [_norm(gradient) for gradient in expected]
        floor = max(max(norms, default=0.0) * SMALL_GRADIENT, torch.finfo(torch.float64).tiny)
        errors = [
            _number(_norm(a - b) / max(norm, floor)) for a, b, norm in zip(expected, gradients, norms, strict=True)
        ]
        worst = max(range(len(errors)), key=lambda index: errors[index])
        return Difference(error=errors[worst], parameter=self.parameters[worst][0])

    @property
    def tolerance(self) -> float:
        """Largest relative error that is rounding, in the precision of this run."""
        if self.why_half:
            return HALF_PRECISION_TOLERANCE
        dtypes = {parameter.dtype for _, parameter in self.parameters}
        return max((TOLERANCE.get(dtype, HALF_PRECISION_TOLERANCE) for dtype in dtypes), default=0.0)


def _trainable(modules: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    """Every parameter that is trained: of the model, and of a loss that has some of its own."""
    found = {p: name for module in reversed(modules) for name, p in module.named_parameters() if p.requires_grad}
    return [(name, parameter) for parameter, name in reversed(found.items())]


def _uneven_groups(num_rows: int, smallest: int = 1) -> list[list[int]]:
    """Contiguous groups of `smallest`, `smallest` + 1, ... rows, so that no two weigh the same; two at least.

    Example:
        >>> _uneven_groups(8), _uneven_groups(2)
        ([[0], [1, 2], [3, 4, 5, 6, 7]], [[0], [1]])
    """
    groups: list[list[int]] = []
    start = 0
    while start < num_rows:
        end = start + smallest + len(groups)
        needed_after = smallest + len(groups) + 1 if groups else smallest
        is_last = end + needed_after > num_rows
        groups.append(list(range(start, num_rows if is_last else end)))
        start = groups[-1][-1] + 1
    return groups


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


def _number(error: float) -> float:
    return error if error == error else float("inf")  # not a number is no agreement


def _dot(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.dot(one.flatten(), other.flatten()))


def _norm(gradient: torch.Tensor) -> float:
    if isinstance(gradient, DTensor):
        gradient = gradient.full_tensor()
    dtype = torch.float32 if gradient.device.type == "mps" else torch.float64  # Apple's GPUs know no float64
    parts = [vector_norm(part, dtype=dtype) for part in torch.split(gradient.reshape(-1), NORM_ELEMENTS)]
    return float(vector_norm(torch.stack(parts)))
