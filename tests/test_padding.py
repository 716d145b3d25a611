"""Padding is found, cut off and made harmless; compared with loops over rows and columns."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mbp.padding import (
    IGNORE_INDEX,
    can_be_cut,
    cut_columns,
    is_left_padded,
    settle_left_padding,
    trim,
    width_of,
    with_padding,
    without_padding,
)
from tests.examples import examples
from tests.helpers import Pad

quick = examples(60)

row_lengths = st.lists(st.integers(1, 7), min_size=1, max_size=5)
masks = st.integers(1, 6).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 1), min_size=width, max_size=width), min_size=1, max_size=5)
)


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Rows whose tokens, and labels, all differ."""
    starts = [10 * index + 1 for index in range(len(lengths))]
    token_ids = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [i + 500 for i in ids]} for ids in token_ids]


# width_of, is_left_padded


def test_width_is_that_of_the_mask() -> None:
    assert width_of({"attention_mask": torch.ones(2, 7), "input_ids": torch.ones(2, 9)}) == 7


@pytest.mark.parametrize("inputs", [{}, {"attention_mask": torch.ones(2, 3, 7)}, {"attention_mask": [[1, 1]]}])
def test_no_width_without_a_mask_of_two_dimensions(inputs: dict[str, Any]) -> None:
    assert width_of(inputs) is None
    assert not is_left_padded(inputs)
    assert all(value is inputs[key] for key, value in trim(inputs).items())


@given(row_lengths)
@quick
def test_left_padding_is_found_if_there_is_any(lengths: list[int]) -> None:
    is_uneven = len(set(lengths)) > 1
    assert is_left_padded(Pad(side="left")(rows_of(lengths))) == is_uneven
    assert not is_left_padded(Pad(side="right")(rows_of(lengths)))


@given(masks)
@quick
def test_a_row_is_left_padded_if_it_starts_with_padding_and_ends_with_a_token(mask: list[list[int]]) -> None:
    assert is_left_padded({"attention_mask": torch.tensor(mask)}) == any(row[0] == 0 and row[-1] == 1 for row in mask)


def test_a_batch_without_columns_is_not_padded() -> None:
    assert not is_left_padded({"attention_mask": torch.ones(2, 0)})


# trim


@given(masks)
@quick
def test_trim_cuts_the_outer_columns_that_are_all_padding(mask: list[list[int]]) -> None:
    used = [column for column in range(len(mask[0])) if any(row[column] for row in mask)]
    kept = range(min(used), max(used) + 1) if used else range(len(mask[0]))
    token_ids = torch.arange(len(mask) * len(mask[0])).view(len(mask), -1)
    inputs = {
        "attention_mask": torch.tensor(mask),
        "input_ids": token_ids,
        "inputs_embeds": token_ids[..., None].float(),
    }
    trimmed = trim(inputs)
    assert trimmed["attention_mask"].tolist() == [[row[column] for column in kept] for row in mask]
    assert trimmed["input_ids"].tolist() == [[row[column] for column in kept] for row in token_ids.tolist()]
    assert torch.equal(trimmed["inputs_embeds"][..., 0].long(), trimmed["input_ids"])


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=row_lengths)
@quick
def test_trimmed_rows_are_those_padded_on_their_own(side: str, lengths: list[int]) -> None:
    rows, pad = rows_of(lengths), Pad(side=side)
    wide = pad([*rows, *rows_of([8])])
    trimmed = trim({key: value[:-1] for key, value in wide.items()})
    assert {key: value.tolist() for key, value in trimmed.items()} == {k: v.tolist() for k, v in pad(rows).items()}


def test_trim_keeps_labels_of_tokens_that_are_masked() -> None:
    """An end token that also pads is masked where the mask is made of that, and still is to be learned."""
    inputs = {
        "input_ids": torch.tensor([[5, 6, 2, 2]]),
        "attention_mask": torch.tensor([[1, 1, 0, 0]]),
        "labels": torch.tensor([[5, 6, 2, -100]]),
    }
    assert trim(inputs)["labels"].tolist() == [[5, 6, 2]]


