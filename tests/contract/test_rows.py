"""Which rows a step sees, of which columns, is up to the arguments and the data set, as with `Trainer`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from tests.contract.scenario import (
    Side,
    assert_same_weights,
    assert_trained,
    class_rows,
    classifier,
    compared,
    weights,
)
from tests.helpers import VOCABULARY, Pad, relative_error, whole_gradients


class Stream(IterableDataset):
    """Rows without a length, from the first again at each pass."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@dataclass
class Step:
    """What one step of a run started from, saw and found."""

    weights: dict[str, torch.Tensor]
    rows: list[tuple[int, ...]] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] | None = None


class Watch(TrainerCallback):
    """Notes the rows of every step, as their tokens, and its gradients."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(self.note_rows, with_kwargs=True)

    def note_rows(self, model: Any, args: Any, inputs: dict[str, torch.Tensor]) -> None:
        if self.steps:  # the check at the start runs rows, too
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                self.steps[-1].rows.append(tuple(ids[mask.bool()].tolist()))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(Step({name: value.clone() for name, value in model.state_dict().items()}))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps[-1].gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    @property
    def rows(self) -> list[list[tuple[int, ...]]]:
        """Of each step; in a fixed order, because micro-batches have their own."""
        return [sorted(step.rows) for step in self.steps]


def watched(side: Side, rows: Any, **changes: Any) -> tuple[Watch, Any]:
    watch = Watch()
    trainer = side.trainer(train_dataset=rows, callbacks=[watch], **changes)
    trainer.train()
    return watch, trainer


def as_tokens(rows: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(row["input_ids"]) for row in rows]


def assert_gradients_of_plain_torch(watch: Watch, rows: list[dict[str, Any]]) -> None:
    """Every step has the gradient of the mean over its own rows."""
    known = dict(zip(as_tokens(rows), rows, strict=True))
    for step in watch.steps:
        model = classifier()
        model.load_state_dict(step.weights)
        batch = Pad()([known[tokens] for tokens in step.rows])
        expected = whole_gradients(model, lambda m, batch=batch: m(**batch).loss)[1]
        assert relative_error(expected, step.gradients) < 1e-12


@pytest.mark.parametrize("kind", ["lists", "datasets"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_sampling_by_length_chooses_the_rows_of_stock(
    strategy: str, accumulation: int, kind: str, tmp_path: Path
) -> None:
    rows = [{**row, "length": len(row["input_ids"])} for row in class_rows()]

    def scenario(side: Side) -> Watch:
        return watched(
            side,
            datasets.Dataset.from_list(rows) if kind == "datasets" else rows,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy=strategy,
            remove_unused_columns=True,
        )[0]

    stock, ours = compared(tmp_path, scenario)
    assert ours.rows == stock.rows
    for epoch in (ours.rows[:3], ours.rows[3:]):
        assert sorted(chain.from_iterable(epoch)) == sorted(as_tokens(rows))
    assert ours.rows[0] != sorted(as_tokens(rows[:16]))
    if strategy == "group_by_length":
        assert max(map(len, ours.rows[0])) == max(map(len, as_tokens(rows)))  # it starts with the longest
    assert_gradients_of_plain_torch(ours, rows)


def test_max_steps_of_an_endless_stream_see_its_rows_in_order(tmp_path: Path) -> None:
    rows = class_rows()

    def scenario(side: Side) -> tuple[Watch, Any]:
        return watched(side, Stream(rows), max_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=2)

    (stock, stock_trainer), (ours, our_trainer) = compared(tmp_path, scenario)
    in_order = as_tokens(rows) * 2
    assert ours.rows == stock.rows == [sorted(in_order[start : start + 16]) for start in range(0, 80, 16)]
    assert our_trainer.state.epoch == stock_trainer.state.epoch
    assert our_trainer.state.global_step == 5
    assert_gradients_of_plain_torch(ours, rows)
    assert_same_weights(weights(our_trainer), weights(stock_trainer))


def optimizer_steps(steps: list[Step]) -> list[list[tuple[int, ...]]]:
    """The rows of every optimizer step; those of a step that was cut short count with the next."""
    rows: list[list[tuple[int, ...]]] = [[]]
    for step in steps:
        rows[-1] += step.rows
        if step.gradients is not None:
            rows.append([])
    return [sorted(step) for step in rows[:-1]]


def test_a_stream_that_ends_inside_an_accumulation(tmp_path: Path) -> None:
    """Stock adds the mean of the rows that are left over to that of the next step; ours is the mean of all of them."""
    rows = class_rows(40)

    def scenario(side: Side) -> tuple[Watch, Any]:
        return watched(side, Stream(rows), max_steps=5, per_device_train_batch_size=8, gradient_accumulation_steps=2)

    (stock, stock_trainer), (ours, our_trainer) = compared(tmp_path, scenario)
    assert list(map(len, optimizer_steps(stock.steps))) == [16, 16, 24, 16, 24]
    assert optimizer_steps(ours.steps) == optimizer_steps(stock.steps)
    assert [step.gradients is None for step in ours.steps] == [step.gradients is None for step in stock.steps]
    assert (our_trainer.state.global_step, our_trainer.state.epoch) == (5, stock_trainer.state.epoch)
    ours.steps = [step for step in ours.steps if step.gradients is not None]
    assert list(map(len, ours.rows)) == [16, 16, 24, 16, 24]
    assert_gradients_of_plain_torch(ours, rows)


def test_the_last_batch_of_a_stream_may_be_short(tmp_path: Path) -> None:
    rows = class_rows(28)

    def scenario(side: Side) -> tuple[Watch, Any]:
        return watched(side, Stream(rows), max_steps=4)

    (stock, stock_trainer), (ours, our_trainer) = compared(tmp_path, scenario)
    assert list(map(len, stock.rows)) == [16, 12, 16, 12]
    assert ours.rows == stock.rows
    assert_gradients_of_plain_torch(ours, rows)
    assert_same_weights(weights(our_trainer), weights(stock_trainer))


class Rows(Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


@pytest.mark.parametrize("kind", [datasets.Dataset.from_list, Rows, Stream])
@pytest.mark.parametrize("removes", [True, False])
def test_the_collator_sees_the_columns_it_sees_from_stock(removes: bool, kind: Any, tmp_path: Path) -> None:
    rows = [{**row, "comment": "not for the model", "label_ids": 7} for row in class_rows()]

    def scenario(side: Side) -> tuple[set[frozenset[str]], dict[str, torch.Tensor]]:
        seen: set[frozenset[str]] = set()

        def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            seen.update(frozenset(row) for row in rows)
            return Pad()([{key: row[key] for key in ("input_ids", "attention_mask", "labels")} for row in rows])

        trainer = side.trainer(
            train_dataset=kind(rows), data_collator=collate, remove_unused_columns=removes, max_steps=6
        )
        trainer.train()
        return seen, weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert ours[0] == stock[0]
    assert stock[0] == {frozenset(rows[0].keys() - ({"comment"} if removes else set()))}
    assert_trained(ours[1])
    assert_same_weights(ours[1], stock[1])


class Tagger(torch.nn.Module):
    """A model of one's own, whose labels have a name of their own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.EmbeddingBag(VOCABULARY, 8, mode="sum")
        self.output = torch.nn.Linear(8, 3)
        self.double()

    def forward(self, input_ids: Any, attention_mask: Any, targets: Any) -> dict[str, torch.Tensor]:
        logits = self.output(self.embedding(input_ids, per_sample_weights=attention_mask.double()))
        return {"loss": torch.nn.functional.cross_entropy(logits, targets), "logits": logits}


def test_labels_may_have_another_name(tmp_path: Path) -> None:
    rows = [{"targets": row.pop("labels"), **row} for row in class_rows()]

    def scenario(side: Side) -> tuple[dict[str, torch.Tensor], Any, Any]:
        trainer = side.trainer(
            model=Tagger(),
            train_dataset=rows,
            eval_dataset=rows[:12],
            label_names=["targets"],
            remove_unused_columns=True,
            save_strategy="no",
            compute_metrics=lambda given: {"right": float((given.predictions.argmax(-1) == given.label_ids).mean())},
        )
        trainer.train()
        return weights(trainer), trainer.evaluate(), trainer.predict(rows[:12])

    stock, ours = compared(tmp_path, scenario)
    assert_same_weights(ours[0], stock[0])
    assert float((ours[0]["output.bias"] - Tagger().state_dict()["output.bias"]).abs().max()) > 1e-3
    for name in ("eval_loss", "eval_right"):
        assert ours[1][name] == pytest.approx(stock[1][name])
    assert ours[2].label_ids.tolist() == stock[2].label_ids.tolist() == [row["targets"] for row in rows[:12]]
    np.testing.assert_allclose(ours[2].predictions, stock[2].predictions, rtol=1e-9)
