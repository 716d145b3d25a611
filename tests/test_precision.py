"""Half precision: gradients summed in float32, autocast, and the gradient scaler of fp16."""

import copy
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer, compat, refusals, run_mini_batch
from hf_mbp.accumulation import Float32Sums, half_precision
from hf_mbp.memory import pending_training_bytes
from tests.helpers import (
    Pad,
    Recorder,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    token_rows,
    whole_gradients,
    with_labels,
)

Gradients = dict[str, torch.Tensor]

ONE_ROUNDING = 2.0**-8
"""Largest relative error of a number that is rounded to bfloat16 once, from a sum that is not exactly ours."""


def causal_rows(count: int = 16) -> list[dict[str, Any]]:
    return with_labels(token_rows(count), masked_prefix)


def half_model(model_class: Any = LlamaForCausalLM, config: Any = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    return build(model_class, config or llama_config()).to(dtype)


class Passes:
    """What each backward pass adds to the gradients, as long as it finds `.grad` empty."""

    def __init__(self, model: Any) -> None:
        self.parts: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, parts=self.parts[name]: parts.append(p.grad.clone())
                )

    def forget(self) -> None:
        for parts in self.parts.values():
            parts.clear()

    def sums(self) -> Gradients:
        """Added up in float64, and rounded once."""
        return {
            name: torch.stack([part.double() for part in parts]).sum(0).to(parts[0].dtype)
            for name, parts in self.parts.items()
            if parts
        }


