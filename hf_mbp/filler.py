"""Inputs with which a rank only takes part: as few rows, and tokens, as a loss can be computed of."""

import torch

from hf_mbp.collate import Inputs, has_entry_for_each_row, need_one_width, num_rows_of, rows_of_examples, select_rows
from hf_mbp.items import with_an_item
from hf_mbp.padding import can_be_cut, cut_columns
from hf_mbp.padding_free import beginning, is_laid_end_to_end

ROWS = 2
"""Examples of a filler, the same one: batch normalisation refuses a single one."""

WIDTH = 8
"""Tokens of each, where there is no memory for more."""


def filler_of(inputs: Inputs, num_examples: int) -> Inputs:
    """One of the examples, twice, with a label that counts; all of them where they cannot be taken out.

    An example has several rows where those of pairs lie one after the other: all chosen ones, then all rejected ones.
    Of rows laid end to end it is the first.
    """
    if is_laid_end_to_end(inputs):
        return with_an_item(beginning(inputs, inputs["input_ids"].numel()))
    return with_an_item(select_rows(inputs, _rows_of_one(inputs, num_examples)) if num_examples else inputs)


def shortest_filler_of(inputs: Inputs, num_examples: int) -> Inputs:
    """The beginning of it, where rows can be cut, and a loss does not depend on what was cut off."""
    if is_laid_end_to_end(inputs):
        return with_an_item(beginning(inputs, WIDTH))
    filler = filler_of(inputs, num_examples)
    is_plain = not need_one_width(inputs) and (num_examples == 0 or num_rows_of(inputs) == num_examples)
    return with_an_item(cut_columns(filler, WIDTH)) if is_plain and can_be_cut(filler) else filler


def _rows_of_one(inputs: Inputs, num_examples: int) -> list[int]:
    num_rows = num_rows_of(inputs)
    is_dense = all(isinstance(value, torch.Tensor) for value in inputs.values())
    if not is_dense or not has_entry_for_each_row(inputs, num_rows) or num_rows % num_examples:
        return list(range(num_rows))
    return rows_of_examples([0] * ROWS, num_examples, num_rows // num_examples)
