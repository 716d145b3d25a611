"""A mini-batch that runs out of memory is run again, and nobody can tell from the weights."""

import copy
import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaForCausalLM

from hf_mbp import MBPTrainer, other_trainers
from hf_mbp.accumulation import Float32Sums
from hf_mbp.compat import can_checkpoint
from hf_mbp.recovery import MOST_TIMES, SMALL_BUFFER, Before, ChangingBuffers, Fault, Guard, Recovery, _counted
from hf_mbp.run_budget import RunBudget
from hf_mbp.step import MicroBatch
from tests.faults import MESSAGE, Faults
from tests.helpers import (
    Pad,
    Recorder,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    token_rows,
    whole_gradients,
    with_labels,
)
from tests.recovery_runs import ROWS, classifier, retries, trained

LAYERS = {
    "embeddings": lambda model: model.bert.embeddings,
    "first layer": lambda model: model.bert.encoder.layer[0],
    "last layer": lambda model: model.bert.encoder.layer[1],
    "head": lambda model: model.classifier,
}


# The update


@pytest.mark.parametrize(
    ("layer", "accumulation"), [("embeddings", 1), ("first layer", 4), ("last layer", 1), ("head", 1)]
)
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_the_gradient_is_that_of_the_whole_batch(stage: str, layer: str, accumulation: int, tmp_path: Path) -> None:
    """Wherever memory runs out, in any micro-batch."""
    expected = whole_gradients(classifier(), lambda model: model(**Pad()(ROWS)).loss)[1]
    options = {"max_tokens_per_micro_batch": 100}
    undisturbed = trained(classifier(), tmp_path, **options)
    count = int(undisturbed.recorder.logs[0]["mbp_micro_batches"])
    assert 3 < count < 8
    for position in range(count):
        model = classifier()
        faults = Faults(LAYERS[layer](model), stage, {position})
        trainer = trained(
            model,
            tmp_path,
            faults,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            **options,
        )
        assert faults.raised == 1
        assert retries(trainer) == 1
        assert trainer.recorder.logs[0]["mbp_micro_batches"] > count
        assert relative_error(expected, trainer.recorder.gradients[0]) < 1e-7
        assert trainer.recorder.logs[0]["mbp_tokens"] == sum(len(row["input_ids"]) for row in ROWS)
        assert trainer.recorder.logs[0]["loss"] == pytest.approx(undisturbed.recorder.logs[0]["loss"], rel=1e-7)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_with_dropout_it_is_a_run_of_the_same_plan_bit_for_bit(stage: str, tmp_path: Path) -> None:
    """The first micro-batch has 64 tokens at most: after it has failed, it is as if half had been asked for."""
    model = classifier(dropout=0.3)
    faults = Faults(model.bert.encoder.layer[1], stage, {0})
    recovered = trained(model, tmp_path, faults, max_steps=3)
    assert retries(recovered) == 1
    half = recovered.recorder.logs[0]["mbp_max_tokens"]
    assert half <= 32
    same_plan = trained(classifier(dropout=0.3), tmp_path, max_steps=3, max_tokens_per_micro_batch=int(half))
    other_plan = trained(classifier(dropout=0.3), tmp_path, max_steps=3)
    weights = [trainer.model.state_dict() for trainer in (recovered, same_plan, other_plan)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    assert not torch.equal(weights[0]["classifier.weight"], weights[2]["classifier.weight"])
    assert [log["loss"] for log in recovered.recorder.logs] == [log["loss"] for log in same_plan.recorder.logs]


def test_several_faults_in_one_step(tmp_path: Path) -> None:
    expected = whole_gradients(classifier(), lambda model: model(**Pad()(ROWS)).loss)[1]
    model = classifier()
    faults = Faults(model.bert.encoder.layer[0], "backward", {0, 1, 4})
    trainer = trained(model, tmp_path, faults)
    assert (faults.raised, retries(trainer)) == (3, 3)
    assert relative_error(expected, trainer.recorder.gradients[0]) < 1e-7


def test_every_row_is_used_once_in_the_run_that_counts(tmp_path: Path) -> None:
    model = classifier()
    faults = Faults(model.classifier, "backward", {2})
    trainer = trained(model, tmp_path, faults)
    assert sum(faults.rows_seen[3:]) == len(ROWS)
    assert sum(faults.rows_seen[:3]) < len(ROWS)
    assert len(faults.rows_seen[3:]) == trainer.recorder.logs[0]["mbp_micro_batches"]


def test_random_masks_are_drawn_again_as_at_first(tmp_path: Path) -> None:
    """A collator with a generator of its own: a fault has not moved it on."""

    class Masks(Pad):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def __call__(self, rows: list[Any]) -> Any:
            inputs = super().__call__(rows)
            hidden = torch.rand(inputs["input_ids"].shape, generator=self.generator) < 0.3
            return {**inputs, "input_ids": inputs["input_ids"].masked_fill(hidden, 1)}

    model = classifier()
    faults = Faults(model.classifier, "forward", {0})
    recovered = trained(model, tmp_path, faults, data_collator=Masks())
    half = int(recovered.recorder.logs[0]["mbp_max_tokens"])
    same = trained(classifier(), tmp_path, data_collator=Masks(), max_tokens_per_micro_batch=half)
    assert torch.equal(recovered.model.classifier.weight, same.model.classifier.weight)


class Normalised(nn.Module):
    """A regression with batch normalisation, whose running means a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 1)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        mask = attention_mask[..., None].double()
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        output = self.head(self.norm(pooled))[:, 0]
        return {"loss": (output - labels.double()).square().mean()}


def test_running_means_are_put_back(tmp_path: Path) -> None:
    def build_normalised() -> Normalised:
        torch.manual_seed(0)
        return Normalised().double()

    options = {"max_steps": 2, "max_tokens_per_micro_batch": 256}
    model = build_normalised()
    faults = Faults(model.head, "backward", {1})
    recovered = trained(model, tmp_path, faults, **options)
    assert faults.raised == 1
    half = int(recovered.recorder.logs[0]["mbp_max_tokens"])
    same = trained(build_normalised(), tmp_path, **{**options, "max_tokens_per_micro_batch": half})
    for name, value in same.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_only_buffers_that_change_are_copied_after_the_first_mini_batch() -> None:
    model = Normalised().double()
    size = 2 * SMALL_BUFFER
    model.register_buffer("table", torch.ones(size))
    model.register_buffer("memory", torch.ones(size))
    model.register_buffer("quantized", torch.ones(size, dtype=torch.int8))
    buffers = ChangingBuffers()
    first = buffers.copies([model])
    small = {"running_mean", "running_var", "num_batches_tracked"}
    assert {kept.name for kept in first} == {*small, "table", "memory"}
    model(**Pad()(ROWS))
    model.memory += 1
    buffers.learn(first)
    assert {kept.name for kept in buffers.copies([model])} == {*small, "memory"}


def test_the_same_fault_again_and_again_ends_the_run() -> None:
    seen: Counter[Any] = Counter()
    fault = Fault(rank=1, rows=0, width=1, is_checkpointed=False, reason="CUDA out of memory")
    assert [_counted(fault, seen).times for _ in range(MOST_TIMES)] == list(range(1, MOST_TIMES + 1))
    with pytest.raises(MemoryError, match=r"Process 1 .* 4 times with a few tokens to keep in step .*CUDA out of"):
        _counted(fault, seen)


def test_only_the_same_micro_batch_on_the_same_rank_is_the_same_fault() -> None:
    seen: Counter[Any] = Counter()
    fault = Fault(rank=1, rows=2, width=3, is_checkpointed=False)
    others = [
        replace(fault, **change) for change in ({"rank": 0}, {"rows": 4}, {"width": 6}, {"is_checkpointed": True})
    ]
    assert [_counted(each, seen).times for each in (fault, *others, fault)] == [1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("model_can", "row_is", "expected"),
    [
        (True, False, ["checkpoint", "checkpoint"]),
        (True, True, ["again", "give up"]),
        (False, False, ["again", "give up"]),
    ],
)
def test_a_single_row_is_checkpointed_or_tried_once_more(model_can: bool, row_is: bool, expected: list[str]) -> None:
    def what_next(fault: Fault) -> str:
        if fault.can_be_checkpointed(can_checkpoint=model_can):
            return "checkpoint"
        return "give up" if fault.is_hopeless(can_checkpoint=model_can) else "again"

    fault = Fault(rank=0, rows=1, width=9, is_checkpointed=row_is)
    assert [what_next(replace(fault, times=times)) for times in (1, 2)] == expected
    assert [what_next(replace(fault, rows=rows, times=3)) for rows in (0, 2)] == ["again", "again"]


def micro_batch_of(rows: int, *, is_idle: bool = False) -> MicroBatch:
    return MicroBatch(inputs={}, num_rows=rows, num_items=rows, cells=4 * rows, tokens=rows, is_idle=is_idle)


ALONE: Any = SimpleNamespace(count=1, index=0, device=torch.device("cpu"))


def guarded(num_ranks: int, *failing: int) -> tuple[Guard, list[MicroBatch], list[MicroBatch], list[float]]:
    """Three micro-batches on the last of some ranks, of which passes number `failing` have no memory: the guard, what
    was planned, what was run, and what came out."""
    run: list[MicroBatch] = []

    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        run.append(micro_batch)
        if len(run) - 1 in failing:
            raise torch.OutOfMemoryError(MESSAGE)
        return torch.ones(())

    ranks: Any = SimpleNamespace(count=num_ranks, index=num_ranks - 1, device=torch.device("cpu"))
    guard = Guard(backward, ranks, [])
    planned = [
        MicroBatch(
            inputs=Pad()(rows), rows=tuple(rows), num_rows=len(rows), num_items=1, cells=60, tokens=50, weight=0.5
        )
        for rows in (ROWS[:3], ROWS[:2], ROWS[:1])
    ]
    return guard, planned, run, [float(guard(micro_batch)) for micro_batch in planned]


def test_after_a_fault_nothing_more_is_run_on_one_process() -> None:
    guard, planned, run, losses = guarded(1, 1)
    assert (run, losses) == (planned[:2], [1, 0, 0])
    assert guard.fault == Fault(rank=0, rows=2, width=30, is_checkpointed=False, reason=MESSAGE)


def test_after_a_fault_one_of_several_ranks_goes_on_with_fillers() -> None:
    """Also in the place of the micro-batch that failed: its collectives are still to be made."""
    guard, planned, run, losses = guarded(2, 1)
    assert (run[:2], losses) == (planned[:2], [1, 0, 0])
    assert [(filler.num_rows, filler.weight, filler.rows) for filler in run[2:]] == [(0, 0, ())] * 2
    assert all(filler.inputs["input_ids"].shape == (2, 8) for filler in run[2:])
    assert (guard.fault.rank, guard.fault.row) == (1, None)


def test_memory_is_given_back_before_the_rank_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    monkeypatch.setattr("hf_mbp.recovery.give_back_memory", lambda: given_back.append(1))
    guarded(2, 0)
    assert len(given_back) == 1
    guarded(2, 0, 1)
    assert len(given_back) == 3


def test_a_filler_that_was_planned_may_have_no_memory_either() -> None:
    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        raise torch.OutOfMemoryError(MESSAGE)

    guard = Guard(backward, ALONE, [])
    guard(micro_batch_of(0))
    assert "a few tokens to keep in step" in str(guard.fault)


def test_another_run_finds_out_anew_which_large_buffers_change() -> None:
    """It may train another model."""
    modules = [nn.Linear(1, 1), nn.Linear(1, 1)]
    for module in modules:
        module.register_buffer("table", torch.zeros(2 * SMALL_BUFFER))
    micro_batch = micro_batch_of(2)
    trained_now: list[nn.Module] = []
    passes: list[int] = []

    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        trained_now[1].table += 1
        passes.append(1)
        if len(passes) == 2:
            raise torch.OutOfMemoryError(MESSAGE)
        return torch.ones(())

    recovery = Recovery(ALONE, lambda: trained_now, lambda: [])
    for module in modules:
        trained_now[:] = [nn.Linear(1, 1), module]
        recovery.restart()
        recovery.run([micro_batch], lambda parts, run: run(*parts), backward, plan_again=lambda faults: [micro_batch])
    assert [float(module.table.max()) for module in modules] == [1, 1]
    assert len(passes) == 3


def test_the_first_mini_batch_that_runs_tells_which_large_buffers_change() -> None:
    model, buffers = nn.Linear(1, 1), ChangingBuffers()
    for name in ("constant", "changing"):
        model.register_buffer(name, torch.zeros(2 * SMALL_BUFFER))
    recovery = Recovery(ALONE, lambda: [model], lambda: [], buffers)

    def attempt(micro_batches: list[MicroBatch], run: Any) -> torch.Tensor:
        return sum(run(one) for one in micro_batches if not one.is_idle)

    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        model.changing += 1
        return torch.ones(())

    for is_idle, copied in [(True, ["constant", "changing"]), (False, ["changing"])]:
        recovery.run([micro_batch_of(2, is_idle=is_idle)], attempt, backward, plan_again=lambda faults: [])
        assert [kept.name for kept in buffers.copies([model])] == copied


def test_what_there_is_to_plan_again_for_is_known_to_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned once all is put back, and the memory of that, too, is given back; the reason is this rank's own."""
    said = iter([[True, 3, 9, False], [False, 0, 0, False]])
    ranks: Any = SimpleNamespace(count=2, index=1, device=torch.device("cpu"), gather=lambda *own: [next(said), [*own]])
    weight, happened, errors = nn.Parameter(torch.ones(1)), [], [torch.OutOfMemoryError(MESSAGE)]
    monkeypatch.setattr("hf_mbp.recovery.give_back_memory", lambda: happened.append(weight.grad))

    def backward(micro_batch: MicroBatch) -> torch.Tensor:
        weight.grad = torch.ones(1)
        if errors:
            raise errors.pop()
        return torch.ones(())

    def plan_again(faults: list[Fault]) -> list[MicroBatch]:
        assert faults == [
            Fault(rank=0, rows=3, width=9, is_checkpointed=False),
            Fault(rank=1, rows=2, width=4, is_checkpointed=False, reason=MESSAGE),
        ]
        assert happened[-1] is None
        return [micro_batch_of(1)]

    recovery = Recovery(ranks, lambda: [], lambda: [weight])
    attempt: Any = lambda micro_batches, run: sum(map(run, micro_batches))  # noqa: E731
    assert float(recovery.run([micro_batch_of(2)], attempt, backward, plan_again=plan_again)) == 1
    assert weight.grad is not None


def test_a_rank_without_memory_for_fillers_waits_at_the_end() -> None:
    guard, planned, run, losses = guarded(2, 2, 3)
    assert (run[:3], len(run), losses) == (planned, 4, [1, 1, 0])
    assert guard.fault.row is ROWS[0]
    assert [float(guard(micro_batch)) for micro_batch in planned] == [0, 0, 0]
    assert len(run) == 4


class Counting(nn.Module):
    """Has a counter of its rows by label, and a number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 1)
        self.register_buffer("seen", torch.zeros(4, dtype=torch.int64))
        self.longest = 0

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        if torch.is_grad_enabled():
            self.seen += torch.bincount(labels.clamp(min=0), minlength=4)
            self.longest = max(self.longest, input_ids.shape[1])
        return {"loss": ((self.embedding(input_ids).mean((1, 2)) - labels).square() * self.longest).mean()}


def test_counters_and_the_numbers_beside_them_are_put_back(tmp_path: Path) -> None:
    """After a first step that had nothing to learn from."""
    rows = [*with_labels(ROWS, lambda index, row: -100), *ROWS]

    class Labelled(MBPTrainer):
        def num_items(self, micro_batch: Any) -> float:
            return float((micro_batch["labels"] != -100).sum())

    outcomes = []
    for passes in (set(), {1}):
        torch.manual_seed(0)
        model = Counting().double()
        faults = Faults(model.embedding, "backward", passes).install(model)
        trainer = mbp_trainer(
            model,
            rows,
            tmp_path,
            check_at_start=False,
            max_steps=2,
            train_sampling_strategy="sequential",
            trainer_class=Labelled,
        )
        with pytest.warns(UserWarning, match="nothing to learn from"):
            trainer.train()
        assert faults.raised == len(passes)
        outcomes.append((model.seen.tolist(), sum(model.seen.tolist())))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] == 16


class Notes(MBPTrainer):
    """Notes a metric at each call, and a count, as the trainers of TRL do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": {"rows": []}}
        self._total_train_tokens = 0
        self.rows_seen = 0

    def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
        self._metrics["train"].setdefault("rows", []).append(float(len(inputs["input_ids"])))
        self._total_train_tokens += int(inputs["attention_mask"].sum())
        self.rows_seen += len(inputs["input_ids"])
        return super().compute_loss(model, inputs, **kwargs)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_a_trainer_notes_is_rolled_back(failing: int, tmp_path: Path) -> None:
    model = classifier()
    faults = Faults(model.classifier, "backward", {failing})
    recovered = trained(model, tmp_path, faults, trainer_class=Notes, max_tokens_per_micro_batch=100)
    half = int(recovered.recorder.logs[0]["mbp_max_tokens"])
    same = trained(classifier(), tmp_path, trainer_class=Notes, max_tokens_per_micro_batch=half)
    assert recovered._metrics == same._metrics
    assert len(recovered._metrics["train"]["rows"]) == 1
    assert recovered._total_train_tokens == sum(len(row["input_ids"]) for row in ROWS)
    assert recovered.rows_seen == len(ROWS)


# What is put back


@pytest.mark.parametrize("attempts", [1, 2])
def test_gradients_that_were_there_before_are_put_back_as_often_as_need_be(attempts: int) -> None:
    """Before the mini-batch some have one, some none; backward passes add to the first in place."""
    model = nn.Linear(2, 1)
    model.weight.grad = torch.tensor([[1.0, 2.0]])
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    before = Before([model], [*model.parameters(), frozen], ChangingBuffers())
    frozen.grad = torch.ones(1)  # nobody's business: a backward pass does not reach it
    for _ in range(attempts):
        model(torch.ones(1, 2)).sum().backward()
        assert model.weight.grad.tolist() == [[2.0, 3.0]]
        before.put_back()
        assert model.weight.grad.tolist() == [[1.0, 2.0]]
        assert model.bias.grad is None
    assert frozen.grad is not None


def test_buffers_are_put_back_in_place_and_under_their_names() -> None:
    """Whether a pass has written into a buffer or put another one in its place."""
    model = nn.Linear(1, 1)
    model.register_buffer("written", torch.ones(2))
    model.register_buffer("replaced", torch.ones(2))
    model.longest, model.average = 3, 0.5
    held = dict(model.named_buffers())
    before = Before([model], [], ChangingBuffers())
    model.written += 1
    model.replaced = torch.zeros(2)
    model.longest, model.average = 4, 0.25
    before.put_back()
    assert (model.longest, model.average) == (3, 0.5), "the numbers beside them, too"
    for name, buffer in model.named_buffers():
        assert buffer is held[name]
        assert buffer.tolist() == [1, 1]


def test_a_large_buffer_that_another_takes_the_place_of_has_changed() -> None:
    model = nn.Linear(1, 1)
    for name in ("kept", "replaced", "far_away"):
        model.register_buffer(name, torch.ones(2 * SMALL_BUFFER))
    buffers = ChangingBuffers()
    first = buffers.copies([model])
    model.replaced = torch.ones(2 * SMALL_BUFFER)
    buffers.learn(first)
    assert [kept.name for kept in buffers.copies([model])] == ["replaced"]
    model.far_away += 1
    buffers.learn(buffers.copies([model]))
    assert [kept.name for kept in buffers.copies([model])] == ["replaced"], "the first mini-batch decides"


class Growing(nn.Module):
    """Has a large buffer that each forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 1)
        self.register_buffer("table", torch.zeros(2 * SMALL_BUFFER))

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
        self.table += 1
        return {"loss": (self.embedding(input_ids).mean((1, 2)) - labels).square().mean()}


def test_a_second_run_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another model, whose buffers change, too, and another optimizer, whose first step is protected, too."""
    protected: list[Any] = []
    monkeypatch.setattr("hf_mbp.runner.protect_first_step", lambda optimizer, **_: protected.append(optimizer))
    recorder = Recorder()
    options = {"check_at_start": False, "callbacks": [recorder], "max_steps": 2}
    trainer = mbp_trainer(Growing().double(), ROWS, tmp_path, **options)
    trainer.train()

    def make() -> nn.Module:
        model = Growing().double()
        Faults(model.embedding, "backward", {1}).install(model)
        return model

    trainer.model_init = make
    trainer.train()
    assert [log["mbp_oom_retries"] for log in recorder.logs] == [0, 0, 1, 0]
    assert float(trainer.model.table[0]) == sum(log["mbp_micro_batches"] for log in recorder.logs[2:])
    assert len({id(optimizer) for optimizer in protected}) == len(protected) == 2


def test_a_step_that_was_skipped_was_not_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler of fp16 skips steps until its scale is low enough."""
    protected: list[Any] = []
    monkeypatch.setattr("hf_mbp.runner.protect_first_step", lambda optimizer, **_: protected.append(optimizer))
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", property(lambda self: len(protected) < 3))
    trained(classifier(), tmp_path, max_steps=5)
    assert len(protected) == 3


def test_room_is_made_before_each_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, happened = classifier(), []
    monkeypatch.setattr(RunBudget, "make_room", lambda self: happened.append("room"))
    model.register_forward_pre_hook(lambda *_: happened.append("pass"))
    trainer = trained(model, tmp_path)
    assert happened == ["room", "pass"] * int(trainer.recorder.logs[0]["mbp_micro_batches"])


# What happens when


def test_memory_is_given_back_before_the_next_attempt(tmp_path: Path) -> None:
    model = classifier()
    faults = Faults(model.bert.encoder.layer[1], "backward", {0})
    alive = []

    def look(*_: Any) -> None:
        if faults.raised and not alive:
            alive.extend(output() is not None for output in faults.failed_outputs)

    gc.disable()  # nothing but the recovery itself may free the failed pass
    try:
        model.register_forward_pre_hook(look)
        trained(model, tmp_path, faults)
    finally:
        gc.enable()
    assert alive == [False]


def test_one_line_says_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = classifier()
    trained(model, tmp_path, Faults(model.classifier, "forward", {1}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "no memory" in line]
    assert len(lines) == 1
    assert lines[0].startswith("hf_mbp: step 1: no memory for a micro-batch of ")
    assert MESSAGE in lines[0]
    assert "The step is run again from its start, in " in lines[0]


@pytest.mark.parametrize("error", [RuntimeError("size mismatch"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_pass_untouched(error: BaseException, tmp_path: Path) -> None:
    model, calls = classifier(), []

    def fail(*_: Any) -> None:
        calls.append(1)
        raise error

    model.classifier.register_forward_hook(fail)
    with pytest.raises(type(error)) as caught:
        trained(model, tmp_path)
    assert caught.value is error
    assert len(calls) == 1


def test_batches_of_a_loader_of_ones_own_are_halved(tmp_path: Path) -> None:
    class Ready(MBPTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(ROWS, batch_size=16, collate_fn=Pad())

    expected = whole_gradients(classifier(), lambda model: model(**Pad()(ROWS)).loss)[1]
    model = classifier()
    faults = Faults(model.bert.encoder.layer[0], "backward", {0, 2})
    trainer = trained(model, tmp_path, faults, trainer_class=Ready)
    assert faults.rows_seen == [16, 8, 8, 4, 4, 4, 4]
    assert relative_error(expected, trainer.recorder.gradients[0]) < 1e-7


def test_batches_of_pairs_are_halved_by_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chosen rows come first, then the rejected ones."""
    trainer = mbp_trainer(classifier(), ROWS, tmp_path)
    monkeypatch.setattr(other_trainers, "rows_each", lambda trainer: 2)
    inputs = {"input_ids": torch.arange(8)[:, None]}
    halves = trainer.mbp_feed._parts_of(inputs, Fault(rank=0, rows=8, width=1, is_checkpointed=False))
    assert [half["input_ids"].flatten().tolist() for half in halves] == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_loader_of_ones_own_whose_rows_never_fit_ends(tmp_path: Path) -> None:
    class Ready(MBPTrainer):
        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(ROWS[:4], batch_size=4, collate_fn=Pad())

    model = classifier()
    faults = Faults(model.bert.embeddings, "forward", set(range(1000)))
    with pytest.raises(MemoryError, match="does not fit the memory by itself, with activation checkpointing"):
        trained(model, tmp_path, faults, trainer_class=Ready)
    assert faults.raised < 10


class Uncertain(MBPTrainer):
    """Weighs its loss by a parameter of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_variance = nn.Parameter(torch.zeros((), dtype=torch.float64))

    @property
    def own(self) -> nn.Parameter:
        return self.log_variance

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, *args, **kwargs) * (-self.own).exp()


class UncertainByAList(Uncertain):
    """Only the optimizer knows of the parameter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts = [self.log_variance]
        del self.log_variance

    @property
    def own(self) -> nn.Parameter:
        return self.parts[0]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.add_param_group({"params": self.parts})
        return optimizer


@pytest.mark.parametrize("trainer_class", [Uncertain, UncertainByAList])
def test_a_parameter_of_the_trainer_itself_is_put_back(trainer_class: Any, tmp_path: Path) -> None:
    gradients = []
    for passes in (set(), {2}):
        model = classifier()
        faults = Faults(model.classifier, "backward", passes)
        trainer = trained(model, tmp_path, faults, trainer_class=trainer_class)
        assert faults.raised == len(passes)
        gradients.append(float(trainer.own.grad))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-9)


