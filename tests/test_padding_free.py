"""Rows laid end to end are the rows, in order and whole, and nothing else; what cannot be laid so is told apart."""

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from hf_mbp.filler import WIDTH, filler_of, shortest_filler_of
from hf_mbp.padding import settle_left_padding
from hf_mbp.padding_free import BOUNDARIES, is_laid_end_to_end, laid_end_to_end, why_padded
from hf_mbp.plan import Budget, Layout, plan_segments
from hf_mbp.step import MicroBatch, as_filler, as_shortest_filler
from tests.helpers import Pad, masked_prefix, token_rows, with_labels

ROWS = with_labels(token_rows(7), masked_prefix)


def laid(inputs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return laid_end_to_end(inputs, **{"shifts_labels": True, "gives_boundaries": True, **changes})


def padded(side: str, rows: list[dict[str, Any]] = ROWS) -> dict[str, Any]:
    """Rows in the shape in which the trainer has them before they are laid end to end."""
    return settle_left_padding(Pad(side)(rows), add_position_ids=True)


# laid_end_to_end


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("shifts", [True, False])
def test_tokens_labels_and_positions_of_one_row_after_the_other(side: str, shifts: bool) -> None:
    result = laid(padded(side), shifts_labels=shifts)
    assert result["input_ids"].tolist() == [[token for row in ROWS for token in row["input_ids"]]]
    assert result["position_ids"].tolist() == [[place for row in ROWS for place in range(len(row["input_ids"]))]]
    firsts_count = not shifts and side == "right"  # padded left they were settled, as a loss that shifts needs it
    labels = [row["labels"] if firsts_count else [-100, *row["labels"][1:]] for row in ROWS]
    assert result["labels"].tolist() == [[label for row in labels for label in row]]
    assert "attention_mask" not in result


def test_boundaries_are_those_of_the_rows() -> None:
    result = laid(padded("right"))
    lengths = [len(row["input_ids"]) for row in ROWS]
    assert result["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]
    assert result["cu_seq_lens_q"].dtype == torch.int32
    assert result["cu_seq_lens_k"] is result["cu_seq_lens_q"]
    assert result["max_length_q"] == result["max_length_k"] == max(lengths)
    assert type(result["max_length_q"]) is int
    assert not {*BOUNDARIES} & laid(padded("right"), gives_boundaries=False).keys()


def test_what_transformers_flattens_itself_is_the_same() -> None:
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([dict(row) for row in ROWS])
    ours = laid(padded("right"))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def test_a_row_of_padding_only_is_left_out() -> None:
    inputs = padded("right")
    for key, fill in (("attention_mask", 0), ("labels", -100)):
        inputs[key][2] = fill
    others = padded("right", [row for index, row in enumerate(ROWS) if index != 2])
    assert why_padded(inputs) is None
    assert str(laid(inputs)) == str(laid(others))


def test_it_knows_what_it_has_made() -> None:
    inputs = padded("right")
    assert not is_laid_end_to_end(inputs)
    assert is_laid_end_to_end(laid(inputs))
    assert is_laid_end_to_end(laid(inputs, gives_boundaries=False))
    assert not is_laid_end_to_end({**laid(inputs), "seq_idx": torch.zeros(1, 3)})
    assert not is_laid_end_to_end({"labels": torch.zeros(1)})


# why_padded


def changed(**changes: Any) -> dict[str, Any]:
    inputs = {**padded("right"), **changes}
    return {key: value for key, value in inputs.items() if value is not None}


def poked(key: str, row: int, column: int, value: int) -> dict[str, Any]:
    inputs = padded("right")
    inputs[key][row, column] = value
    return inputs


SHAPE = padded("right")["input_ids"].shape
SHORT = min(range(len(ROWS)), key=lambda index: len(ROWS[index]["input_ids"]))
NUMBERED = padded("right")["attention_mask"] * torch.where(torch.arange(SHAPE[1]) < 2, 1, 2)
"""Two packed texts in each row, as some collators mark them."""
UNLABELLED = torch.full(SHAPE, -100)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (changed(pixel_values=torch.zeros(7, 3)), "their inputs have pixel_values, and only input_ids, "),
        (changed(seq_idx=torch.zeros(SHAPE)), "their inputs have seq_idx"),
        (changed(attention_mask=None), "the collator returns no attention_mask"),
        (changed(labels=None), "the collator returns no labels"),
        (changed(input_ids=None), "the collator returns no input_ids"),
        (changed(labels=torch.zeros(7, dtype=torch.long)), "labels has not one value for each token"),
        (changed(labels=torch.zeros(SHAPE)), "labels has not one value for each token"),
        (changed(attention_mask=torch.ones(7, 1, *SHAPE[1:] * 2)), "attention_mask has not one value for each token"),
        (changed(attention_mask=torch.zeros(SHAPE, dtype=torch.long)), "all their tokens are padding"),
        (poked("attention_mask", 0, 1, 0), "their attention_mask is not one run of ones a row"),
        (poked("attention_mask", 0, 1, 2), "their attention_mask is not one run of ones a row"),
        (changed(attention_mask=NUMBERED, labels=UNLABELLED), "their attention_mask is not one run of ones a row"),
        (poked("labels", SHORT, -1, 7), "padding has labels that count"),
        (Pad("left")(ROWS), "they are padded on the left, and positions count the padding"),
        (changed(position_ids=torch.arange(1, SHAPE[1] + 1).expand(SHAPE)), "their position_ids do not count each row"),
    ],
)
def test_what_cannot_be_laid_end_to_end(inputs: dict[str, Any], reason: str) -> None:
    assert str(why_padded(inputs)).startswith(reason)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_can_be(side: str) -> None:
    assert why_padded({**padded(side), "token_type_ids": torch.ones(SHAPE, dtype=torch.long)}) is None
    assert why_padded({**padded(side), "position_ids": (padded(side)["attention_mask"].cumsum(1) - 1)}) is None


