"""With `calibrate=True` plans follow what the first micro-batches took, and a resumed run makes the same ones."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback
from transformers import trainer as trainer_module

from hf_mbp import MBPConfig, MBPTrainer, run_cost
from hf_mbp.calibration import Timed
from hf_mbp.plan import Budget, Cost, Layout, as_sizes, plan_rows
from hf_mbp.run_cost import FIRST_STEPS, MOST_TOLD, TRIED_OVERHEADS, WARM_UP_STEPS, RunCost
from hf_mbp.stopwatch import Stopwatch
from tests.faults import Faults
from tests.helpers import Recorder, bert_config, build, mbp_trainer, relative_error, token_rows, with_labels

MODELLED = Cost(overhead=12)
DEAR, CHEAP = Cost(overhead=80), Cost(overhead=2.5, attention=0.01)
BUDGET = Budget(max_tokens=300)
ROWS = with_labels(token_rows(96), lambda index, row: index % 3)
Shapes = list[tuple[int, int]]


@pytest.fixture(autouse=True)
def a_modelled_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model it would be so large that all plans are alike."""
    monkeypatch.setattr(run_cost, "cost_of", lambda model, device: MODELLED)


class Told(Stopwatch):
    """A device on which micro-batches take what it is told."""

    def __init__(self, cost: Cost) -> None:
        super().__init__(torch.device("cpu"))
        self.cost = cost
        self.all: list[Timed] = []

    def finished(self) -> list[Timed]:
        timed = super().finished()
        self.all += timed
        return [
            replace(one, seconds=0.001 * float(self.cost(np.array(one.rows), np.array(one.width)))) for one in timed
        ]