def test_trim_leaves_what_is_not_as_wide() -> None:
    inputs = {"attention_mask": torch.tensor([[1, 1, 0, 0]]), "labels": torch.tensor([1]), "other": torch.ones(1, 9)}
    trimmed = trim({**inputs, "name": "x"})
    assert trimmed["attention_mask"].shape == (1, 2)
    assert trimmed["labels"] is inputs["labels"]
    assert trimmed["other"] is inputs["other"]
    assert trimmed["name"] == "x"


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=row_lengths, multiple=st.integers(1, 5))
@quick
def test_trim_rounds_widths_as_the_collator_does(side: str, lengths: list[int], multiple: int) -> None:
    rows, pad = rows_of(lengths), Pad(side=side, pad_to_multiple_of=multiple)
    wide = pad([*rows, *rows_of([11])])
    trimmed = trim({key: value[:-1] for key, value in wide.items()}, multiple_of=multiple)
    assert {key: value.tolist() for key, value in trimmed.items()} == {k: v.tolist() for k, v in pad(rows).items()}


def test_rounding_goes_no_further_than_there_are_columns() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    assert trim({"attention_mask": mask}, multiple_of=4)["attention_mask"].tolist() == [[0, 1, 1, 1]]
    assert trim({"attention_mask": mask}, multiple_of=8)["attention_mask"].tolist() == mask.tolist()


TARGETS = {
    "input_ids": torch.tensor([[5, 6, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 0, 0, 0]]),
    "labels": torch.tensor([[-100, 8, -100, -100]]),
    "decoder_input_ids": torch.tensor([[1, 2, 3, 4]]),
}


@pytest.mark.parametrize(("decoder_mask", "num_targets"), [(None, 2), ([0, 1, 0, 0], 2), ([1, 1, 1, 0], 3)])
def test_targets_are_cut_by_themselves_from_behind(decoder_mask: list[int] | None, num_targets: int) -> None:
    """A decoder is fed with its targets one place further on, and counts from the first, whether it counts or not."""
    masks = {} if decoder_mask is None else {"decoder_attention_mask": torch.tensor([decoder_mask])}
    trimmed = trim({**TARGETS, **masks}, has_targets=True)
    assert trimmed["input_ids"].tolist() == [[5, 6]]
    for key in ("labels", "decoder_input_ids", *masks):
        assert trimmed[key].tolist() == [(TARGETS | masks)[key][0, :num_targets].tolist()]


def test_labels_of_as_many_columns_as_the_tokens_may_be_targets() -> None:
    inputs = {**TARGETS, "labels": torch.tensor([[7, 8, 9, 2, -100]])}
    assert trim(inputs, has_targets=True)["labels"].tolist() == [[7, 8, 9, 2]]
    assert trim(inputs, has_targets=True)["input_ids"].tolist() == [[5, 6]]


def test_each_mask_speaks_for_the_columns_of_its_own_name() -> None:
    inputs = {
        "sentence_0_input_ids": torch.arange(6).view(2, 3),
        "sentence_0_attention_mask": torch.tensor([[1, 0, 0], [1, 0, 0]]),
        "sentence_1_input_ids": torch.arange(8).view(2, 4),
        "sentence_1_attention_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0]]),
        "input_ids": torch.arange(6).view(2, 3),
        "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 0]]),
    }
    widths = {key: value.shape[1] for key, value in trim(inputs).items()}
    assert widths == {key: 2 if key in ("input_ids", "attention_mask") else 1 + 2 * ("_1_" in key) for key in inputs}


