"""Whatever the rows, the batch size, the accumulation and the budget: same rows a step as stock, the exact gradient.

The reference is a stock Trainer for the rows of each step, and plain PyTorch on those rows for the gradient.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

from tests.helpers import VOCABULARY, Pad, Recorder, arguments, mbp_trainer, relative_error, whole_gradients

EPOCHS = 2

quick = settings(deadline=None, derandomize=True, max_examples=15, phases=[Phase.generate])
"""Runs are small enough to read, and shrinking one would take minutes."""


class Tagger(torch.nn.Module):
    """Classifies every token from its embedding and the mean of its row; keeps what it was called with.

    The first token of a row is its number.
    """

    def __init__(self, *, shifts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shifts = shifts
        self.embedding = torch.nn.Embedding(VOCABULARY, 4, dtype=torch.float64)
        self.head = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.calls: list[torch.Tensor] = []

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, torch.Tensor]:
        if self.training:
            self.calls.append(input_ids)
        mask = attention_mask[..., None].double()
        hidden = self.embedding(input_ids) * mask
        logits = self.head(hidden + hidden.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)).tanh()
        if self.shifts:
            return {"loss": mean_loss(logits[:, :-1], labels[:, 1:]), "logits": logits}
        return {"loss": mean_loss(logits, labels), "logits": logits}


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1))


class StepEnds(TrainerCallback):
    """Notes how many calls of the model each optimizer step has seen."""

    def __init__(self, model: Tagger) -> None:
        self.model = model
        self.ends: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(len(self.model.calls))

    def steps(self) -> list[list[torch.Tensor]]:
        return [self.model.calls[start:end] for start, end in zip([0, *self.ends], self.ends, strict=False)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its rows, how they are batched, and the cap."""

    rows: list[dict[str, list[int]]]
    max_tokens: int
    options: dict[str, Any]
    shifts: bool


@st.composite
def cases(draw: Any) -> Case:
    lengths = draw(st.lists(st.integers(2, 14), min_size=2, max_size=14))
    labels = draw(st.lists(st.integers(0, 2), min_size=16, max_size=16))
    skipped = draw(st.sets(st.integers(2, 13)))
    rows = [
        {
            "input_ids": [index, *(5 + (index * 7 + position) % 50 for position in range(1, length))],
            "attention_mask": [1] * length,
            "labels": [-100 if position in skipped else labels[(index + position) % 16] for position in range(length)],
        }
        for index, length in enumerate(lengths)
    ]
    batch_size = draw(st.integers(1, len(rows)))
    options = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": draw(st.integers(1, 4)),
        "dataloader_drop_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
        "num_train_epochs": EPOCHS,
        "max_steps": -1,
        "learning_rate": 0.0,
    }
    longest = max(lengths)
    return Case(
        rows=rows, max_tokens=draw(st.integers(longest, 8 * longest)), options=options, shifts=draw(st.booleans())
    )


def stock_steps(case: Case, folder: Path) -> list[list[int]]:
    """Row numbers of each optimizer step of a stock Trainer."""
    model = Tagger(shifts=case.shifts)
    ends = StepEnds(model)
    args = arguments(folder, **case.options)
    Trainer(model=model, args=args, train_dataset=case.rows, data_collator=Pad(), callbacks=[ends]).train()
    return [[int(number) for call in step for number in call[:, 0]] for step in ends.steps()]


@given(case=cases())
@quick
def test_same_rows_a_step_as_stock_and_the_gradient_of_plain_pytorch(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected_steps = stock_steps(case, Path(folder))
        model = Tagger(shifts=case.shifts)
        recorder, ends = Recorder(), StepEnds(model)
        trainer = mbp_trainer(
            model,
            case.rows,
            Path(folder),
            callbacks=[recorder, ends],
            max_tokens_per_micro_batch=case.max_tokens,
            check_at_start=False,
            **case.options,
        )
        trainer.train()

    steps = ends.steps()
    assert len(steps) == len(expected_steps) > 0
    for calls, numbers, gradient in zip(steps, expected_steps, recorder.gradients, strict=True):
        assert sorted(int(number) for call in calls for number in call[:, 0]) == sorted(numbers)
        assert all(call.numel() <= case.max_tokens for call in calls)
        rows = [case.rows[number] for number in numbers]
        _, reference = whole_gradients(Tagger(shifts=case.shifts), lambda m, rows=rows: m(**Pad()(rows))["loss"])
        assert relative_error(reference, gradient) < 1e-12


@given(case=cases())
@quick
def test_every_row_the_sampler_yields_runs_once_an_epoch_at_its_own_width(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = Tagger(shifts=case.shifts)
        options = {**case.options, "num_train_epochs": 1, "dataloader_drop_last": False}
        trainer = mbp_trainer(
            model, case.rows, Path(folder), max_tokens_per_micro_batch=1, check_at_start=False, **options
        )
        with pytest.warns(UserWarning, match=r"A row of .* tokens is longer than the budget of 1 tokens"):
            trainer.train()
    assert all(len(call) == 1 for call in model.calls)
    assert sorted(call[0].tolist() for call in model.calls) == [row["input_ids"] for row in case.rows]
