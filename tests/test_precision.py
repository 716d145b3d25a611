"""Half precision: gradients summed in float32, autocast, and the gradient scaler of fp16."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

from hf_mbp import MBPConfig, MBPTrainer, compat, run_mini_batch
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
    trainer.mbp_feed._traits._shifts = True
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
        assert not trainer._sums._sums
        outcomes.append(model.state_dict())
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=0, atol=0)


def test_sums_of_known_numbers() -> None:
    """In bfloat16 256 + 1 is 256; 0.5 more each time is lost, too."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sums = Float32Sums()
    for part in (256.0, *[0.5] * 9):
        with sums.around([weight], is_complete=False):
            (weight * part).sum().backward()
        assert weight.grad is None
    with sums.around([weight], is_complete=True):
        (weight * 1.0).sum().backward()
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
    for last, index in enumerate((1, 1, 3)):
        with sums.around(list(table.parameters()), is_complete=last == 2):
            table(torch.tensor([index])).sum().backward()
    dense = table.weight.grad.to_dense()
    assert dense.dtype == torch.bfloat16
    assert dense.sum(1).tolist() == [0, 4, 0, 2, 0, 0, 0, 0, 0, 0]


# Refusals, memory, and what the reader is told


@pytest.mark.parametrize("attribute", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_gradients_are_refused(attribute: str, tmp_path: Path) -> None:
    trainer = mbp_trainer(half_model(), causal_rows(), tmp_path, accumulate_in_fp32=True)
    setattr(trainer, attribute, True)
    with pytest.raises(ValueError, match=r"accumulate_in_fp32=True is for .* reduce_dtype=.*grad_accum_dtype"):
        compat.refuse_unsupported(trainer)


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
    monkeypatch.setattr("hf_mbp.memory.free_memory", lambda device: 10**9)
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