def test_what_is_not_released_at_once_may_be_there_a_moment_later(tmp_path: Path) -> None:
    """One fault with a single row, in a model without activation checkpointing, does not end the run."""
    model = classifier()
    model.supports_gradient_checkpointing = False
    faults = Faults(model.classifier, "backward", {0})
    trainer = trained(model, tmp_path, faults, max_tokens_per_micro_batch=30)
    assert (faults.raised, retries(trainer)) == (1, 1)


def test_a_fault_in_the_sums_of_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(classifier().bfloat16(), tmp_path, accumulate_in_fp32=True)
    real, calls = Float32Sums.add, []

    def add(sums: Float32Sums, parameters: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError(MESSAGE)
        real(sums, parameters)

    monkeypatch.setattr(Float32Sums, "add", add)
    trainer = trained(classifier().bfloat16(), tmp_path, accumulate_in_fp32=True)
    assert retries(trainer) == 1
    assert relative_error(expected.recorder.gradients[0], trainer.recorder.gradients[0]) < 0.02


# A row that does not fit alone


def needs_checkpointing(layer: Any, longest: int) -> Any:
    """Spares what is shorter, and what is checkpointed."""
    return lambda output: output.shape[1] < longest or layer.gradient_checkpointing


@pytest.mark.parametrize("stage", ["forward", "backward"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_row_too_long_runs_with_activation_checkpointing(
    dropout: float, stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*ROWS[:15], {**ROWS[15], "input_ids": [7] * 50, "attention_mask": [1] * 50}]
    gradients = []
    for faulty in (False, True):
        model = classifier(dropout=dropout)
        layer = model.bert.encoder.layer[0]
        faults = Faults(layer, stage, set(range(100)) if faulty else set(), needs_checkpointing(layer, 50))
        recorder = Recorder()
        trainer = mbp_trainer(model, rows, tmp_path, check_at_start=False, callbacks=[recorder])
        checkpointed: list[tuple[int, bool]] = []
        layer.register_forward_pre_hook(
            lambda module, inputs, seen=checkpointed: seen.append((inputs[0].shape[1], module.gradient_checkpointing))
        )
        faults.install(model)
        trainer.train()
        assert faults.raised == faulty
        gradients.append(recorder.gradients[0])
        assert recorder.logs[0]["mbp_oom_retries"] == faulty
    assert relative_error(*gradients) == 0
    assert {width for width, is_checkpointed in checkpointed if is_checkpointed} == {50}
    assert can_checkpoint(model)  # it is off again
    assert "with activation checkpointing" in capsys.readouterr().out


def test_a_row_that_fits_in_no_way_is_named_and_the_run_is_saved(tmp_path: Path) -> None:
    rows = copy.deepcopy(ROWS)
    model = build(LlamaForCausalLM, llama_config())
    causal = with_labels(token_rows(16), masked_prefix)
    causal[11] = {"input_ids": [9] * 61, "attention_mask": [1] * 61, "labels": [9] * 61}
    assert len(rows) == 16
    faults = Faults(model.model.layers[0], "forward", set(range(100)), lambda output: output.shape[1] < 61)
    trainer = mbp_trainer(
        model,
        causal,
        tmp_path,
        check_at_start=False,
        max_steps=8,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        save_strategy="steps",
        save_steps=100,
    )
    faults.install(model)
    with pytest.raises(MemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("Row 11 of train_dataset, of 61 tokens does not fit the memory by itself")
    for part in ("with activation checkpointing", MESSAGE, "are free on cpu", "max_length", "checkpoint-2"):
        assert part in message
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", dtype=torch.float64).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), "the step that failed has left something behind"


def test_a_model_without_checkpointing_says_so(tmp_path: Path) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(60, 1)

        def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, Any]:
            return {"loss": (self.embedding(input_ids).mean((1, 2)) - labels).square().mean()}

    model = Plain().double()
    faults = Faults(model.embedding, "forward", set(range(100)))
    with pytest.raises(MemoryError, match=r"the model has no activation checkpointing"):
        trained(model, tmp_path, faults)