def test_a_mask_of_sounds_stays_as_wide_as_they_are() -> None:
    """Frames may be fewer than what the mask has a place for; a model that finds the mask shorter would fail."""
    inputs = {"input_features": torch.rand(1, 3, 8), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    assert trim(inputs)["attention_mask"].shape == (1, 4)


def test_targets_that_are_floats_are_no_labels_of_tokens() -> None:
    tokens = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])}
    assert trim({**tokens, "labels": torch.rand(2, 4)})["input_ids"].shape == (2, 4)
    assert trim({**tokens, "labels": torch.rand(2, 3)})["input_ids"].shape == (2, 2)
    boxes = torch.rand(2, 4, 4).long()
    assert trim({**tokens, "labels": torch.rand(2, 4, 6)})["labels"].shape == (2, 2, 6)
    assert trim({**tokens, "bbox": boxes})["input_ids"].shape == (2, 4), "four corners, or four tokens"


# cut_columns


def test_cut_keeps_the_first_columns_and_the_last_of_what_holds_tokens() -> None:
    inputs = {
        "input_ids": torch.arange(20).view(2, 10),
        "attention_mask": torch.ones(2, 10),
        "choices": torch.arange(40).view(2, 2, 10),
        "bbox": torch.arange(80).view(2, 10, 4),
        "classes": torch.tensor([[1, 0, 1]] * 2),
        "labels": torch.tensor([7, 8]),
        "targets": torch.tensor([[0.5, 0.25, 0.125]] * 2),
        "scale": torch.tensor(2.0),
        "name": "x",
    }
    cut = cut_columns(inputs, 4)
    assert cut["input_ids"].tolist() == [[0, 1, 2, 9], [10, 11, 12, 19]]
    assert cut["bbox"].shape == (2, 4, 4)
    assert cut["attention_mask"].shape == (2, 4)
    assert cut["choices"][:, 1].tolist() == [[10, 11, 12, 19], [30, 31, 32, 39]]
    assert all(cut[key] is inputs[key] for key in ("classes", "labels", "targets", "scale", "name"))
    assert all(value.is_contiguous() for value in cut.values() if torch.is_tensor(value))


def test_cut_leaves_rows_that_are_short_enough() -> None:
    inputs = {"input_ids": torch.ones(2, 10, dtype=torch.long)}
    assert cut_columns(inputs, 10) is inputs


# without_padding, with_padding


def test_the_last_row_alone_is_as_long_as_it_is_and_has_something_to_learn() -> None:
    inputs = Pad(side="left")(rows_of([4, 2]))
    inputs["labels"][:] = IGNORE_INDEX
    row = without_padding(inputs)
    assert row["input_ids"].tolist() == [[11, 12]]
    assert row["attention_mask"].tolist() == [[1, 1]]
    assert row["labels"][0, 1] >= 0
    assert bool((inputs["labels"] == IGNORE_INDEX).all())