class ForgetsAtTheStart(Recorder):
    """Forgets what the check before the first step has run, and keeps the sums of each step."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self.passes = passes
        self.sums: list[Gradients] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.passes.forget()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_pre_optimizer_step(*args, **kwargs)
        self.sums.append(self.passes.sums())
        self.passes.forget()


def trained(model: Any, rows: Any, folder: Path, **changes: Any) -> tuple[MBPTrainer, ForgetsAtTheStart]:
    recorder = ForgetsAtTheStart(Passes(model))
    options = {"check_at_start": False, "accumulate_in_fp32": True, "max_tokens_per_micro_batch": 32}
    trainer = mbp_trainer(model, rows, folder, callbacks=[recorder], **{**options, **changes})
    trainer.train()
    return trainer, recorder


def assert_rounded_once(recorder: ForgetsAtTheStart, steps: int) -> None:
    assert len(recorder.gradients) == len(recorder.sums) == steps
    for gradients, sums in zip(recorder.gradients, recorder.sums, strict=True):
        assert gradients.keys() == sums.keys()
        for name, gradient in gradients.items():
            assert gradient.dtype == sums[name].dtype
            torch.testing.assert_close(gradient, sums[name], rtol=ONE_ROUNDING, atol=1e-9)


# Sums in float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_sum_over_a_step_is_rounded_once(accumulation: int, dtype: torch.dtype, tmp_path: Path) -> None:
    trainer, recorder = trained(
        half_model(dtype=dtype),
        causal_rows(),
        tmp_path,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=3,
    )
    assert trainer.state.log_history[0]["mbp_micro_batches"] >= 8
    assert_rounded_once(recorder, steps=3)


def test_it_is_closer_to_the_gradient_in_float32(tmp_path: Path) -> None:
    """64 micro-batches of one row, against plain PyTorch with the same weights in float32."""
    rows, model = with_labels(token_rows(64, low=16), masked_prefix), half_model()
    expected = whole_gradients(copy.deepcopy(model).float(), lambda m: m(**Pad()(rows)).loss)[1]
    errors = []
    for accumulate in (False, True):
        _, recorder = trained(
            copy.deepcopy(model),
            rows,
            tmp_path,
            accumulate_in_fp32=accumulate,
            per_device_train_batch_size=64,
            max_tokens_per_micro_batch=31,
        )
        assert all(len(parts) == 0 for parts in recorder.passes.parts.values())
        errors.append(relative_error(expected, {name: g.float() for name, g in recorder.gradients[0].items()}))
    assert errors[1] < 0.6 * errors[0]


def test_frozen_unused_and_tied_weights(tmp_path: Path) -> None:
    model = half_model(GPT2LMHeadModel, gpt2_config())
    model.transformer.h[0].requires_grad_(False)
    model.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    assert model.lm_head.weight is model.transformer.wte.weight
    _, recorder = trained(model, causal_rows(), tmp_path, max_steps=2)
    assert_rounded_once(recorder, steps=2)
    assert "transformer.wte.weight" in recorder.gradients[0]
    assert not [name for name in recorder.gradients[0] if "h.0." in name or name == "unused"]


def test_weights_beside_the_model_are_summed_in_float32_too(tmp_path: Path) -> None:
    class Scaled(MBPTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.head = torch.nn.Linear(1, 1, bias=False).bfloat16()
            self.passes = Passes(self.head)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(model, inputs, *args, **kwargs) * self.head.weight.sum()

    trainer, recorder = trained(half_model(), causal_rows(), tmp_path, trainer_class=Scaled)
    assert len(trainer.passes.parts["weight"]) == recorder.logs[0]["mbp_micro_batches"] > 5
    assert torch.equal(trainer.head.weight.grad, trainer.passes.sums()["weight"])


def test_weights_of_two_dtypes(tmp_path: Path) -> None:
    """Only what is half precision is moved: `Passes` sees the sum of the others grow."""
    model = half_model()
    model.lm_head.float()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    _, recorder = trained(model, causal_rows(), tmp_path)
    head, last = recorder.gradients[0].pop("lm_head.weight"), recorder.passes
    recorder.sums[0].pop("lm_head.weight")
    assert head.dtype == torch.float32
    assert not last.parts["lm_head.weight"]
    assert_rounded_once(recorder, steps=1)


def test_training_again_starts_with_empty_sums(tmp_path: Path) -> None:
    trainer, recorder = trained(half_model(), causal_rows(), tmp_path)
    trainer.train()
    assert_rounded_once(recorder, steps=2)


def test_a_run_that_failed_in_the_middle_of_a_step_leaves_nothing_behind(tmp_path: Path) -> None:
    class FailsOnce(MBPTrainer):
        calls = 0

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().compute_loss(*args, **kwargs)

    model = half_model()
    recorder = ForgetsAtTheStart(Passes(model))
    trainer = mbp_trainer(
        model,
        causal_rows(),
        tmp_path,
        trainer_class=FailsOnce,
        callbacks=[recorder],
        accumulate_in_fp32=True,
        check_at_start=False,
        max_tokens_per_micro_batch=32,
    )
    trainer.mbp_rows._traits._known.shifts_labels = True
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.calls == 4
    model.zero_grad()
    trainer.train()
    assert_rounded_once(recorder, steps=1)


def test_steps_without_items_in_between(tmp_path: Path) -> None:
    rows = causal_rows()
    nothing = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    with pytest.warns(UserWarning, match="nothing to learn from"):
        _, recorder = trained(
            half_model(),
            rows + nothing + rows,
            tmp_path,
            max_steps=3,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
        )
    assert recorder.gradients[1] == {}
    assert_rounded_once(recorder, steps=3)


def test_float32_weights_train_bit_for_bit_as_without(tmp_path: Path) -> None:
    outcomes = []
    for accumulate in (False, True):
        model = build(LlamaForCausalLM, llama_config()).float()
        trainer, _ = trained(model, causal_rows(), tmp_path, max_steps=3, accumulate_in_fp32=accumulate)
        assert not trainer._runner._sums._sums
        outcomes.append(model.state_dict())
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)


def test_sums_of_known_numbers() -> None:
    """In bfloat16 256 + 1 is 256; 0.5 more each time is lost, too."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sums = Float32Sums()
    for part in (256.0, *[0.5] * 9):
        (weight * part).sum().backward()
        sums.add([weight])
        assert weight.grad is None
    (weight * 1.0).sum().backward()
    sums.add([weight])
    sums.give()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [262.0, 262.0]  # 261.5 rounded; bfloat16 has every second number here
    assert not sums._sums


def test_what_was_there_before_counts() -> None:
    rows, model = causal_rows(), half_model()
    passes = Passes(model)
    for part in (rows, rows[:5]):
        run_mini_batch(
            part,
            model=model,
            loss=lambda inputs: model(**inputs).loss,
            collate_fn=Pad(),
            accelerator=Accelerator(cpu=True),
            max_tokens=32,
            shifts_labels=True,
            accumulate_in_fp32=True,
        )
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert relative_error(passes.sums(), gradients) < ONE_ROUNDING


