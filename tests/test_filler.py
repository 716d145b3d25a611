"""Fillers are as small as a loss allows, and their loss is a number."""

from typing import Any

import torch
from transformers import BertForQuestionAnswering, LlamaForCausalLM

from hf_mbp.filler import WIDTH, filler_of, shortest_filler_of
from tests.helpers import Pad, bert_config, build, llama_config, token_rows, with_labels


def causal(count: int = 4) -> dict[str, Any]:
    rows = token_rows(count, low=20, high=30)
    return Pad()(with_labels(rows, lambda index, row: [-100] * (len(row["input_ids"]) - 1) + row["input_ids"][-1:]))


def test_one_row_twice() -> None:
    """Batch normalisation refuses a single one."""
    inputs = causal()
    filler = filler_of(inputs, 4)
    assert all(torch.equal(value, inputs[key][[0, 0]]) for key, value in filler.items())


def test_pairs_stay_pairs() -> None:
    inputs = {"input_ids": torch.arange(6)[:, None], "completion_mask": torch.ones(6, 1)}
    assert filler_of(inputs, 3)["input_ids"].flatten().tolist() == [0, 0, 3, 3]
    assert shortest_filler_of(inputs, 3)["input_ids"].flatten().tolist() == [0, 0, 3, 3]


def test_what_has_no_entry_for_each_row_stays_whole() -> None:
    packed = {"input_ids": torch.ones(1, 30), "position_ids": torch.ones(1, 30)}
    assert filler_of(packed, 3)["input_ids"].shape == (1, 30)
    named = {**causal(), "names": ["a", "b", "c", "d"]}
    assert filler_of(named, 4)["input_ids"].shape[0] == 4


def test_a_filler_of_a_filler_is_the_same() -> None:
    filler = filler_of(causal(), 4)
    assert filler_of(filler, 0)["input_ids"].shape == filler["input_ids"].shape


def test_the_shortest_has_few_tokens_and_a_loss() -> None:
    short = shortest_filler_of(causal(), 4)
    assert short["input_ids"].shape == (2, WIDTH)
    assert torch.isfinite(build(LlamaForCausalLM, llama_config())(**short).loss)


def test_answers_in_the_part_cut_off_would_leave_no_loss() -> None:
    rows = [{**row, "start_positions": 19, "end_positions": 19} for row in token_rows(4, low=20, high=30)]
    short = shortest_filler_of(Pad()(rows), 4)
    assert short["input_ids"].shape[1] > WIDTH
    assert torch.isfinite(build(BertForQuestionAnswering, bert_config())(**short).loss)