def test_padding_stands_behind_the_first_row_of_a_copy() -> None:
    inputs = {"attention_mask": torch.ones(2, 3)}
    assert with_padding(inputs)["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert bool(inputs["attention_mask"].all())
    for as_it_is in ({"attention_mask": torch.ones(2, 1)}, {"input_ids": torch.ones(2, 3)}):
        assert with_padding(as_it_is) is as_it_is


# settle_left_padding


def items_of(labels: torch.Tensor) -> list[list[int]]:
    """Targets that a shifting loss counts, of each row."""
    return [[label for label in row[1:] if label != IGNORE_INDEX] for row in labels.tolist()]


@given(lengths=row_lengths, extra=st.integers(0, 3))
@quick
def test_items_of_a_row_do_not_depend_on_its_batch(lengths: list[int], extra: int) -> None:
    rows = rows_of(lengths)
    together = Pad(side="left")([*rows, *rows_of([max(lengths) + extra])])
    settled = settle_left_padding(together, add_position_ids=False)
    assert items_of(settled["labels"])[:-1] == [row["labels"][1:] for row in rows]


def test_without_settling_the_items_of_a_row_depend_on_its_batch() -> None:
    rows = rows_of([3, 5])
    assert items_of(Pad(side="left")(rows)["labels"])[0] == rows[0]["labels"]
    assert items_of(Pad(side="left")(rows[:1])["labels"])[0] == rows[0]["labels"][1:]


@given(lengths=row_lengths)
@quick
def test_positions_count_from_the_first_token(lengths: list[int]) -> None:
    inputs = Pad(side="left")(rows_of([*lengths, 9]))
    positions = settle_left_padding(inputs, add_position_ids=True)["position_ids"]
    for row, length in zip(positions.tolist(), lengths, strict=False):
        assert row[9 - length :] == list(range(length))
        assert all(0 <= position < 9 for position in row)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    inputs = Pad(side="left")(rows_of([2, 4]))
    inputs["attention_mask"] = inputs["attention_mask"].to(dtype)
    settled = settle_left_padding(inputs, add_position_ids=True)
    assert settled["labels"].tolist() == [[-100, -100, -100, 502], [-100, 512, 513, 514]]
    assert settled["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert settled["position_ids"].dtype == torch.int64


def test_only_the_first_token_of_a_row_is_no_target() -> None:
    """Tokens may be masked, as end tokens are where they also pad, and be learned."""
    inputs = {"attention_mask": torch.tensor([[0, 1, 0, 1]]), "labels": torch.tensor([[-100, 5, 2, 6]])}
    assert settle_left_padding(inputs, add_position_ids=False)["labels"].tolist() == [[-100, -100, 2, 6]]


def test_the_collated_inputs_are_not_changed() -> None:
    inputs = Pad(side="left")(rows_of([2, 4]))
    before = {key: value.clone() for key, value in inputs.items()}
    settle_left_padding(inputs, add_position_ids=True)
    assert inputs.keys() == before.keys()
    assert all(torch.equal(inputs[key], before[key]) for key in before)


def test_positions_that_are_given_or_not_wanted() -> None:
    inputs = Pad(side="left")(rows_of([2, 4]))
    given_ids = torch.full((2, 4), 7)
    assert "position_ids" not in settle_left_padding(inputs, add_position_ids=False)
    assert (
        settle_left_padding({**inputs, "position_ids": given_ids}, add_position_ids=True)["position_ids"] is given_ids
    )


def test_right_padding_is_left_alone() -> None:
    inputs = Pad(side="right")(rows_of([2, 4]))
    assert settle_left_padding(inputs, add_position_ids=True) is inputs


def test_labels_of_another_shape_are_left_alone() -> None:
    inputs = {**Pad(side="left")(rows_of([2, 4])), "labels": torch.tensor([1, 0])}
    assert settle_left_padding(inputs, add_position_ids=False)["labels"] is inputs["labels"]


# What only happens to be as wide


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(8).view(2, 4),
        torch.arange(8.0).view(2, 4),
        torch.arange(32).view(2, 4, 4),
        torch.arange(24).view(2, 3, 4),
    ],
    ids=["categories", "weights", "pairs", "layers"],
)
def test_nothing_is_cut_beside_values_that_may_or_may_not_follow_the_tokens(values: torch.Tensor) -> None:
    tokens = {"input_ids": torch.arange(8).view(2, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])}
    trimmed = trim({**tokens, "unknown": values})
    assert trimmed["input_ids"].shape == (2, 4)
    assert torch.equal(trimmed["unknown"], values)


def test_a_mask_of_floats_is_a_mask() -> None:
    inputs = {"input_ids": torch.ones(2, 4), "attention_mask": torch.tensor([[1.0, 1, 0, 0], [1, 0, 0, 0]])}
    assert trim(inputs)["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert cut_columns(inputs, 3)["attention_mask"].shape == (2, 3)


def test_rows_beside_something_as_wide_cannot_be_cut() -> None:
    tokens = {"input_ids": torch.ones(2, 4), "attention_mask": torch.ones(2, 4), "labels": torch.ones(2)}
    assert can_be_cut(tokens)
    assert not can_be_cut({**tokens, "weights": torch.rand(2, 4)})
    assert not can_be_cut({**tokens, "pixel_values": torch.rand(2, 3, 8, 8)})
    assert not can_be_cut({**tokens, "patches": torch.rand(7, 4)})
    assert not can_be_cut({"pixel_values": torch.rand(2, 3, 8, 8)})
