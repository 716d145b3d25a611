"""Which rows an evaluation is tried on, what one batch leaves for the next to show, and what stock's count does."""

from dataclasses import replace
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

from hf_mbp.distributed import Ranks
from hf_mbp.eval_batch import EvalBatch
from hf_mbp.eval_trial import (
    LOSS_EXAMPLES,
    MOST_LABELS,
    CountEffect,
    EvalTraits,
    EvalTrial,
    _Outcome,
    loss_examples,
    two_examples,
)
from tests.helpers import Pad, bert_config, build, mbp_trainer


def batch_of(lengths: list[int], labels: Any = None, **inputs: Any) -> EvalBatch:
    rows = [{"input_ids": [7] * length, "attention_mask": [1] * length} for length in lengths]
    classes = {} if labels is None else {"labels": torch.tensor(labels)}
    return EvalBatch(inputs={**Pad()(rows), **classes, **inputs})


# Which rows


def test_a_short_row_is_tried_beside_a_longer_one() -> None:
    assert two_examples(batch_of([5, 2, 9, 3])) == (1, 3)
    assert two_examples(batch_of([4, 4])) == (0, 1), "as there is no longer one"
    assert two_examples(batch_of([4])) == (0, 0)


def test_a_row_without_labels_is_tried_only_if_there_is_no_other() -> None:
    labels = [[-100] * 4, [-100, 5, 5, -100], [-100, 5, 5, 5]]
    assert two_examples(batch_of([2, 3, 4], labels)) == (1, 2)


def test_the_longer_row_is_longer_in_all_parts() -> None:
    """Or the padding of one part would not be tried."""
    batch = replace(batch_of([2, 4, 3], [[5, 6, -100, -100], [5, 6, -100, -100], [5, 6, 7, -100]]), has_targets=True)
    assert batch.sizes(cuts=True).tolist() == [[2, 2], [4, 2], [3, 3]]
    assert two_examples(batch) == (0, 2)
    assert two_examples(batch_of([3, 3, 9])) == (0, 2)


def test_the_loss_is_tried_on_rows_of_other_labels_first_and_never_on_more_than_the_longest_row() -> None:
    labels = [0, 0, 0, 1, 0, 2]
    assert loss_examples(batch_of([3, 3, 3, 3, 12, 3], labels), frozenset()) == [0, 1, 3, 5]
    assert loss_examples(batch_of([3, 3, 3, 3, 6, 3], labels), frozenset()) == [0, 3]
    assert 5 in loss_examples(batch_of([3, 3, 3, 3, 6, 3], labels), frozenset({0, 1}))
    many = loss_examples(batch_of([1] * 20 + [99], [index % 2 for index in range(21)]), frozenset())
    assert len(many) == LOSS_EXAMPLES
    assert loss_examples(batch_of([2]), frozenset()) == [0, 0], "one is tried twice"


def test_the_loss_is_not_tried_on_rows_without_labels() -> None:
    labels = [[-100] * 3, [-100, 5, -100], [-100, 6, 6], [-100] * 3]
    assert loss_examples(batch_of([1, 3, 3, 30], labels), frozenset()) == [1, 2]
    assert loss_examples(batch_of([2, 3], [[-100] * 3] * 2), frozenset()) == [0, 1]


# What is known, and what a batch leaves open

TRIED = EvalTraits(splits=True, cuts=True, tried_parts=frozenset({0}), tried_labels=frozenset({0, 1}))
EVEN, UNEVEN = batch_of([3, 3], [0, 1]), batch_of([2, 3], [0, 1])


def test_padding_is_cut_where_it_was_tried() -> None:
    assert TRIED.cuts_of(UNEVEN)
    assert not replace(TRIED, cuts=False).cuts_of(UNEVEN)
    assert not replace(TRIED, tried_parts=frozenset()).cuts_of(UNEVEN)
    assert replace(TRIED, tried_parts=frozenset()).cuts_of(EVEN), "nothing is cut there"
    assert not TRIED.cuts_of(batch_of([2, 3], start_positions=torch.tensor([0, 1])))


@pytest.mark.parametrize(
    ("traits", "batch", "is_open"),
    [
        (TRIED, UNEVEN, False),
        (replace(TRIED, tried_parts=frozenset()), UNEVEN, True),
        (replace(TRIED, tried_parts=frozenset()), EVEN, False),
        (replace(TRIED, tried_parts=frozenset(), cuts=False), UNEVEN, False),
        (replace(TRIED, tried_parts=frozenset(), splits=False), UNEVEN, False),
        (TRIED, batch_of([3, 3], [0, 2]), True),
        (TRIED, batch_of([3, 3], [2, 2]), False),
        (replace(TRIED, tried_labels=frozenset()), batch_of([3, 3], [2, 2]), True),
        (replace(TRIED, tried_labels=frozenset(range(1, 1 + MOST_LABELS))), batch_of([3, 3], [0, 99]), False),
    ],
)
def test_a_batch_is_tried_if_it_could_show_something_new(traits: EvalTraits, batch: EvalBatch, is_open: bool) -> None:
    assert traits.leaves_open(batch) == is_open