# Fillers


@pytest.mark.parametrize("shortest", [True, False])
@pytest.mark.parametrize("gives_boundaries", [True, False])
def test_a_filler_is_the_first_row_with_a_label_that_counts(shortest: bool, gives_boundaries: bool) -> None:
    inputs = laid(padded("right"), gives_boundaries=gives_boundaries)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    made = shortest_filler_of(inputs, len(ROWS)) if shortest else filler_of(inputs, len(ROWS))
    row = ROWS[0]["input_ids"]
    assert len(row) > WIDTH
    width = WIDTH if shortest else len(row)
    assert made["input_ids"].tolist() == [row[:width]]
    assert made["position_ids"].tolist() == [list(range(width))]
    assert (made["labels"] != -100).tolist() == [[False] * (width - 1) + [True]]
    assert not {*BOUNDARIES} & made.keys()


def test_a_filler_of_one_token_has_a_second_to_predict() -> None:
    row = {"input_ids": [5], "attention_mask": [1], "labels": [5]}
    made = shortest_filler_of(laid(padded("right", [row, row])), 2)
    assert made["labels"].shape == made["input_ids"].shape == (1, 2)
    assert made["labels"][0, 1] != -100


def test_fillers_of_a_step_are_short_and_count_nothing() -> None:
    inputs = laid(padded("right"))
    whole = MicroBatch(inputs=inputs, num_rows=7, num_items=9, cells=99, tokens=99, layout=Layout.SEGMENTS)
    for make in (as_filler, as_shortest_filler):
        made = make(whole)
        assert made.inputs["input_ids"].numel() <= len(ROWS[0]["input_ids"])
        assert (made.num_rows, made.num_items, made.weight) == (0, 0, 0.0)


# plan_segments


def sizes_of(lengths: list[int]) -> Any:
    return np.array(lengths).reshape(-1, 1)


def bytes_of(budget: Budget, lengths: list[int]) -> float:
    return sum(budget.bytes_per_cell * length + budget.bytes_per_pair * length**2 for length in lengths)


def fits(budget: Budget, lengths: list[int]) -> bool:
    in_tokens = budget.max_tokens is None or sum(lengths) <= budget.max_tokens
    return in_tokens and (budget.max_bytes is None or bytes_of(budget, lengths) <= budget.max_bytes)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(max_tokens=60),
        Budget(max_bytes=900.0, bytes_per_cell=10.0, bytes_per_pair=0.3),
        Budget(max_tokens=45, max_bytes=900.0, bytes_per_cell=10.0, bytes_per_pair=0.3),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_each_row_once_within_the_budget_the_longest_first(budget: Budget, seed: int) -> None:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 70) for _ in range(40)]
    plan = plan_segments(sizes_of(lengths), budget)
    assert sorted(index for group in plan for index in group) == list(range(40))
    groups = [[lengths[index] for index in group] for group in plan]
    assert all(fits(budget, group) or len(group) == 1 for group in groups)
    flat = [length for group in groups for length in group]
    assert flat == sorted(lengths, reverse=True)
    # No cut is too many: the first row of a group would not have fitted into the one before.
    assert not any(fits(budget, [*one, other[0]]) for one, other in pairwise(groups))


def test_no_limit_is_one_micro_batch() -> None:
    assert plan_segments(sizes_of([3, 9, 4]), Budget()) == [[1, 2, 0]]


@pytest.mark.parametrize("count", range(1, 12))
def test_so_many_micro_batches_as_asked(count: int) -> None:
    lengths = [9, 8, 7, 6, 5, 5, 4, 3, 2, 1, 1]
    plan = plan_segments(sizes_of(lengths), Budget(max_tokens=100), num_micro_batches=count)
    assert len(plan) == count
    assert all(plan)
    assert sorted(index for group in plan for index in group) == list(range(11))


# Layout


def test_what_shape_rows_count_as() -> None:
    sizes = sizes_of([2, 3, 7])
    assert [layout.cells(sizes) for layout in Layout] == [21, 12, 12]
    shapes = [layout.shape(3, layout.cells(sizes)) for layout in Layout]
    assert shapes == [(3, 7), (3, 4), (1, 12)]