def test_a_loop_without_a_trainer_rounds_once() -> None:
    rows, model = causal_rows(), half_model()
    passes = Passes(model)
    report = run_mini_batch(
        rows,
        model=model,
        loss=lambda inputs: model(**inputs).loss,
        collate_fn=Pad(),
        accelerator=Accelerator(cpu=True),
        max_tokens=32,
        shifts_labels=True,
        accumulate_in_fp32=True,
    )
    assert report.num_micro_batches >= 8
    sums = passes.sums()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], rtol=ONE_ROUNDING, atol=1e-9)


def test_sparse_gradients(tmp_path: Path) -> None:
    table = torch.nn.Embedding(10, 2, sparse=True, dtype=torch.bfloat16)
    sums = Float32Sums()
    for index in (1, 1, 3):
        table(torch.tensor([index])).sum().backward()
        sums.add(table.parameters())
    sums.give()
    dense = table.weight.grad.to_dense()
    assert dense.dtype == torch.bfloat16
    assert dense.sum(1).tolist() == [0, 4, 0, 2, 0, 0, 0, 0, 0, 0]


# Refusals, memory, and what the reader is told


@pytest.mark.parametrize("attribute", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_gradients_are_refused(attribute: str, tmp_path: Path) -> None:
    trainer = mbp_trainer(half_model(), causal_rows(), tmp_path, accumulate_in_fp32=True)
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=r"accumulate_in_fp32=True is for .* reduce_dtype=.*grad_accum_dtype"):
        refusals.refuse_unsupported(trainer)


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharded_gradients_are_refused_in_a_loop(kind: DistributedType) -> None:
    model = half_model()
    accelerator = SimpleNamespace(distributed_type=kind, gradient_accumulation_steps=1)
    with pytest.raises(ValueError, match=r"accumulate_in_fp32=True is for .* reduce_dtype=.*grad_accum_dtype"):
        run_mini_batch(
            causal_rows(),
            model=model,
            loss=lambda inputs: model(**inputs).loss,
            collate_fn=Pad(),
            accelerator=accelerator,
            max_tokens=64,
            accumulate_in_fp32=True,
        )


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(ValueError, match="accumulate_in_fp32='yes' is neither True nor False"):
        MBPConfig(accumulate_in_fp32="yes")  # type: ignore[arg-type]


def test_sums_are_counted_as_pending() -> None:
    half = torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    single = torch.nn.Parameter(torch.ones(5))
    frozen = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16), requires_grad=False)
    parameters = [half, single, frozen]
    without = pending_training_bytes(parameters, None)
    assert pending_training_bytes(parameters, None, accumulates_in_fp32=True) == without + 10 * 4
    assert half_precision([half, half, single]) == [half]


def test_the_budget_leaves_room_for_the_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_mbp.device_memory.free_memory", lambda device: 10**9)
    room = {}
    for accumulate in (False, True):
        model = half_model()
        trainer = mbp_trainer(
            model, causal_rows(), tmp_path, max_tokens_per_micro_batch=None, accumulate_in_fp32=accumulate
        )
        trainer.train()
        kept = trainer.state.stateful_callbacks["hf_mbp"]
        room[accumulate] = kept["budget"]["max_bytes"]
        assert kept["options"].get("accumulate_in_fp32", False) is accumulate
    assert room[False] - room[True] == pytest.approx(4 * model.num_parameters(), abs=1)


NOTE = "the weights are bfloat16, and so is the sum of the gradients"


@pytest.mark.parametrize(
    ("changes", "is_told"),
    [
        ({}, True),
        ({"accumulate_in_fp32": True}, False),
        ({"max_tokens_per_micro_batch": 10_000}, False),
        ({"dtype": torch.float32}, False),
    ],
)
def test_the_reader_is_told_once(
    changes: dict[str, Any], is_told: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"max_steps": 2, **changes}
    model = half_model(dtype=changes.pop("dtype", torch.bfloat16))
    is_split = "max_tokens_per_micro_batch" not in changes
    rows = causal_rows() if is_split else causal_rows(1) * 16  # equal rows, which no plan would split
    mbp_trainer(model, rows, tmp_path, check_at_start=False, **changes).train()
    assert capsys.readouterr().out.count(NOTE) == is_told


def test_the_reader_is_told_of_trainable_weights_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = half_model(BertForSequenceClassification, bert_config(num_labels=2))
    model.bert.requires_grad_(False)
    model.classifier.float()
    model.classifier.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    rows = with_labels(token_rows(), lambda index, _: index % 2)
    mbp_trainer(model, rows, tmp_path, check_at_start=False).train()
    assert NOTE not in capsys.readouterr().out


