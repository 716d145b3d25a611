"""Items are counted as the losses count them; compared with loops and with cross-entropy itself."""

from math import isfinite
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from hf_mbp.items import (
    changed_first_labels,
    checked_count,
    count_items,
    has_token_labels,
    is_regression,
    items_of,
    shift_probes,
    with_an_item,
)
from tests.examples import examples
from tests.helpers import bert_config, llama_config

quick = examples(60)

CLASSES = 6
some_labels = st.sampled_from([-100, -100, 0, 1, 5])


def tables(cells: Any, *, min_width: int = 1) -> Any:
    """Tables of 1 to 4 rows."""
    return st.integers(min_width, 5).flatmap(
        lambda width: st.lists(st.lists(cells, min_size=width, max_size=width), min_size=1, max_size=4)
    )


def losses(labels: torch.Tensor, *, shifts: bool) -> torch.Tensor:
    """Loss of every target there is, by PyTorch, for logits that depend on the position."""
    logits = torch.arange(labels.numel() * CLASSES).view(*labels.shape, CLASSES).float().sin()
    if shifts:
        logits, labels = logits[:, :-1], labels[:, 1:]
    each = cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1), reduction="none")
    return each[labels.reshape(-1) != -100]


def mean_loss(labels: torch.Tensor, *, shifts: bool) -> float:
    each = losses(labels, shifts=shifts)
    return float(each.sum() / len(each)) if len(each) else float("nan")


# count_items


@pytest.mark.parametrize("shifts", [False, True])
@given(table=tables(some_labels))
@quick
def test_items_are_the_targets_of_the_loss(table: list[list[int]], shifts: bool) -> None:
    labels = torch.tensor(table)
    assert count_items({"labels": labels}, shifts=shifts) == len(losses(labels, shifts=shifts))
    assert count_items({"labels": labels}, shifts=shifts) == sum(x != -100 for row in table for x in row[shifts:])


@pytest.mark.parametrize("shifts", [False, True])
@given(table=tables(some_labels))
@quick
def test_weighing_by_items_gives_the_mean_of_all(table: list[list[int]], shifts: bool) -> None:
    labels = torch.tensor(table)
    each = losses(labels, shifts=shifts)
    sums = [float(part.sum()) for part in each.split([count_items({"labels": r[None]}, shifts=shifts) for r in labels])]
    assert sum(sums) == pytest.approx(float(each.sum()))


@given(labels=st.lists(some_labels, min_size=1, max_size=8), shifts=st.booleans())
@quick
def test_class_labels_never_shift(labels: list[int], shifts: bool) -> None:
    assert count_items({"labels": torch.tensor(labels)}, shifts=shifts) == sum(label != -100 for label in labels)


@given(table=tables(some_labels), shifts=st.booleans())
@quick
def test_shifted_labels_count_where_given(table: list[list[int]], shifts: bool) -> None:
    inputs = {"labels": torch.ones(9, 9, dtype=torch.long), "shift_labels": torch.tensor(table)}
    assert count_items(inputs, shifts=shifts) == sum(x != -100 for row in table for x in row)


@pytest.mark.parametrize("shifts", [False, True])
@pytest.mark.parametrize(
    "labels",
    [torch.tensor([-100.0, 1.0, 2.0]), torch.full((3, 4), -100.0), torch.ones(3, 4, dtype=torch.bfloat16), None],
)
def test_rows_count_without_integer_labels(labels: torch.Tensor | None, shifts: bool) -> None:
    inputs = {"input_ids": torch.zeros(3, 8), "labels": labels}
    assert count_items(inputs, shifts=shifts) == 3


@pytest.mark.parametrize("shifts", [False, True])
def test_rows_count_for_a_regression_on_integers(shifts: bool) -> None:
    labels = torch.tensor([-100, 3, 4])
    assert count_items({"labels": labels}, shifts=shifts, is_regression=True) == 3
    assert count_items({"labels": labels}, shifts=shifts) == 2


def test_labels_of_several_dimensions_shift_along_the_last() -> None:
    labels = torch.tensor([[[1, 2, 3], [1, -100, -100]], [[-100, 4, -100], [1, 2, 3]]])
    assert count_items({"labels": labels}, shifts=True) == 5
    assert count_items({"labels": labels}, shifts=False) == 8


# items_of


def test_whether_the_loss_shifts_is_asked_for_token_labels_only() -> None:
    """To find out is a forward pass, or an error where there is nothing to try it with."""

    def ask(inputs: Any) -> bool:
        raise AssertionError("it makes no difference here")

    labels = torch.tensor([[5, 7, -100]])
    for inputs, items in [
        ({"labels": labels, "shift_labels": labels}, 2),
        ({"labels": torch.tensor([1, 2, -100])}, 2),
        ({"labels": torch.zeros(2, 0, dtype=torch.long)}, 0),
        ({"input_ids": labels}, 1),
    ]:
        assert items_of(inputs, None, ask) == items
    assert items_of({"labels": labels}, None, lambda inputs: True) == 1


# checked_count


@pytest.mark.parametrize("count", [0, 0.0, 3, 0.5])
def test_a_count_may_be_zero_and_need_not_be_an_integer(count: float) -> None:
    assert checked_count(count) == count


@pytest.mark.parametrize("count", [-1, float("nan"), "3", None])
def test_what_is_no_count_is_refused(count: Any) -> None:
    with pytest.raises(ValueError, match=r"num_items\(micro_batch\) must return a number"):
        checked_count(count)


