"""On which rows the check before the first step runs, and what is said of it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

from hf_mbp import MBPTrainer
from hf_mbp.arrays import Ints
from hf_mbp.plan import Budget
from hf_mbp.start_check import CHECKED_ROWS, _fitting
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels


def sizes(*lengths: int) -> Ints:
    return np.array(lengths).reshape(-1, 1)


@pytest.mark.parametrize("cap", [5, 20, 40, 64, 200, 10_000])
def test_as_many_rows_as_fit_the_budget_together(cap: int) -> None:
    lengths = sizes(30, 3, 7, 7, 12, 5, 9, 4, 22, 17)
    num_rows, rows = _fitting(lengths, Budget(max_tokens=cap))
    longest = max(int(lengths[row, 0]) for row in rows)
    fits = [n for n in range(2, CHECKED_ROWS + 1) if int((lengths <= cap // n).sum()) >= n]
    assert num_rows == max(fits, default=2)
    assert len(rows) >= num_rows
    assert num_rows * longest <= cap or not fits


def test_a_cap_of_less_than_two_rows_is_no_reason_not_to_check() -> None:
    assert _fitting(sizes(30, 10, 20), Budget(max_tokens=5)) == (2, [1, 2])


def test_memory_is_never_exceeded() -> None:
    budget = Budget(max_bytes=1000.0, bytes_per_cell=40.0)
    assert _fitting(sizes(30, 20), budget) == (0, [])
    assert _fitting(sizes(30, 10, 20, 12), budget) == (2, [1, 3])


def test_one_row_is_left_to_the_check_to_refuse() -> None:
    assert _fitting(sizes(30), Budget(max_bytes=1.0, bytes_per_cell=1.0)) == (2, [0])


class Watches(MBPTrainer):
    """Keeps the padded tokens of every call."""

    cells: list[int]

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        vars(self).setdefault("cells", []).append(inputs["input_ids"].numel())
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_the_check_stays_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = with_labels(token_rows(), lambda index, row: index % 3)
    model = build(BertForSequenceClassification, bert_config(num_labels=3))
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=Watches, max_tokens_per_micro_batch=50)
    trainer.train()
    assert "Checked to be exact" in capsys.readouterr().out
    assert len(trainer.cells) > trainer.state.log_history[0]["mbp_micro_batches"]  # those of the check are among them
    assert max(trainer.cells) <= 50