# Autocast


def autocast_gradients(model: Any, rows: Any, dtype: torch.dtype | None) -> tuple[float, Gradients]:
    """Plain PyTorch on the whole batch."""

    def loss(m: Any) -> torch.Tensor:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            return m(**Pad()(rows)).loss

    return whole_gradients(model, loss)


def norm(gradients: Gradients) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())


@pytest.mark.parametrize("accumulation", [1, 4])
def test_autocast_is_as_exact_split_as_whole(accumulation: int, tmp_path: Path) -> None:
    rows, model = causal_rows(), build(LlamaForCausalLM, llama_config()).float()
    expected_loss, expected = autocast_gradients(model, rows, None)
    whole_loss, whole = autocast_gradients(model, rows, torch.bfloat16)
    rounding = relative_error(expected, whole)
    assert 1e-3 < rounding < 0.02
    trainer, recorder = trained(
        model,
        rows,
        tmp_path,
        bf16=True,
        accumulate_in_fp32=False,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    error = relative_error(expected, recorder.gradients[0])
    assert 1e-3 < error < 1.5 * rounding
    log = trainer.state.log_history[0]
    assert log["mbp_micro_batches"] >= 8
    assert log["loss"] == pytest.approx(expected_loss, rel=1e-3)
    assert log["loss"] == pytest.approx(whole_loss, rel=1e-3)
    assert log["grad_norm"] == pytest.approx(norm(expected), rel=1e-2)
    assert {gradient.dtype for gradient in recorder.gradients[0].values()} == {torch.float32}


# The gradient scaler of fp16

SCALE = 2.0**10


class CountingScaler(torch.amp.GradScaler):
    """Counts how often gradients are unscaled."""

    unscaled = 0

    def unscale_(self, optimizer: Any) -> None:
        self.unscaled += 1
        super().unscale_(optimizer)


class HalfOnCPU(MBPTrainer):
    """Autocast to float16 with a gradient scaler, which Accelerate has on GPUs only; counts clips, too."""

    overflow_at: int | None = None
    step_of_overflow = 1
    clips = 0
    calls = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.accelerator.native_amp = True
        self.accelerator.scaler = CountingScaler("cpu", init_scale=SCALE)
        clip = self.accelerator.clip_grad_norm_

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.clips += 1
            return clip(*args, **kwargs)

        self.accelerator.clip_grad_norm_ = counted

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Multiplies the loss of one micro-batch of one step so that its gradient overflows."""
        loss = super().compute_loss(*args, **kwargs)
        if not self.model.training or self.state.global_step != self.step_of_overflow:
            return loss
        self.calls += 1
        return loss * 1e38 if self.calls == self.overflow_at else loss


class StepRecorder(Recorder):
    """Keeps weights, optimizer states and scale before and after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Gradients] = []
        self.states: list[Any] = []
        self.scales: list[float] = []

    def keep(self, model: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})
        self.states.append(copy.deepcopy(self.trainer.optimizer.state_dict()["state"]))
        self.scales.append(self.trainer.accelerator.scaler.get_scale())

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.weights:
            self.keep(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.keep(model)


def scaled(rows: Any, folder: Path, **changes: Any) -> tuple[HalfOnCPU, StepRecorder]:
    recorder = StepRecorder()
    options = {
        "fp16": True,
        "optim": "adamw_torch",
        "max_steps": 3,
        "max_tokens_per_micro_batch": 32,
        "check_at_start": False,
        "train_sampling_strategy": "sequential",
    }
    overflow_at = changes.pop("overflow_at", None)
    model = build(LlamaForCausalLM, llama_config()).float()
    trainer = mbp_trainer(model, rows, folder, trainer_class=HalfOnCPU, callbacks=[recorder], **{**options, **changes})
    recorder.trainer, trainer.overflow_at = trainer, overflow_at
    trainer.train()
    return trainer, recorder


def gradient_at(weights: Gradients, rows: Any) -> Gradients:
    """Plain PyTorch in float32 on the whole batch, with these weights."""
    model = build(LlamaForCausalLM, llama_config()).float()
    model.load_state_dict(weights, strict=False)
    return autocast_gradients(model, rows, None)[1]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_are_unscaled_and_clipped_once(accumulation: int, tmp_path: Path) -> None:
    rows = causal_rows()
    trainer, recorder = scaled(
        rows,
        tmp_path,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.05,
    )
    assert trainer.state.log_history[0]["mbp_micro_batches"] >= 8
    assert (trainer.accelerator.scaler.unscaled, trainer.clips) == (3, 3)
    for step, gradients in enumerate(recorder.gradients):
        expected = gradient_at(recorder.weights[step], rows)
        clipped = {name: gradient * (0.05 / norm(expected)) for name, gradient in expected.items()}
        assert norm(expected) > 2 * 0.05
        assert 1e-4 < relative_error(clipped, gradients) < 3e-3
        assert recorder.logs[step]["grad_norm"] == pytest.approx(norm(expected), rel=1e-3)
    assert recorder.scales == [SCALE] * 4


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("overflow_at", [1, 6])
def test_an_overflow_in_one_micro_batch_skips_the_step(overflow_at: int, accumulation: int, tmp_path: Path) -> None:
    rows = causal_rows()
    trainer, recorder = scaled(
        rows,
        tmp_path,
        overflow_at=overflow_at,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=1.0,
    )
    assert trainer.calls >= 8
    first, skipped, third = recorder.weights[1:]
    torch.testing.assert_close(skipped, first, rtol=0, atol=0)
    torch.testing.assert_close(recorder.states[2], recorder.states[1], rtol=0, atol=0)
    assert any(bool((third[name] != skipped[name]).any()) for name in third)
    assert recorder.scales == [SCALE, SCALE, SCALE / 2, SCALE / 2]
    assert relative_error(gradient_at(skipped, rows), recorder.gradients[2]) < 3e-3


def test_a_step_without_items_keeps_the_scale(tmp_path: Path) -> None:
    rows = causal_rows()
    nothing = [{**row, "labels": [-100] * len(row["labels"])} for row in rows]
    with pytest.warns(UserWarning, match="nothing to learn from"):
        _, recorder = scaled(rows + nothing + rows, tmp_path, max_grad_norm=1.0)
    first, skipped, third = recorder.weights[1:]
    torch.testing.assert_close(skipped, first, rtol=0, atol=0)
    torch.testing.assert_close(recorder.states[2], recorder.states[1], rtol=0, atol=0)
    assert recorder.scales == [SCALE] * 4
    assert relative_error(gradient_at(skipped, rows), recorder.gradients[2]) < 3e-3
    assert any(bool((third[name] != skipped[name]).any()) for name in third)


def test_a_scaler_that_is_switched_off_gets_no_infinite_gradient() -> None:
    model = torch.nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    compat.void_step(SimpleNamespace(scaler=scaler, device=torch.device("cpu")), model)
    assert model.weight.grad is None


# Activation checkpointing

CHECKPOINTING = [
    field.name
    for field in fields(TrainingArguments)
    if field.name in ("gradient_checkpointing", "activation_checkpointing")
]
"""Its names in the installed version: one before transformers 5.24, then both."""


class Forwards(Recorder):
    """Counts forward passes of the first layer in each step."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.count = 0
        layer.register_forward_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.count = 0


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")  # the name, which is what is tried
@pytest.mark.parametrize("name", CHECKPOINTING)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_checkpointing_gives_the_gradient_of_the_whole_batch(accumulation: int, name: str, tmp_path: Path) -> None:
    rows, model = causal_rows(), build(LlamaForCausalLM, llama_config())
    expected_loss, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    forwards = Forwards(model.model.layers[0].self_attn)
    trainer = mbp_trainer(
        model,
        rows,
        tmp_path,
        callbacks=[forwards],
        on_inexact="error",
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        **{name: True},
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["mbp_micro_batches"] >= 4
    assert forwards.count == 2 * log["mbp_micro_batches"]
    assert relative_error(expected, forwards.gradients[0]) < 3e-6
    assert log["loss"] == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*checkpointing.*deprecated:FutureWarning")
def test_the_budget_is_measured_with_checkpointing(tmp_path: Path) -> None:
    per_cell = {}
    for is_on in (False, True):
        model = build(LlamaForCausalLM, llama_config(num_hidden_layers=6)).float()
        changes = {"max_tokens_per_micro_batch": None, "check_at_start": False, CHECKPOINTING[0]: is_on}
        trainer = mbp_trainer(model, causal_rows(), tmp_path, **changes)
        trainer.train()
        per_cell[is_on] = trainer.state.stateful_callbacks["hf_mbp"]["budget"]["bytes_per_cell"]
    assert per_cell[True] < 0.7 * per_cell[False]