# is_regression


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification", "single_label_classification"])
@pytest.mark.parametrize("num_labels", [1, 3])
def test_a_regression_is_what_counts_any_number_as_a_target(num_labels: int, problem: str | None) -> None:
    """By the loss of transformers: a class of -100 has none."""
    if (num_labels, problem) == (1, "single_label_classification"):
        problem = None  # one class is refused by the configuration
    labels = torch.full((2, num_labels) if problem == "multi_label_classification" else (2,), -100)
    config = bert_config(num_labels=num_labels, problem_type=problem)
    counts = is_regression(config, labels)
    if problem == "regression" and num_labels > 1:
        labels = labels[:, None].expand(-1, num_labels)
    if problem == "multi_label_classification":
        labels = labels.float()
    loss = ForSequenceClassificationLoss(labels, torch.zeros(2, num_labels), config)
    assert counts == isfinite(float(loss))


def test_a_language_model_with_one_label_is_no_regression() -> None:
    config = llama_config(num_labels=1)
    assert not is_regression(config, torch.ones(2, 3, dtype=torch.long))
    assert is_regression(config, torch.ones(2, 1, dtype=torch.long))


# has_token_labels


@pytest.mark.parametrize(
    ("labels", "has_tokens"),
    [
        (torch.ones(2, 3, dtype=torch.long), True),
        (torch.ones(2, 3, 4, dtype=torch.int32), True),
        (torch.ones(2, dtype=torch.long), False),
        (torch.zeros(2, 0, dtype=torch.long), False),
        (torch.ones(2, 3), False),
        ([[1, 2]], False),
        (None, False),
    ],
)
def test_token_labels_are_integers_of_two_dimensions(labels: Any, has_tokens: bool) -> None:
    assert has_token_labels({"labels": labels}) == has_tokens


# shift_probes


@given(tables(some_labels, min_width=2))
@quick
def test_only_a_loss_that_does_not_shift_has_something_to_learn_in_one_probe(table: list[list[int]]) -> None:
    none, first = (probe["labels"] for probe in shift_probes({"labels": torch.tensor(table)}))
    assert len(losses(none, shifts=True)) == len(losses(first, shifts=True)) == 0
    assert len(losses(none, shifts=False)) == 0
    assert len(losses(first, shifts=False)) == len(table)


def test_probes_differ_from_the_inputs_in_the_labels_only() -> None:
    inputs = {
        "input_ids": torch.arange(6).view(2, 3),
        "labels": torch.full((2, 3), 4),
        "scale": torch.tensor(3.0),
        "name": "x",
    }
    for probe in (*shift_probes(inputs), *changed_first_labels(inputs)):
        assert probe["input_ids"] is inputs["input_ids"]
        assert probe["scale"] is inputs["scale"]
        assert probe["name"] == "x"
    assert inputs["labels"].tolist() == [[4, 4, 4], [4, 4, 4]]
    assert shift_probes(inputs)[1]["labels"].tolist() == [[4, -100, -100]] * 2


def test_other_labels_are_those_of_the_batch() -> None:
    """A loss of the user's own may not know -100."""
    same, changed = changed_first_labels({"labels": torch.tensor([[4, 4, 7], [7, 4, 4]])})
    assert same["labels"].tolist() == [[4, 4, 7], [7, 4, 4]]
    assert changed["labels"].tolist() == [[7, 4, 7], [4, 4, 4]]


# with_an_item


@pytest.mark.parametrize("shifts", [False, True])
@given(table=tables(some_labels, min_width=2))
@quick
def test_the_loss_is_a_number_afterwards(table: list[list[int]], shifts: bool) -> None:
    inputs = {"labels": torch.tensor(table), "input_ids": torch.ones(len(table), len(table[0]))}
    filled = with_an_item(inputs)
    assert isfinite(mean_loss(filled["labels"], shifts=shifts))
    assert inputs["labels"].tolist() == table
    assert filled["input_ids"] is inputs["input_ids"]


@given(tables(some_labels, min_width=2))
@quick
def test_what_has_items_stays_as_it_is(table: list[list[int]]) -> None:
    inputs = {"labels": torch.tensor(table)}
    has_items = count_items(inputs, shifts=True) > 0
    assert (with_an_item(inputs) is inputs) == has_items


def test_class_labels_get_an_item_too() -> None:
    assert count_items(with_an_item({"labels": torch.tensor([-100, -100])}), shifts=False) > 0


def test_rows_of_one_token_get_an_item_for_a_loss_that_shifts() -> None:
    column = torch.tensor([[7], [8]])
    filled = with_an_item({"input_ids": column, "attention_mask": torch.ones_like(column), "labels": column})
    assert count_items(filled, shifts=True) > 0
    assert {value.shape for value in filled.values()} == {(2, 2)}


def test_empty_rows_get_a_token_and_an_item() -> None:
    nothing = torch.zeros(2, 0, dtype=torch.long)
    filled = with_an_item({"input_ids": nothing, "attention_mask": nothing, "labels": nothing})
    assert count_items(filled, shifts=True) > 0
    assert bool(filled["attention_mask"].all())
    assert {value.shape for value in filled.values()} == {(2, 2)}


def test_shifted_labels_get_an_item_where_the_loss_reads_them() -> None:
    none = torch.full((2, 3), -100)
    assert count_items(with_an_item({"labels": none, "shift_labels": none}), shifts=True) > 0


@pytest.mark.parametrize("inputs", [{"input_ids": torch.ones(2, 3)}, {"labels": torch.full((2,), -100.0)}])
def test_inputs_whose_items_are_rows_stay_as_they_are(inputs: dict[str, Any]) -> None:
    assert with_an_item(inputs) is inputs
