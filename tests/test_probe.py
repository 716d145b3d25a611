"""Probes leave everything as it was: buffers, gradients, random generators, what trainers note."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from hf_mbp.probe import modules_of
from hf_mbp.stand_ins import StandIns
from hf_mbp.undisturbed import kept_collator, kept_notes, undisturbed
from tests.helpers import token_rows, tokenizer


class Remembers(torch.nn.Module):
    """Puts another tensor in the place of its buffer at each call, and counts in one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.seen = torch.cat([self.seen, values])
        self.calls += 1
        return (self.weight * values).sum() + torch.rand(1).sum() * random.random() * np.random.rand()


def test_a_model_is_as_it_was() -> None:
    model, head = Remembers().eval(), torch.nn.Linear(2, 1)
    head.weight.grad = torch.full((1, 2), 7.0)
    before = (model.seen, model.calls, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with undisturbed([model, head]):
        model.train()
        (model(torch.ones(2)) + head(torch.ones(2)).sum()).backward()
        assert len(model.seen) == 2
    assert model.seen is before[0]
    assert model.calls is before[1]
    assert float(model.calls) == 0
    assert model.weight.grad is None
    assert head.weight.grad.tolist() == [[7.0, 7.0]]
    assert not model.training
    assert torch.equal(torch.get_rng_state(), before[2])
    assert random.getstate() == before[3]
    assert np.random.get_state()[1].tolist() == before[4]


def test_a_model_is_as_it_was_where_there_is_no_memory_for_its_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].weight.grad = torch.ones(2, 2)
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    copy = StandIns._copy

    def scarce(stand_ins: StandIns, tensor: torch.Tensor) -> torch.Tensor:
        if tensor is model[1].weight:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return copy(stand_ins, tensor)

    monkeypatch.setattr(StandIns, "_copy", scarce)
    with pytest.raises(torch.OutOfMemoryError), undisturbed([model]):
        raise AssertionError("it is not run without its copies")
    assert all(now is parameter for now, (parameter, _) in zip(model.parameters(), before, strict=True))
    assert all(parameter.grad is gradient for parameter, gradient in before)


def test_other_modules_of_a_trainer_count() -> None:
    model, reference, loss = (torch.nn.Linear(1, 1) for _ in range(3))
    trainer = SimpleNamespace(model=model, ref_model=reference, loss={"pairs": loss, "name": "x"}, args=None)
    assert {id(module) for module in modules_of(trainer)} == {id(model), id(reference), id(loss)}


def draws(collator: Any) -> list[Any]:
    return collator([dict(row) for row in token_rows(8)])["labels"].tolist()


def test_a_collator_with_a_generator_of_its_own_goes_on_as_if_it_had_not_been_called() -> None:
    untouched, probed = (DataCollatorForLanguageModeling(tokenizer(), seed=3) for _ in range(2))
    with kept_collator(probed):
        draws(probed)
    first = draws(probed)
    assert first == draws(untouched)
    with kept_collator(probed):
        assert draws(probed) != first
    assert draws(probed) == draws(untouched)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(0), lambda generator: float(torch.rand(1, generator=generator))),
        (lambda: random.Random(0), lambda generator: generator.random()),
        (lambda: np.random.default_rng(0), lambda generator: generator.random()),
    ],
)
def test_generators_are_put_back(make: Any, draw: Any) -> None:
    collator, expected = SimpleNamespace(generator=make()), draw(make())
    with kept_collator(collator):
        draw(collator.generator)
        collator.added = 1
    assert vars(collator).keys() == {"generator"}
    assert draw(collator.generator) == expected


def test_functions_without_attributes_are_collators_too() -> None:
    with kept_collator(len):
        pass


def test_numbers_and_metrics_of_a_trainer_are_put_back() -> None:
    trainer = SimpleNamespace(_metrics={"train": {"accuracy": [0.5]}}, tokens=7, name="x", other=[1])
    with kept_notes(trainer):
        trainer._metrics["train"]["accuracy"].append(1.0)
        trainer._metrics["train"]["entropy"] = [2.0]
        trainer.tokens += 5
        trainer.other.append(2)
    assert trainer._metrics == {"train": {"accuracy": [0.5]}}
    assert trainer.tokens == 7
    assert trainer.other == [1, 2]
