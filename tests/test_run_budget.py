"""The budget of a run follows what a device says, keeps every change, and a resumed run goes on alike."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertForMaskedLM, TrainerCallback

from hf_mbp import control, device_memory, rehearsal
from hf_mbp.gauge import Gauge
from hf_mbp.plan import Budget
from hf_mbp.rehearsal import longest_rows
from hf_mbp.row_lengths import known_lengths
from hf_mbp.run_budget import RunBudget
from tests.helpers import DROPOUT, bert_config, build, masked_prefix, mbp_trainer, token_rows, with_labels

LIMIT = 3_000_000


class Told(Gauge):
    """A device that says what it is told to: `factor` times what was planned, beside what rests."""

    def __init__(self, trainer: Any, factor: Any) -> None:
        super().__init__(trainer.args.device)
        self.trainer, self.factor = trainer, factor

    def restart(self) -> None:
        pass

    def release(self) -> None:
        pass

    def held_bytes(self) -> int:
        return 0

    def free_bytes(self) -> int:
        return 10**12

    def peak_bytes(self) -> int:
        budget = self.trainer.mbp_feed.budget
        profile = budget._profile
        if profile is None or not budget._planned.planned_bytes:
            return 0
        factor = self.factor(self.trainer.state.global_step)
        return int(profile.room.resting_bytes + factor * budget._planned.planned_bytes)


class Looks(TrainerCallback):
    """Calls `after_step`, as training does after each optimizer step, and keeps the budgets."""

    trainer: Any

    def __init__(self) -> None:
        self.caps: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.mbp_feed.budget.after_step()
        self.caps.append(self.trainer.mbp_feed.budget._profile.cap)


@pytest.fixture(autouse=True)
def a_small_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "used_memory", lambda device: 0)
    monkeypatch.setattr(device_memory, "free_memory", lambda device: 10**9)


def run(folder: Path, factor: Any, *, resume_from: str | None = None, **changes: Any) -> tuple[Any, list[float]]:
    looks = Looks()
    options: dict[str, Any] = {"max_tokens_per_micro_batch": None, "memory_limit": LIMIT, "max_steps": 20}
    options |= {"save_strategy": "steps", "save_steps": 6, "per_device_train_batch_size": 64, "check_at_start": False}
    trainer = mbp_trainer(
        build(BertForMaskedLM, bert_config(**DROPOUT)),
        with_labels(token_rows(64), masked_prefix),
        folder,
        callbacks=[looks],
        **{**options, **changes},
    )
    looks.trainer = trainer
    trainer.mbp_feed.budget.gauge = Told(trainer, factor)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer, looks.caps


def changing(step: int) -> float:
    """A device that takes much more from the fifth step to the eighth."""
    return 1.6 if 5 <= step < 9 else 0.6


def test_a_resumed_run_changes_its_budget_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "FAILURE_HOLDS", 5)
    whole, caps = run(tmp_path, changing)
    said = capsys.readouterr().out
    resumed, later = run(tmp_path / "resumed", changing, resume_from=str(tmp_path / "checkpoint-6"))
    assert caps[6:] == later
    assert min(caps) < caps[3]
    assert caps[-1] > min(caps)
    kept = whole.state.stateful_callbacks["hf_mbp"]
    assert resumed.state.stateful_callbacks["hf_mbp"] == kept
    json.dumps(kept)
    assert kept["version"] == 1
    assert [event["to"] for event in kept["events"]][-1] == caps[-1]
    assert said.count("max_bytes changes from") == len(kept["events"]) > 1
    torch.testing.assert_close(whole.model.state_dict(), resumed.model.state_dict(), rtol=0, atol=0)


class ToldByOptimizer(Told):
    """A device that holds far too much while the optimizer steps, which smaller micro-batches would not change."""

    has_stepped = False

    def restart(self) -> None:
        self.has_stepped = False

    def peak_bytes(self) -> int:
        return 10**12 if self.has_stepped else super().peak_bytes()


def test_what_the_optimizer_takes_does_not_shrink_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def watched(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        gauges[-1].has_stepped = True
        return step(optimizer, *args, **kwargs)

    gauges: list[ToldByOptimizer] = []

    def gauge(trainer: Any, factor: Any) -> Told:
        gauges.append(ToldByOptimizer(trainer, factor))
        return gauges[-1]

    monkeypatch.setitem(globals(), "Told", gauge)
    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    _, caps = run(tmp_path, lambda step: 0.9, max_steps=4, optim="adamw_torch")
    assert gauges[-1].has_stepped
    assert caps == [caps[0]] * 4


class Full(Told):
    """A device that holds too much in every step."""

    def peak_bytes(self) -> int:
        return 10**9


def test_the_peak_of_a_row_beyond_the_budget_does_not_shrink_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller micro-batches beside it would be slower, and the peak the same."""
    planned = RunBudget.planned

    def with_such_a_row(budget: RunBudget, micro_batches: Any) -> None:
        planned(budget, [*micro_batches, replace(micro_batches[0], is_checkpointed=True)])

    monkeypatch.setitem(globals(), "Told", Full)
    _, shrinking = run(tmp_path / "without", None, max_steps=3)
    monkeypatch.setattr(RunBudget, "planned", with_such_a_row)
    _, steady = run(tmp_path / "with", None, max_steps=3)
    assert shrinking[-1] < shrinking[0]
    assert steady == [steady[0]] * 3


