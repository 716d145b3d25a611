"""What splitting would make of a trainer's predictions and loss, tried on a few rows of the first batch.

Whether padding can be cut shows where there is some, and whether the loss is a mean over what is counted where labels
differ. A batch may have neither; then later ones are tried, too.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isclose, isfinite, isnan
from typing import Any

import torch
from torch.utils._pytree import tree_flatten

from hf_mbp import compat
from hf_mbp.collate import Inputs
from hf_mbp.distributed import Ranks
from hf_mbp.eval_batch import EvalBatch
from hf_mbp.probe import modules_of
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.row_outputs import Follows
from hf_mbp.stand_ins import HALF
from hf_mbp.undisturbed import kept_notes

Result = tuple[Any, Any, Any]
"""Loss, logits and labels, as `Trainer.prediction_step` returns them."""

Run = Callable[[Inputs], Result]

ROUNDING, ROUNDING_HALF = 1e-4, 5e-2
"""Differences, of the largest value, that kernels for other shapes make of the same rows; padding that is not masked
makes larger ones."""

TIES = 0.1
"""Share of integers, such as the classes that a preprocessing function picks, that rounding may turn."""

LOSS_EXAMPLES = 8
"""On which the loss is tried: enough that some are likely to weigh more than others."""

MOST_LABELS = 16
"""Batches with other labels than before are tried until so many were seen, or 1,000 classes would be tried for long."""


@dataclass(frozen=True, kw_only=True)
class EvalTraits:
    """What was found out.

    Attributes:
        splits: rows have their predictions by themselves, and the loss is their mean.
        cuts: and whatever they are padded to, as far as that was tried.
        tried_parts: those of `EvalBatch.padded` whose padding was cut in the trial.
        tried_labels: the labels of the batches that were tried.
        preprocesses: `preprocess_logits_for_metrics` works row by row, too.
        follows: dimensions of predictions and labels that are as wide as the inputs; `None` if the two rows did not
            tell.
        is_counted: stock passes the number of items to the loss.
        count_effect: what the loss makes of it, if that was tried; always on several ranks.
    """

    splits: bool
    cuts: bool = False
    tried_parts: frozenset[int] = frozenset()
    tried_labels: frozenset[int] = frozenset()
    preprocesses: bool = False
    follows: Follows | None = None
    is_counted: bool = False
    count_effect: "CountEffect | None" = None

    def cuts_of(self, batch: EvalBatch) -> bool:
        """Whether the padding of a batch can be cut, all of which must have been tried."""
        return self.cuts and batch.is_cuttable and batch.padded <= self.tried_parts

    def leaves_open(self, batch: EvalBatch) -> bool:
        """Whether a batch could show what those before it could not."""
        if not self.splits:
            return False
        if self.cuts and not batch.padded_for(two_examples(batch)) <= self.tried_parts:
            return True
        if len(self.tried_labels) >= MOST_LABELS or batch.labels <= self.tried_labels:
            return False
        return len(batch.labels) > 1 or not self.tried_labels  # rows with one label weigh the same

    def joined(self, later: "EvalTraits") -> "EvalTraits":
        """With what a later batch has shown."""
        return replace(
            later,
            cuts=self.cuts and later.cuts,
            tried_parts=self.tried_parts | later.tried_parts,
            tried_labels=self.tried_labels | later.tried_labels,
            follows=self.follows if later.follows is None else later.follows,
        )


@dataclass(frozen=True, kw_only=True)
class CountEffect:
    """What a loss makes of the number of items that stock passes: `divides` by it in place of its own, and `times`.

    Most heads of transformers ignore the count. `Trainer.compute_loss` multiplies by the number of ranks.
    """

    divides: bool = True
    times: int = 1

    def factor(self, num_items: float, count: float) -> float:
        """Of the loss that stock gets to the mean over `num_items`."""
        return self.times * (num_items / count if self.divides and count else 1.0)


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    widths: list[int]
    num_items: float
    loss: float | None
    is_counted: bool
    raw: Any
    processed: Any


class EvalTrial:
    """Runs a few rows together and apart.

    Args:
        run: the prediction step.
        preprocess: the user's `preprocess_logits_for_metrics`.
        num_items: what the loss of some inputs is a mean over.
    """

    def __init__(
        self,
        trainer: Any,
        ranks: Ranks,
        run: Run,
        preprocess: Callable[[Any, Any], Any] | None,
        num_items: Callable[[Inputs], float],
    ) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._run = run
        self._preprocess = preprocess
        self._num_items = num_items
        self._modules = modules_of(trainer)
        is_half = trainer.accelerator.mixed_precision != "no" or any(
            p.dtype in HALF for p in trainer.model.parameters()
        )
        self._tolerance = ROUNDING_HALF if is_half else ROUNDING

    def traits(self, batch: EvalBatch, known: EvalTraits | None = None) -> EvalTraits:
        """What splitting makes of the rows of a batch, beside what is known; a collective that asks all ranks alike."""
        if not self._all(batch.is_splittable):
            return EvalTraits(splits=False)
        for cuts in (True, False):
            found = self._tried(batch, known.tried_labels if known else frozenset(), cuts=cuts)
            if found.splits and (found.preprocesses or self._preprocess is None):
                break  # or logits keep their width, so that there are none at padding that stock does not have
        return known.joined(found) if known else found

    def _all(self, is_so: bool) -> bool:
        return self._ranks.lowest(float(is_so)) == 1

    def _tried(self, batch: EvalBatch, tried_labels: frozenset[int], *, cuts: bool) -> EvalTraits:
        is_cut = cuts and batch.is_cuttable
        short, longer = two_examples(batch)
        sizes = batch.sizes(cuts=is_cut)
        is_wider = is_cut and bool((sizes[short] != sizes[longer]).all())
        parts = [self._outcome(batch, [example], cuts=is_cut) for example in (short, longer)]
        whole = self._outcome(batch, [short, longer], cuts=is_wider)
        preprocesses = self._all(self._match("processed", whole, parts)) if self._preprocess else False
        outputs = "processed" if preprocesses else "raw"
        is_counted = self._all(whole.is_counted)
        is_mean = self._is_mean(batch, tried_labels, cuts=is_cut) and self._same_loss(whole, parts)
        return EvalTraits(
            splits=self._all(self._match("raw", whole, parts) and is_mean),
            cuts=cuts,
            tried_parts=batch.padded_for((short, longer)) if is_cut else frozenset(),
            tried_labels=batch.labels,
            preprocesses=preprocesses,
            follows=_follows(whole, parts[0], outputs) if is_cut else None,
            is_counted=is_counted,
            count_effect=self.count_effect(batch) if is_counted and self._ranks.count > 1 else None,
        )

    def _is_mean(self, batch: EvalBatch, tried_labels: frozenset[int], *, cuts: bool) -> bool:
        """Whether the loss of a few examples is the mean over two halves, which differ in their labels if they can."""
        examples = loss_examples(batch, tried_labels)
        sample = replace(batch, inputs=batch.take(examples, cuts=batch.is_cuttable))
        places = list(range(len(examples)))
        halves = places[: len(places) // 2], places[len(places) // 2 :]
        whole = self._outcome(sample, places, cuts=False)
        parts = [self._outcome(sample, half, cuts=cuts) for half in halves]
        return self._same_loss(whole, parts)

    def _outcome(self, batch: EvalBatch, examples: list[int], *, cuts: bool) -> _Outcome:
        inputs = batch.take(examples, cuts=cuts)
        num_items = self._num_items(inputs)
        with self._on_the_side(), compat.mean_loss(self._trainer, num_items) as asked:
            loss, logits, labels = self._run(dict(inputs))
        processed = logits
        if self._preprocess is not None and logits is not None:
            processed = self._preprocess(logits, labels)
        return _Outcome(
            widths=batch.widths(inputs),
            num_items=num_items,
            loss=None if loss is None else float(loss),
            is_counted=bool(asked),
            raw=(logits, labels),
            processed=(processed, labels),
        )

    @contextmanager
    def _on_the_side(self) -> Iterator[None]:
        with (
            kept_notes(self._trainer),
            compat.local_gathers(self._trainer),
            compat.unrounded_float32(),
            own_random_numbers(self._modules),
        ):
            yield

    def count_effect(self, batch: EvalBatch) -> CountEffect:
        """What the loss makes of the count, from one row with the counts 1 and 2."""
        inputs = batch.take([two_examples(batch)[0]], cuts=False)
        num_items, counted = self._num_items(inputs), []
        with self._on_the_side(), compat.mean_loss(self._trainer, num_items):
            mean = float(self._run(dict(inputs))[0])
        for count in (1, 2):
            with self._on_the_side(), compat.counted_loss(self._trainer, count):
                counted.append(float(self._run(dict(inputs))[0]))
        if not isfinite(mean) or mean == 0:
            return CountEffect()
        divides = not isclose(*counted, rel_tol=0.1)
        return CountEffect(divides=divides, times=max(1, round(counted[0] / (mean * num_items if divides else mean))))

    def _same_loss(self, whole: _Outcome, parts: list[_Outcome]) -> bool:
        if whole.loss is None:
            return True
        counted = [(part.loss or 0.0, part.num_items) for part in parts if part.num_items]
        if not counted:
            return True
        mean = sum(loss * items for loss, items in counted) / sum(items for _, items in counted)
        return (isnan(mean) and isnan(whole.loss)) or isclose(
            mean, whole.loss, rel_tol=self._tolerance, abs_tol=self._tolerance
        )

    def _match(self, kind: str, whole: _Outcome, parts: list[_Outcome]) -> bool:
        """Whether the outputs of two examples are those of each alone, wherever it has any."""
        leaves = [tree_flatten(getattr(outcome, kind))[0] for outcome in (whole, *parts)]
        if len({len(of_one) for of_one in leaves}) > 1:
            return False
        return all(
            self._same(together, part, example)
            for together, *apart in zip(*leaves, strict=True)
            for example, part in enumerate(apart)
            if isinstance(together, torch.Tensor)
        )

    def _same(self, together: torch.Tensor, part: Any, example: int) -> bool:
        if not isinstance(part, torch.Tensor) or part.ndim == 0 or part.ndim != together.ndim:
            return False
        if len(part) not in (1, 2) or len(together) != 2 * len(part):
            return False
        expected = together[[example, *([example + 2] if len(part) == 2 else [])]]
        shared = tuple(slice(min(sizes)) for sizes in zip(expected.shape, part.shape, strict=True))
        return self._alike(expected[shared], part[shared])

    def _alike(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        if not one.is_floating_point():
            return bool((one != other).float().mean() <= TIES) if one.numel() else True
        largest = one[torch.isfinite(one)].abs().max() if bool(torch.isfinite(one).any()) else torch.ones(())
        return torch.allclose(one, other, rtol=0, atol=self._tolerance * float(largest), equal_nan=True)


def two_examples(batch: EvalBatch) -> tuple[int, int]:
    """A short example with something to learn from, and a longer one of all parts if there is any."""
    sizes = batch.sizes(cuts=batch.is_cuttable)
    lengths = sizes.sum(axis=1)
    order = sorted(range(batch.num_examples), key=lambda example: (not batch.num_labels[example], lengths[example]))
    short = order[0]
    longer = [example for example in order if (sizes[example] > sizes[short]).all()]
    return short, (longer or order[-1:])[0]


def loss_examples(batch: EvalBatch, tried_labels: frozenset[int]) -> list[int]:
    """Up to `LOSS_EXAMPLES`, in the order of their labels: of other labels first, and short ones.

    Together they have no more cells than the longest example of the batch, unless they are two.
    """
    lengths = batch.sizes(cuts=batch.is_cuttable).sum(axis=1)
    learned = [example for example in range(batch.num_examples) if batch.num_labels[example]]
    order = sorted(
        learned or range(batch.num_examples),
        key=lambda example: (batch.labels_of([example]) <= tried_labels, lengths[example]),
    )
    first = {batch.mean_labels[example]: example for example in reversed(order)}.values()
    chosen = sorted(order, key=lambda example: example not in first)[:LOSS_EXAMPLES]
    while len(chosen) > 2 and len(chosen) * lengths[chosen].max() > lengths.max():
        chosen.pop()
    return sorted(chosen if len(chosen) > 1 else chosen * 2, key=lambda example: batch.mean_labels[example])


def _follows(whole: _Outcome, part: _Outcome, kind: str) -> Follows | None:
    if any(one == other for one, other in zip(whole.widths, part.widths, strict=True)):
        return None
    leaves = [tree_flatten(getattr(outcome, kind))[0] for outcome in (whole, part)]
    return [
        {dim for dim in range(1, one.ndim) if one.shape[dim] != other.shape[dim]}
        if isinstance(one, torch.Tensor)
        else set()
        for one, other in zip(*leaves, strict=True)
    ]