class Notes(MBPTrainer):
    """Notes the lengths of the rows of each step, and the shapes that its micro-batches run in."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lengths: dict[int, list[int]] = {}
        self.shapes: dict[int, Shapes] = {}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        self.lengths.setdefault(step, []).extend(inputs["attention_mask"].sum(dim=1).tolist())
        self.shapes.setdefault(step, []).append(tuple(inputs["input_ids"].shape))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def planned(self, step: int, cost: Cost) -> Shapes:
        """What the shapes would be with a cost, planned for the lengths of the step; independent of any trainer."""
        lengths = np.array(self.lengths[step])
        plan = plan_rows(as_sizes(lengths.tolist()), BUDGET, cost)
        return [(len(group), int(lengths[group].max())) for group in plan]


def trainer_for(folder: Path, clock: Cost = DEAR, *, rows: Any = ROWS, dropout: float = 0.0, **changes: Any) -> Notes:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    options: dict[str, Any] = {"max_tokens_per_micro_batch": 300, "calibrate": True, "check_at_start": False}
    options |= {"per_device_train_batch_size": 24, "max_steps": 16, "trainer_class": Notes}
    model = build(BertForSequenceClassification, bert_config(num_labels=3, **rates))
    trainer = mbp_trainer(model, rows, folder, **{**options, **changes})
    trainer.mbp_feed.cost.stopwatch = Told(clock)
    return trainer


@pytest.mark.parametrize("clock", [DEAR, CHEAP], ids=["dear", "cheap"])
def test_plans_follow_the_measured_cost(clock: Cost, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for(tmp_path, clock)
    metrics = trainer.train().metrics
    first, later = range(FIRST_STEPS), range(FIRST_STEPS, 16)
    assert all(trainer.shapes[step] == trainer.planned(step, clock) for step in later)
    assert any(trainer.planned(step, clock) != trainer.planned(step, MODELLED) for step in later)
    tried = [replace(MODELLED, overhead=12 * TRIED_OVERHEADS[step % 3]) for step in first]
    assert all(trainer.shapes[step] == trainer.planned(step, cost) for step, cost in zip(first, tried, strict=True))
    measured = trainer.mbp_feed.cost.stopwatch.all
    expected = [shape for step in range(WARM_UP_STEPS, FIRST_STEPS) for shape in trainer.shapes[step]]
    assert [(one.rows, one.width) for one in measured] == expected
    assert metrics["mbp_calibration_error"] < 1e-2
    said = capsys.readouterr().out
    assert said.count("hf_mbp: plans follow the cost of") == 1
    assert f"{len(measured)} micro-batches that were measured" in said


def test_by_default_nothing_is_measured_and_plans_are_as_modelled(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, calibrate=False)
    metrics = trainer.train().metrics
    assert all(trainer.shapes[step] == trainer.planned(step, MODELLED) for step in range(16))
    assert trainer.mbp_feed.cost.stopwatch.finished() == []
    assert list(trainer.state.stateful_callbacks) == ["TrainerControl", "hf_mbp"]
    assert "mbp_calibration_error" not in metrics


def test_the_gradient_is_that_of_the_whole_batch_all_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorders = [Recorder(), Recorder()]
    split = trainer_for(tmp_path, CHEAP, max_steps=12, callbacks=[recorders[0]])
    split.train()
    monkeypatch.setattr(run_cost, "cost_of", lambda model, device: Cost(overhead=1e9))
    options = {"calibrate": False, "max_tokens_per_micro_batch": 10_000, "max_steps": 12}
    whole = trainer_for(tmp_path, callbacks=[recorders[1]], **options)
    whole.train()
    assert {len(shapes) for shapes in whole.shapes.values()} == {1}
    assert min(len(shapes) for shapes in split.shapes.values()) > 1
    pairs = zip(*(recorder.gradients for recorder in recorders), strict=True)
    assert max(relative_error(one, other) for one, other in pairs) < 1e-6


# Kept and replayed


def test_a_resumed_run_makes_the_same_plans_whatever_its_clock(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": FIRST_STEPS, "dropout": 0.1}
    whole = trainer_for(tmp_path, DEAR, **options)
    whole.train()
    resumed = trainer_for(tmp_path / "resumed", CHEAP, **options)
    metrics = resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FIRST_STEPS}")).metrics
    assert list(resumed.shapes) == list(range(FIRST_STEPS, 16))
    assert all(resumed.shapes[step] == whole.shapes[step] for step in resumed.shapes)
    assert any(whole.shapes[step] != whole.planned(step, CHEAP) for step in resumed.shapes)
    assert resumed.state.stateful_callbacks == whole.state.stateful_callbacks
    assert metrics["mbp_calibration_error"] < 1e-2
    torch.testing.assert_close(whole.model.state_dict(), resumed.model.state_dict(), rtol=0, atol=0)


def test_stock_takes_none_of_it_for_the_state_of_a_callback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"save_strategy": "steps", "save_steps": FIRST_STEPS, "max_steps": FIRST_STEPS + 1}
    trainer_for(tmp_path, DEAR, **options).train()
    warned: list[str] = []
    monkeypatch.setattr(trainer_module.logger, "warning", warned.append)
    resumed = trainer_for(tmp_path / "resumed", restore_callback_states_from_checkpoint=True, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{FIRST_STEPS}"))
    assert not [text for text in warned if "hf_mbp" in text]
    assert {"hf_mbp", "hf_mbp_cost"} < resumed.state.stateful_callbacks.keys()


def test_a_checkpoint_from_before_has_nothing_to_replay(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer_for(tmp_path, DEAR, max_steps=4, **options).train()
    resumed = trainer_for(tmp_path / "resumed", CHEAP, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.shapes[15] == resumed.planned(15, CHEAP)
    assert len(resumed.mbp_feed.cost.stopwatch.all) == sum(len(resumed.shapes[step]) for step in range(5, 14))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda entry: entry["key"].update(device="another"), "device was another and is cpu"),
        (lambda entry: entry.update(version=2), r"it cannot be read \(version 2 is not known here, only 1\)"),
        (lambda entry: entry["calibration"].pop("cost"), r"it cannot be read \(entry.calibration has no 'cost'\)"),
        (lambda entry: entry["calibration"]["cost"].update(overhead="x"), r"it .*calibration.cost.overhead is 'x'"),
    ],
)
def test_what_holds_for_something_else_is_measured_anew(
    spoil: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    class Spoils(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            spoil(state.stateful_callbacks["hf_mbp_cost"])

    options = {"save_strategy": "steps", "save_steps": 10, "num_train_epochs": 1}
    trainer_for(tmp_path, DEAR, max_steps=11, **options).train()
    resumed = trainer_for(tmp_path / "resumed", CHEAP, max_steps=22, callbacks=[Spoils()], **options)
    with pytest.warns(UserWarning, match=rf"cost of the checkpoint does not hold here: {reason}.* is measured anew"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.shapes[21] == resumed.planned(21, CHEAP)


def test_a_resumed_run_that_does_not_ask_for_it_plans_as_modelled(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 10}
    trainer_for(tmp_path, DEAR, max_steps=11, **options).train()
    resumed = trainer_for(tmp_path / "resumed", max_steps=12, calibrate=False, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert resumed.shapes[11] == resumed.planned(11, MODELLED)


# What does not count, or cannot be measured


def test_a_micro_batch_that_ran_out_of_memory_does_not_count(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, DEAR, max_steps=12)
    faults = Faults(trainer.model.classifier, "backward", {20}).install(trainer.model)
    trainer.train()
    assert faults.raised == 1
    run = sum(len(trainer.shapes[step]) for step in range(WARM_UP_STEPS, FIRST_STEPS))
    assert len(trainer.mbp_feed.cost.stopwatch.all) == run - 1


@pytest.mark.parametrize(
    "changes", [{"rows": ()}, {"is_checkpointed": True}], ids=["filler or ready-made batch", "checkpointed"]
)
def test_some_micro_batches_are_not_timed(changes: dict[str, Any], tmp_path: Path) -> None:
    cost = trainer_for(tmp_path).mbp_feed.cost
    cost._trainer.state.max_steps = 100
    cost.of_step()
    cost._trainer.state.global_step = WARM_UP_STEPS
    usual: dict[str, Any] = {
        "rows": ({},),
        "num_rows": 1,
        "cells": 7,
        "is_checkpointed": False,
        "layout": Layout.PADDED,
    }
    for micro_batch in (SimpleNamespace(**usual), SimpleNamespace(**{**usual, **changes})):
        with cost.timing(micro_batch):
            pass
    assert len(cost.stopwatch.finished()) == 1


def test_a_step_that_is_planned_again_is_planned_with_the_same_cost(tmp_path: Path) -> None:
    cost = trainer_for(tmp_path).mbp_feed.cost
    cost._trainer.state.max_steps = 100
    planned = []
    for step in range(3):
        cost._trainer.state.global_step = step
        planned += [cost.of_step(), cost.of_step()]
    assert planned[::2] == planned[1::2]
    assert [one.overhead for one in planned[::2]] == [12, 3, 48]


def test_micro_batches_that_are_alike_leave_plans_as_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{**row, "input_ids": [7] * 8, "attention_mask": [1] * 8} for row in ROWS]
    trainer = trainer_for(tmp_path, rows=rows, max_tokens_per_micro_batch=8, per_device_train_batch_size=4)
    metrics = trainer.train().metrics
    assert "hf_mbp: plans stay with the modelled cost of micro-batches: the 36 micro-b" in capsys.readouterr().out
    assert trainer.mbp_feed.cost.of_step() == MODELLED
    assert "mbp_calibration_error" not in metrics


def test_a_short_run_is_told_that_nothing_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trainer_for(tmp_path, max_steps=FIRST_STEPS)
    trainer.train()
    assert "calibrate=True changes nothing here, plans stay with the modelled cost of micro-batches: 10 steps are " in (
        capsys.readouterr().out
    )
    assert all(trainer.shapes[step] == trainer.planned(step, MODELLED) for step in range(FIRST_STEPS))
    assert "hf_mbp_cost" not in trainer.state.stateful_callbacks


def test_sharded_models_and_devices_without_a_clock_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    cost = trainer.mbp_feed.cost
    trainer.state.max_steps = 100
    assert cost._why_not_measured() == ""
    monkeypatch.setattr(Stopwatch, "can_time", False)
    assert cost._why_not_measured() == "times of a device of type cpu are not read"
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    assert cost._why_not_measured() == "processes that share a model wait for each other in every micro-batch"
    assert cost.of_step() == MODELLED
    assert cost.metrics() == {}


def test_of_many_micro_batches_some_are_told_to_the_other_ranks(tmp_path: Path) -> None:
    cost: RunCost = trainer_for(tmp_path).mbp_feed.cost
    for count in (0, 1, MOST_TOLD, MOST_TOLD + 1, 3 * MOST_TOLD - 1):
        timed = [Timed(rows=index + 1, width=2.5, seconds=0.5) for index in range(count)]
        told = cost._of_all_ranks(timed)
        assert told == timed[:: max(1, -(-count // MOST_TOLD))]
        assert len(told) <= MOST_TOLD


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_the_option_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"calibrate={value!r} is neither True nor False"):
        MBPConfig(calibrate=value)
