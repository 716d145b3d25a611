"""Whatever the rows, batches, padding and budget, on any number of ranks: stock's rows a step, the exact gradient.

The reference is a stock Trainer for the rows of each step, and plain PyTorch on those rows, padded right in one batch,
for the gradient.
"""

import gc
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DataCollatorForTokenClassification, TrainerCallback

from hf_mbp import MBPConfig, look_ahead
from hf_mbp.runner import MicroBatches
from hf_mbp.step import MicroBatch
from tests.examples import examples
from tests.helpers import VOCABULARY, Pad, Recorder, arguments, relative_error, tokenizer, whole_gradients
from tests.simulated_ranks import AverageGradients, MBPOnRank, OnRank, World

EPOCHS = 2
IGNORED = -100
IN_FLOAT64 = 1e-12

LENGTHS = st.one_of(st.integers(2, 14), st.sampled_from([0, 1, 1, 300]))
"""Of rows: most are short; some are empty, one token long, or longer than most budgets."""

Row = dict[str, Any]


class Tagger(torch.nn.Module):
    """Classifies tokens, the next tokens or whole rows, by a token's embedding and the mean of its row.

    Indifferent to padding. Keeps what it was called with in training.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.target = target
        self.embedding = torch.nn.Embedding(VOCABULARY, 4, dtype=torch.float64)
        self.head = torch.nn.Linear(4, 3, dtype=torch.float64)
        self.calls: list[dict[str, torch.Tensor]] = []

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any, number: Any) -> dict[str, torch.Tensor]:
        if self.training:
            self.calls.append({"input_ids": input_ids, "attention_mask": attention_mask, "number": number})
        mask = attention_mask[..., None].double()
        hidden = self.embedding(input_ids) * mask
        means = hidden.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        if self.target == "rows":
            logits = self.head(means[:, 0]).tanh()
            return {"loss": mean_loss(logits, labels), "logits": logits}
        logits = self.head(hidden + means).tanh()
        if self.target == "next tokens":
            return {"loss": mean_loss(logits[:, :-1], labels[:, 1:]), "logits": logits}
        return {"loss": mean_loss(logits, labels), "logits": logits}


def mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.reshape(-1, 3), labels.reshape(-1), ignore_index=IGNORED)


class StepEnds(TrainerCallback):
    """Notes how many calls of the model each optimizer step has seen, epoch by epoch."""

    def __init__(self, model: Tagger) -> None:
        self.model = model
        self.epochs: list[list[int]] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.epochs.append([len(self.model.calls)])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.epochs[-1].append(len(self.model.calls))

    def steps(self) -> list[list[list[dict[str, torch.Tensor]]]]:
        """The calls of each step of each epoch."""
        return [[self.model.calls[start:end] for start, end in pairwise(ends)] for ends in self.epochs]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its rows, how they are batched and padded, and the cap.

    `labels` are those of rows, or of tokens, again and again; tokens at `skipped` positions have none, those in `holes`
    are masked.
    """

    lengths: list[int]
    labels: list[int]
    skipped: set[int] = field(default_factory=set)
    holes: set[int] = field(default_factory=set)
    target: str = "tokens"
    max_tokens: int
    collator: str = "plain"
    side: str = "right"
    multiple: int | None = None
    collate_in: str = "main"
    ranks: int = 1
    balance: bool = True
    looks_ahead: bool = False
    accelerator: dict[str, bool] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> list[Row]:
        """The rows, which know their numbers."""
        return [
            {
                "input_ids": [5 + (number * 7 + position) % 50 for position in range(length)],
                "attention_mask": [int(position not in self.holes_of(length)) for position in range(length)],
                "labels": self.labels_of(number, length),
                "number": number,
            }
            for number, length in enumerate(self.lengths)
        ]

    def holes_of(self, length: int) -> set[int]:
        """Not at the ends of a row by which left padding is told from it."""
        return self.holes - ({0, length - 1} if self.side == "left" else {0})

    def labels_of(self, number: int, length: int) -> int | list[int]:
        """Of a row, which always has one, or of its tokens."""
        if self.target == "rows":
            return max(0, self.labels[number % len(self.labels)])
        return [
            IGNORED if position in self.skipped else self.labels[(number + position) % len(self.labels)]
            for position in range(length)
        ]

    def collate(self) -> Any:
        """A collator of the case."""
        if self.collator == "plain":
            return Pad(self.side, self.multiple)
        padder = tokenizer()
        padder.padding_side = self.side
        return DataCollatorForTokenClassification(padder, pad_to_multiple_of=self.multiple)

    def arguments(self) -> dict[str, Any]:
        """What a trainer gets beside model and data."""
        config = {"accelerator_config": dict(self.accelerator)} if self.accelerator else {}
        return {"num_train_epochs": EPOCHS, "max_steps": -1, "learning_rate": 0.0, **config, **self.options}

    def width_of(self, rows: list[Row]) -> int:
        """What the rows are padded to, at least."""
        longest = max(len(row["input_ids"]) for row in rows)
        return -(-longest // (self.multiple or 1)) * (self.multiple or 1)

    def num_items(self, rows: list[Row]) -> int:
        """What the loss of the rows is a mean over."""
        if self.target == "rows":
            return len(rows)
        start = int(self.target == "next tokens")
        return sum(label != IGNORED for row in rows for label in row["labels"][start:])


@st.composite
def cases(draw: Any, ranks: st.SearchStrategy[int]) -> Case:
    lengths = draw(st.lists(LENGTHS, min_size=1, max_size=14))
    target = draw(st.sampled_from(["tokens", "next tokens", "rows"]))
    count = draw(ranks)
    return Case(
        lengths=lengths,
        labels=draw(st.lists(st.sampled_from([0, 1, 2, IGNORED]), min_size=1, max_size=16)),
        skipped=draw(st.sets(st.integers(0, 13))),
        holes=draw(st.sets(st.integers(1, 13), max_size=3)),
        target=target,
        max_tokens=draw(st.one_of(st.integers(1, 120), st.just(1000))),
        collator="plain" if target == "rows" else draw(st.sampled_from(["plain", "plain", "of transformers"])),
        side=draw(st.sampled_from(["right", "right", "left"])),
        multiple=draw(st.sampled_from([None, None, 4])),
        collate_in=draw(st.sampled_from(["main", "main", "workers"])),
        ranks=count,
        balance=draw(st.booleans()),
        looks_ahead=draw(st.booleans()),
        accelerator=draw(st.fixed_dictionaries({"even_batches": st.booleans()})) if count > 1 else {},
        options={
            "per_device_train_batch_size": draw(st.integers(1, len(lengths))),
            "gradient_accumulation_steps": draw(st.integers(1, 4)),
            "dataloader_drop_last": draw(st.booleans()),
            "seed": draw(st.integers(0, 5)),
        },
    )


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """A run of a Trainer begins by collecting garbage, which takes longer than the run; what is imported is none."""
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Rows longer than the budget, and steps without labels, are warned of; everything else is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A row of .* tokens is longer than the budget", UserWarning)
        warnings.filterwarnings("ignore", "Step .* has nothing to learn from", UserWarning)
        yield


def stock_steps(case: Case, folder: Path) -> list[list[int]]:
    """Row numbers of each optimizer step of stock Trainers, of all ranks together.

    Each trains by itself: where ranks have unlike numbers of batches, stock ones would wait for each other forever.
    """
    world = World(case.ranks)
    ranks = [stock_steps_of_rank(case, folder, world, index) for index in range(case.ranks)]
    return [
        list(chain.from_iterable(parts))
        for epoch in zip(*ranks, strict=True)
        for parts in zip_longest(*epoch, fillvalue=[])
    ]


def stock_steps_of_rank(case: Case, folder: Path, world: World, index: int) -> list[list[list[int]]]:
    """Row numbers of each step of each epoch."""
    model = Tagger(case.target)
    ends = StepEnds(model)
    trainer = OnRank(
        **{"model": model, "args": arguments(folder, **case.arguments()), "train_dataset": case.rows},
        **{"data_collator": Pad(), "callbacks": [ends], "world": world, "index": index},
    )
    if len(trainer.get_train_dataloader()) == 0:
        return [[]] * EPOCHS
    trainer.train()
    return [[[int(number) for call in step for number in call["number"]] for step in epoch] for epoch in ends.steps()]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a rank has done in an optimizer step."""

    planned: list[MicroBatch]
    calls: list[dict[str, torch.Tensor]]
    gradients: dict[str, torch.Tensor]


class Noted(MBPOnRank):
    """Keeps the micro-batches of each step."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if isinstance(inputs, MicroBatches) and inputs.micro_batches:
            self.planned.append(inputs.micro_batches)
        return loss


def mbp_steps(case: Case, folder: Path) -> list[list[Step]]:
    """The steps with micro-batches, each on all ranks."""
    world = World(case.ranks)

    def train(index: int) -> list[Step]:
        model = Tagger(case.target)
        recorder, ends = Recorder(), StepEnds(model)
        trainer = Noted(
            **{"model": model, "args": arguments(folder, **case.arguments()), "train_dataset": case.rows},
            **{"data_collator": case.collate(), "world": world, "index": index},
            callbacks=[ends, AverageGradients(world, index), recorder],
            mbp_config=MBPConfig(
                max_tokens_per_micro_batch=case.max_tokens,
                check_at_start=False,
                collate_in=case.collate_in,
                balance_ranks=case.balance,
                rank_timeout=0,
            ),
        )
        trainer.planned = []
        trainer.train()
        done = zip(trainer.planned, chain.from_iterable(ends.steps()), recorder.gradients, strict=True)
        return [Step(planned=planned, calls=calls, gradients=gradients) for planned, calls, gradients in done]

    devices = ("cpu",) if case.looks_ahead else ()
    with expected_warnings(), mock.patch.object(look_ahead, "HAVE_STREAMS", devices):
        return [list(ranks) for ranks in zip(*world.run(train), strict=True)]


def assert_as_the_whole_batch(case: Case, numbers: list[int], ranks: list[Step]) -> None:
    """The step has these rows, each once, within the cap and no wider than they need; its gradient is that of all."""
    rows = [case.rows[number] for number in numbers]
    planned = [micro_batch for step in ranks for micro_batch in step.planned if micro_batch.num_rows]
    assert sorted(number for micro_batch in planned for number in numbers_of(micro_batch.inputs)) == sorted(numbers)
    for micro_batch in planned:
        count, width = micro_batch.inputs["input_ids"].shape
        assert count == 1 or count * width <= case.max_tokens
        assert is_as_wide_as_needed(case, width, [case.rows[number] for number in numbers_of(micro_batch.inputs)])
    for step in ranks:
        run = [numbers_of(micro_batch.inputs) for micro_batch in step.planned if not micro_batch.is_idle]
        assert [numbers_of(call) for call in step.calls] == run
        assert len(run) == len(ranks[0].calls)  # or ranks would wait for each other
    if case.num_items(rows) == 0:
        assert ranks[0].gradients == {}
        return
    _, reference = whole_gradients(Tagger(case.target), lambda model: model(**Pad()(rows))["loss"])
    assert all(relative_error(reference, step.gradients) < IN_FLOAT64 for step in ranks)


def is_as_wide_as_needed(case: Case, width: int, rows: list[Row]) -> bool:
    """Rows that workers have padded also lose masked columns at their ends, as long as something is left of them."""
    if case.collate_in == "workers":
        return width <= case.width_of(rows) or not any(row["input_ids"] for row in rows)
    return width == case.width_of(rows)


def numbers_of(inputs: dict[str, torch.Tensor]) -> list[int]:
    return [int(number) for number in inputs["number"]]


def check(case: Case) -> None:
    """Runs a case beside stock."""
    with tempfile.TemporaryDirectory() as folder:
        expected = stock_steps(case, Path(folder))
        if not expected:  # fewer rows than a batch, and drop_last
            with pytest.raises(ValueError, match=r"not one batch of .* dataloader_drop_last=False"):
                mbp_steps(case, Path(folder))
            return
        steps = mbp_steps(case, Path(folder))
    assert len(steps) == len(expected)
    for numbers, ranks in zip(expected, steps, strict=True):
        assert_as_the_whole_batch(case, numbers, ranks)


FOUND = {
    "a step of empty rows": Case(
        lengths=[0, 0, 3], labels=[1, 0], max_tokens=10, options={"per_device_train_batch_size": 1, "seed": 4}
    ),
    "a rank with empty rows only": Case(
        lengths=[0, 0, 5, 3],
        labels=[1, 0],
        target="next tokens",
        max_tokens=10,
        ranks=2,
        balance=False,
        options={"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"},
    ),
    "a label on a last token that is masked, padded by workers": Case(
        lengths=[4, 2, 9, 14],
        labels=[2, 1, 0],
        target="next tokens",
        holes={3, 13},
        max_tokens=19,
        collate_in="workers",
        options={"per_device_train_batch_size": 4},
    ),
    "not one batch": Case(
        lengths=[3, 4],
        labels=[1, 0],
        max_tokens=10,
        ranks=3,
        options={"per_device_train_batch_size": 1, "dataloader_drop_last": True},
    ),
}
"""What random examples have found, as small as it gets."""


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    check(FOUND[name])


@given(case=cases(st.just(1)))
@examples(40)
def test_one_process(case: Case) -> None:
    check(case)


@given(case=cases(st.integers(2, 5)))
@examples(15)
def test_several_ranks(case: Case) -> None:
    check(case)