def test_another_library_or_device_finds_the_budget_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, lambda step: 0.9, max_steps=6)
    monkeypatch.setattr("hf_mbp.profile._device_name", lambda device: "another")
    with pytest.warns(UserWarning, match=r"does not hold here: device was cpu .* and is another. It is found anew"):
        run(tmp_path / "resumed", lambda step: 0.9, max_steps=7, resume_from=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda entry: ["x"], r"cannot be read \(it is \['x'\]\)"),
        (lambda entry: {**entry, "settled_at": "x"}, r"cannot be read \(profile.settled_at is 'x'\)"),
        (lambda entry: {**entry, "events": [{"step": 1}]}, r"cannot be read \(profile.events\[0\] has no 'what'\)"),
        (
            lambda entry: {**entry, "budget": {**entry["budget"], "max_tokens": 10**9}},
            "its budget of 1000000000 tokens is not within the 200 that are asked for",
        ),
        (lambda entry: {**entry, "budget": {}}, "its budget of None tokens is not within the 200"),
        (lambda entry: {**entry, "room": {"allowed_bytes": 9, "resting_bytes": 1}}, "either a room .* and not both"),
    ],
)
def test_a_budget_that_was_changed_by_hand_is_found_anew(
    spoil: Callable[[dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    options = {"max_tokens_per_micro_batch": 200, "memory_limit": None}
    run(tmp_path, lambda step: 1.0, max_steps=6, **options)
    file = tmp_path / "checkpoint-6" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"]["hf_mbp"] = spoil(state["stateful_callbacks"]["hf_mbp"])
    file.write_text(json.dumps(state))
    with pytest.warns(UserWarning, match=f"The budget of the checkpoint does not hold here: .*{reason}"):
        trainer, _ = run(tmp_path / "resumed", lambda step: 1.0, max_steps=7, resume_from=str(file.parent), **options)
    assert trainer.mbp_feed.budget.settled == Budget(max_tokens=200)


def test_a_fault_shrinks_a_cap_that_was_given_and_never_beyond_it(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, lambda step: 1.0, max_tokens_per_micro_batch=200, memory_limit=None, max_steps=1)
    budget = trainer.mbp_feed.budget
    budget.shrink(6, 30)
    assert budget.settle([], []).max_tokens == 90
    events = len(budget._profile.events)
    budget.shrink(1, 300)
    assert budget.settle([], []).max_tokens == 90
    assert len(budget._profile.events) == events
    assert not budget.is_checkpointed(1, 300)
    budget.checkpoint_from(300)
    budget.checkpoint_from(400)
    assert budget.is_checkpointed(1, 300)
    assert not budget.is_checkpointed(2, 300)
    assert not budget.is_checkpointed(1, 299)
    for step in range(2, 1200):
        trainer.state.global_step = step
        budget.after_step()
    assert budget.settle([], []).max_tokens == 200
    assert trainer.state.stateful_callbacks["hf_mbp"]["checkpoint_from"] == 300


def test_a_row_beyond_the_budget_runs_with_checkpointing_where_the_model_can(tmp_path: Path) -> None:
    trainer, _ = run(tmp_path, lambda step: 1.0, max_steps=1)
    budget = trainer.mbp_feed.budget
    wide = 10**6
    assert budget.is_checkpointed(1, wide)
    assert not budget.is_checkpointed(1, 10)
    assert not budget.is_checkpointed(2, wide)
    trainer.model.supports_gradient_checkpointing = False
    assert not budget.is_checkpointed(1, wide)


# The longest first


def test_the_worst_micro_batch_is_tried_and_corrects_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def taken(trainer: Any, worst: Any, gauge: Any) -> int:
        tried.append([len(row["input_ids"]) for row in worst.rows])
        return int(1.5 * worst.planned_bytes)

    monkeypatch.setattr(rehearsal, "_taken", taken)
    trainer, caps = run(tmp_path, lambda step: 1.2, max_steps=1)
    longest = max(len(row["input_ids"]) for row in trainer.train_dataset)
    assert longest - 5 <= max(tried[0]) <= longest
    assert "the worst micro-batch of the data" in capsys.readouterr().out
    kept = trainer.state.stateful_callbacks["hf_mbp"]
    assert kept["events"][0]["step"] == 0
    room = kept["room"]
    assert 1.5 * caps[0] + room["resting_bytes"] == pytest.approx(rehearsal.AIM_OF_ONE * LIMIT)


def test_running_out_of_memory_there_halves_the_budget_and_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def scarce(trainer: Any, worst: Any, gauge: Any) -> int:
        sizes.append(worst.planned_bytes)
        if len(sizes) < 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return 0

    monkeypatch.setattr(rehearsal, "_run", scarce)
    trainer, _ = run(tmp_path, lambda step: 0.0, max_steps=1)
    assert len(sizes) == 3
    assert sizes[1] <= sizes[0] / 2
    assert trainer.state.stateful_callbacks["hf_mbp"]["failure"]["size"] == sizes[1]


def test_a_single_row_without_memory_there_is_left_to_the_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def scarce(trainer: Any, worst: Any, gauge: Any) -> int:
        tried.append(len(worst.rows))
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(rehearsal, "WORTH_IT", 0.0)
    monkeypatch.setattr(rehearsal, "_run", scarce)
    trainer, _ = run(tmp_path, lambda step: 0.0, max_steps=2, per_device_train_batch_size=1)
    assert tried
    assert set(tried) == {1}
    assert trainer.state.global_step == 2
    assert trainer.state.stateful_callbacks["hf_mbp"]["failure"] is not None


@pytest.mark.parametrize(("spare", "is_copied"), [(0, True), (10**9, False)])
def test_copies_of_weights_leave_room_for_what_is_tried(
    spare: int, is_copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen weights may take almost all that is free; what was tried beside their copies ran out of memory."""
    were_copied = []
    original = rehearsal.loss_of

    def noted(trainer: Any, *args: Any) -> Any:
        were_copied.append(all(id(parameter) not in own for parameter in trainer.model.parameters()))
        return original(trainer, *args)

    trainer = mbp_trainer(build(BertForMaskedLM, bert_config()), with_labels(token_rows(8), masked_prefix), tmp_path)
    own = {id(parameter) for parameter in trainer.model.parameters()}
    rows = longest_rows(trainer, 8)
    worst = rehearsal.Worst(rows=rows, width=30, planned_bytes=float(spare))
    monkeypatch.setattr(rehearsal, "loss_of", noted)
    rehearsal._run(trainer, worst, Told(trainer, lambda step: 0.0))
    assert were_copied == [is_copied]
    assert {id(parameter) for parameter in trainer.model.parameters()} == own
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_trying_it_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget of tokens that binds before the bytes do, plans are alike; so must be the weights."""
    ran = []
    original = rehearsal._run

    def noted(*args: Any) -> int:
        ran.append(original(*args))
        return 0

    monkeypatch.setattr(rehearsal, "WORTH_IT", 0.0)
    monkeypatch.setattr(rehearsal, "_run", noted)
    options = {"max_tokens_per_micro_batch": 64, "max_steps": 3, "per_device_train_batch_size": 16}
    with_it, _ = run(tmp_path, lambda step: 0.0, memory_limit="900MB", **options)
    assert len(ran) == 1
    without, _ = run(tmp_path, lambda step: 0.0, memory_limit=None, **options)
    assert len(ran) == 1
    torch.testing.assert_close(with_it.model.state_dict(), without.model.state_dict(), rtol=0, atol=0)


def test_lengths_are_known_of_tables_and_lists_and_of_nothing_else() -> None:
    rows = token_rows(40)
    lengths = [len(row["input_ids"]) for row in rows]
    table = datasets.Dataset.from_list(rows)
    for known in (rows, table, table.with_format("torch")):
        assert known_lengths(known).tolist() == lengths
    chosen = [5, 3, 30]
    assert known_lengths(table.select(chosen)).tolist() == [lengths[index] for index in chosen]
    assert known_lengths(table.with_transform(lambda batch: batch)) is None
    assert known_lengths(datasets.Dataset.from_dict({"text": ["a"]})) is None
    assert known_lengths([{"pixel_values": 1}]) is None
    assert known_lengths(iter(rows)) is None


def test_targets_of_an_encoder_decoder_are_known_too() -> None:
    rows = [{"input_ids": [5] * index, "labels": [6] * (20 - index)} for index in range(1, 20)]
    for known in (rows, datasets.Dataset.from_list(rows)):
        assert known_lengths(known, has_targets=True).tolist() == [20] * 19
        assert known_lengths(known).tolist() == list(range(1, 20))
    classes = [{"input_ids": [5] * index, "labels": index} for index in range(1, 20)]
    sources = [{"input_ids": [5] * index} for index in range(1, 20)]
    for known, more in ((classes, 1), (sources, 0)):
        for kind in (known, datasets.Dataset.from_list(known)):
            assert known_lengths(kind, has_targets=True).tolist() == [index + more for index in range(1, 20)]


def test_rows_are_read_as_the_collator_gets_them(tmp_path: Path) -> None:
    rows = [{**row, "note": "x"} for row in with_labels(token_rows(40), masked_prefix)]
    trainer = mbp_trainer(
        build(BertForMaskedLM, bert_config()), datasets.Dataset.from_list(rows), tmp_path, remove_unused_columns=True
    )
    longest = longest_rows(trainer, 5)
    lengths = sorted((len(row["input_ids"]) for row in rows), reverse=True)
    assert [len(row["input_ids"]) for row in longest] == lengths[:5]
    assert all(row.keys() == {"input_ids", "attention_mask", "labels"} for row in longest)
    assert not trainer.accelerator._dataloaders
