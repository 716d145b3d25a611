"""Outputs of micro-batches are put in the places of their rows, as those of the whole batch would lie."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mbp.row_outputs import RowOutputs, num_bytes, to_device
from tests.examples import examples

quick = examples(60)


def put_together(outputs: RowOutputs, whole: Any, groups: list[list[int]], widths: list[int]) -> Any:
    """Outputs of groups of rows, each cut to the longest of its rows, are those of the whole, cut likewise."""
    for group in groups:
        width = max(widths[row] for row in group)
        outputs.put(whole[group][:, :width], group, [width], [whole.shape[1]])
    return outputs.value


@given(st.permutations(range(6)), st.lists(st.integers(1, 5), min_size=6, max_size=6), st.integers(1, 5))
@quick
def test_rows_come_back_in_their_order_and_what_was_cut_is_filled(
    order: list[int], widths: list[int], first: int
) -> None:
    whole = torch.arange(1, 31).view(6, 5)
    value = put_together(RowOutputs(6, fill=-100), whole, [order[:first], order[first:]], widths)
    assert value.shape == (6, 5)
    for row, expected, width in zip(value.tolist(), whole.tolist(), widths, strict=True):
        assert row[:width] == expected[:width]
        assert set(row[width:]) <= {-100, *expected[width:]}


def test_rows_of_pairs_are_all_chosen_ones_and_then_all_rejected_ones() -> None:
    outputs = RowOutputs(3, fill=0)
    whole = torch.arange(6)[:, None]
    for examples_of in ([2, 0], [1]):
        rows = [*examples_of, *(3 + example for example in examples_of)]
        outputs.put(whole[rows], examples_of, [], [])
    assert outputs.value.flatten().tolist() == list(range(6))


def test_what_micro_batches_give_may_grow() -> None:
    """As generated tokens do, and nothing of it is lost."""
    outputs = RowOutputs(3, fill=9, follows=[set()])
    outputs.put(torch.tensor([[1]]), [1], [4], [6])
    outputs.put(torch.tensor([[2, 3, 4]]), [0], [4], [6])
    outputs.put(torch.tensor([[5, 6]]), [2], [2], [6])
    assert outputs.value.tolist() == [[2, 3, 4], [1, 9, 9], [5, 6, 9]]


@pytest.mark.parametrize(
    ("follows", "shape"),
    [(None, (2, 7, 4)), ([{1}], (2, 7, 4)), ([{1, 2}], (2, 7, 7)), ([{2}], (2, 4, 7)), ([set()], (2, 4, 4))],
)
def test_only_what_follows_the_inputs_becomes_as_wide_as_the_batch(follows: Any, shape: tuple[int, ...]) -> None:
    """Classes may be as many as a micro-batch is wide."""
    outputs = RowOutputs(2, fill=-100, follows=follows)
    outputs.put(torch.ones(2, 4, 4), [0, 1], [4], [7])
    assert outputs.value.shape == shape


def test_kinds_of_outputs() -> None:
    outputs = RowOutputs(2, fill=-100)
    for row in (1, 0):
        values = {
            "flags": torch.ones(1, row + 1, dtype=torch.bool),
            "halves": torch.full((1, row + 1), 0.5, dtype=torch.bfloat16),
            "rest": (torch.tensor([row]), None),
        }
        outputs.put(values, [row], [row + 1], [2])
    value = outputs.value
    assert value["flags"].tolist() == [[True, False], [True, True]], "nothing is said of what was cut"
    assert value["halves"].dtype == torch.bfloat16
    assert value["halves"].tolist() == [[0.5, -100], [0.5, 0.5]]
    assert value["rest"][0].tolist() == [0, 1]
    assert value["rest"][1] is None


def test_there_is_nothing_before_anything_is_put() -> None:
    assert RowOutputs(2, fill=0).value is None


def test_bytes_and_devices_are_those_of_the_tensors() -> None:
    outputs = (torch.ones(2, 3), {"x": torch.ones(4, dtype=torch.int8)}, "text", None)
    assert num_bytes(outputs) == 24 + 4
    moved = to_device(outputs, "meta")
    assert (moved[0].device.type, moved[1]["x"].device.type, moved[2], moved[3]) == ("meta", "meta", "text", None)
