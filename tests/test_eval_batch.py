"""Batches of evaluation: how long their rows are, what may be cut, and what is taken out of them."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_mbp.eval_batch import EvalBatch
from tests.examples import examples
from tests.helpers import Pad

quick = examples(40)


def rows_of(lengths: list[int]) -> list[dict[str, Any]]:
    tokens = [list(range(10 * index + 5, 10 * index + 5 + length)) for index, length in enumerate(lengths)]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in tokens]


def batch_of(lengths: list[int], side: str = "right", **changes: Any) -> EvalBatch:
    inputs = Pad(side)(rows_of(lengths))
    options = {name: changes.pop(name) for name in ("has_targets", "multiple_of", "rows_each") if name in changes}
    return EvalBatch(inputs={**inputs, **changes}, **options)


def listed(inputs: Any) -> dict[str, Any]:
    return {key: value.tolist() for key, value in inputs.items()}


@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=6), data=st.data())
@quick
def test_what_is_taken_out_is_what_the_collator_makes_of_those_rows(lengths: list[int], data: Any) -> None:
    batch = batch_of(lengths)
    chosen = data.draw(st.lists(st.sampled_from(range(len(lengths))), min_size=1, unique=True))
    rows = [rows_of(lengths)[index] for index in chosen]
    assert listed(batch.take(chosen, cuts=True)) == listed(Pad()(rows))
    assert listed(batch.take(chosen, cuts=False)) == listed({key: v[chosen] for key, v in batch.inputs.items()})


def test_sizes_are_those_of_rows_or_that_of_the_batch() -> None:
    batch = batch_of([2, 5, 3])
    assert batch.sizes(cuts=True).tolist() == [[2], [5], [3]]
    assert batch.sizes(cuts=False).tolist() == [[5]] * 3
    assert batch_of([2, 5, 3], multiple_of=4).sizes(cuts=True).tolist() == [[4], [8], [4]]
    assert batch.widths(batch.inputs) == [5]


def test_a_row_ends_with_its_last_token_and_not_after_so_many() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    assert batch_of([5, 5, 5], attention_mask=mask).sizes(cuts=True).tolist() == [[3], [1], [5]]


def test_targets_of_an_encoder_decoder_are_a_part_of_their_own() -> None:
    labels = torch.tensor([[7, -100, 8, -100], [-100] * 4])
    batch = batch_of([2, 3], labels=labels, decoder_attention_mask=torch.ones(2, 4), has_targets=True)
    assert batch.sizes(cuts=True).tolist() == [[2, 3], [3, 1]]
    assert batch.sizes(cuts=False).tolist() == [[3, 4]] * 2
    assert batch.widths(batch.inputs) == [3, 4]
    assert batch.padded == {0, 1}
    assert batch.padded_for([1]) == {1}


def test_frames_of_sounds_keep_their_width() -> None:
    inputs = {"input_features": torch.zeros(2, 3, 4), "attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    assert EvalBatch(inputs=inputs).sizes(cuts=True).tolist() == [[4], [4]]


def test_rows_without_tokens_share_the_cells() -> None:
    assert EvalBatch(inputs={"pixel_values": torch.zeros(3, 8)}).sizes(cuts=True).tolist() == [[1]] * 3
    assert EvalBatch(inputs={"input_ids": torch.zeros(3, 8)}).sizes(cuts=True).tolist() == [[8]] * 3


# Examples of several rows


def pairs(**changes: Any) -> EvalBatch:
    """Chosen rows of 2 and 5 tokens, then rejected ones of 4 and 1, and one label for each pair."""
    return batch_of([2, 5, 4, 1], labels=torch.tensor([1, 0]), rows_each=2, **changes)


def test_a_pair_stays_together() -> None:
    batch = pairs(texts=["a", "b", "c", "d"], nested={"margins": np.array([0.5, 0.25])})
    assert batch.num_examples == 2
    assert batch.sizes(cuts=True).tolist() == [[8], [10]], "twice its longer row"
    for example, rows in enumerate(([0, 2], [1, 3])):
        taken = batch.take([example], cuts=False)
        assert taken["input_ids"].tolist() == batch.inputs["input_ids"][rows].tolist()
        assert taken["labels"].tolist() == [1 - example]
        assert taken["texts"] == ["abcd"[row] for row in rows]
        assert taken["nested"]["margins"].tolist() == [[0.5], [0.25]][example]
    assert batch.take([0, 1], cuts=False)["input_ids"].tolist() == batch.inputs["input_ids"].tolist()


def test_what_has_not_an_entry_for_each_row_or_pair_is_one_example() -> None:
    batch = batch_of([2, 5, 4], rows_each=2)
    assert (batch.is_splittable, batch.num_examples) == (False, 1)
    assert batch.sizes(cuts=True).tolist() == [[15]]
    packed = EvalBatch(inputs={"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.zeros(4)})
    assert (packed.is_splittable, packed.is_cuttable, packed.padded) == (False, False, frozenset())
    assert packed.take([0], cuts=True).keys() == packed.inputs.keys()


# What may be cut


@pytest.mark.parametrize(
    ("batch", "is_cuttable"),
    [
        (batch_of([2, 3]), True),
        (batch_of([2, 3], side="left"), False),
        (batch_of([2, 3], labels=torch.tensor([[1, 2, 3], [1, 2, 3]])), False),
        (batch_of([2, 3], labels=torch.tensor([[1, 2, 3], [1, 2, 3]]), has_targets=True), True),
        (batch_of([2, 3], shift_labels=torch.tensor([[2, 3, 4], [2, 3, -100]])), False),
        (batch_of([2, 3], start_positions=torch.tensor([0, 1])), False),
        (EvalBatch(inputs={"input_ids": torch.zeros(2, 3)}), False),
        (EvalBatch(inputs={"attention_mask": torch.zeros(2, 0), "input_ids": torch.zeros(2, 0)}), False),
    ],
)
def test_padding_may_be_cut_where_nothing_else_depends_on_it(batch: EvalBatch, is_cuttable: bool) -> None:
    assert batch.is_cuttable == is_cuttable
    assert bool(batch.padded) == is_cuttable


# Labels


def test_labels_that_count() -> None:
    batch = batch_of([3, 3], labels=torch.tensor([[4, 6, -100], [5, -100, -100]]))
    assert batch.num_labels.tolist() == [1, 0], "the first predicts nothing"
    assert (batch.labels, batch.labels_of([1])) == ({4, 5, 6}, {5})
    assert batch.mean_labels == [5.0, 5.0]
    none = batch_of([3, 3], labels=torch.rand(2))
    assert (none.num_labels.tolist(), none.labels, none.mean_labels) == ([1, 1], frozenset(), [0.0, 0.0])
    classes = pairs()
    assert (classes.num_labels.tolist(), classes.labels, classes.mean_labels) == ([1, 1], {0, 1}, [1.0, 0.0])
    of_rows = batch_of([1, 1, 1, 1], labels=torch.tensor([1, 2, 3, 6]), rows_each=2)
    assert of_rows.mean_labels == [2.0, 4.0]