def test_what_a_later_batch_shows_is_added_to_what_is_known() -> None:
    later = EvalTraits(splits=True, cuts=True, tried_parts=frozenset({1}), tried_labels=frozenset({5}))
    known = replace(TRIED, follows=[{1}])
    joined = known.joined(later)
    assert (joined.cuts, joined.tried_parts, joined.tried_labels) == (True, {0, 1}, {0, 1, 5})
    assert joined.follows == [{1}]
    assert known.joined(replace(later, follows=[{2}])).follows == [{2}]
    assert not replace(known, cuts=False).joined(later).cuts
    assert not known.joined(replace(later, cuts=False)).cuts
    assert not known.joined(replace(later, splits=False)).splits


# What stock's count does


@pytest.mark.parametrize(
    ("effect", "factor"),
    [
        (CountEffect(), 0.75),
        (CountEffect(times=2), 1.5),
        (CountEffect(divides=False), 1.0),
        (CountEffect(divides=False, times=2), 2.0),
    ],
)
def test_the_factor_of_a_mean_over_items(effect: CountEffect, factor: float) -> None:
    """3 items, of which stock counts 4."""
    assert effect.factor(3, 4) == factor
    assert effect.factor(3, 0) == effect.times


@pytest.mark.parametrize("loss", [0.0, nan])
def test_a_loss_of_nothing_tells_nothing(loss: float, tmp_path: Path) -> None:
    trainer = mbp_trainer(build(BertForSequenceClassification, bert_config()), [], tmp_path)
    ranks = Ranks(trainer.accelerator)
    tried = EvalTrial(trainer, ranks, lambda inputs: (torch.tensor(loss), None, None), None, lambda inputs: 1.0)
    assert tried.count_effect(batch_of([2, 3], [0, 1])) == CountEffect()


# What is alike


def trial(*, dtype: torch.dtype = torch.float32, mixed_precision: str = "no") -> EvalTrial:
    model = torch.nn.Linear(1, 1).to(dtype)
    trainer: Any = SimpleNamespace(model=model, accelerator=SimpleNamespace(mixed_precision=mixed_precision))
    return EvalTrial(trainer, SimpleNamespace(), lambda inputs: (None, None, None), None, lambda inputs: 1.0)


@pytest.mark.parametrize(
    ("one", "other", "is_alike"),
    [
        ([1.0, 1000.0], [1.01, 1000.0], True),
        ([1.0, 1000.0], [1.0, 1001.0], False),
        ([1.0, nan, inf], [1.0, nan, inf], True),
        ([1.0, nan], [1.0, 1.0], False),
        ([inf, -inf], [inf, -inf], True),
        ([1] * 20, [1] * 19 + [2], True),
        ([1] * 20, [1] * 16 + [2] * 4, False),
        ([], [], True),
    ],
)
def test_outputs_are_alike_up_to_rounding(one: list[Any], other: list[Any], is_alike: bool) -> None:
    assert trial()._alike(torch.tensor(one), torch.tensor(other)) == is_alike


@pytest.mark.parametrize(
    ("whole", "parts", "is_same"),
    [
        (2.0, [(1.0, 1), (3.0, 1)], True),
        (2.5, [(1.0, 1), (3.0, 3)], True),
        (2.0, [(1.0, 1), (3.0, 3)], False),
        (1.0, [(1.0, 2), (nan, 0)], True),
        (nan, [(nan, 1), (1.0, 1)], True),
        (nan, [(1.0, 1), (1.0, 1)], False),
        (1.0, [(nan, 1), (1.0, 1)], False),
        (nan, [(nan, 0), (nan, 0)], True),
        (None, [(None, 1), (None, 1)], True),
    ],
)
def test_a_loss_is_the_mean_over_the_items_of_its_parts(whole: Any, parts: list[Any], is_same: bool) -> None:
    def outcome(loss: Any, num_items: float) -> _Outcome:
        return _Outcome(widths=[], num_items=num_items, loss=loss, is_counted=False, raw=None, processed=None)

    of_all = outcome(whole, sum(count for _, count in parts))
    assert trial()._same_loss(of_all, [outcome(*part) for part in parts]) == is_same


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"mixed_precision": "bf16"}])
def test_rounding_is_larger_in_half_precision(options: dict[str, Any]) -> None:
    one, other = torch.tensor([1.0, 1000.0]), torch.tensor([1.0, 1020.0])
    assert trial(**options)._alike(one, other)
    assert not trial()._alike(one, other)
    assert not trial(**options)._alike(one, other + 100)


@pytest.mark.parametrize(
    ("shape", "part", "is_same"),
    [
        ((2, 3), [[0.0, 1.0, 2.0]], True),
        ((2, 3), [[0.0, 1.0]], True),
        ((2, 3), [[0.0, 1.0, 3.0]], False),
        ((3, 3), [[0.0, 1.0, 2.0]], False),
        ((2, 3), [0.0, 1.0, 2.0], False),
        ((2, 3), 0.0, False),
        ((4, 1), [[0.0], [2.0]], True),
        ((4, 1), [[0.0], [1.0]], False),
        ((6, 1), [[0.0], [2.0], [4.0]], False),
        ((2, 3), None, False),
    ],
)
def test_an_example_has_the_outputs_that_it_has_alone(shape: tuple[int, ...], part: Any, is_same: bool) -> None:
    """As far as both have columns; a pair has a row in each half."""
    together = torch.arange(float(torch.Size(shape).numel())).view(shape)
    assert trial()._same(together, None if part is None else torch.tensor(part), 0) == is_same
