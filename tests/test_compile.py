"""Compiled models: micro-batches of changing shapes compile a few times and no more, and gradients stay exact."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch._dynamo.utils import counters
from transformers import BertForSequenceClassification, LlamaForCausalLM

from hf_mbp import MBPTrainer, run_mini_batch, wrapped
from tests.helpers import (
    Pad,
    Recorder,
    bert_config,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    token_rows,
    whole_gradients,
    with_labels,
)

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # while it is compiled

HOW = ("torch_compile=True", "torch.compile(model)", "model.compile()")

FEW = 3
"""Compilations that may happen: for varying shapes, for one row, and one that a value of the model's own asks for."""


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    """Forgets what other tests have compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class SeesShapes(MBPTrainer):
    """Notes the shape of each micro-batch that is trained on, and how much had been compiled before the first."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.shapes = getattr(self, "shapes", set())
        self.compiled_before = getattr(self, "compiled_before", num_compiled())
        return super().training_step(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and hasattr(self, "shapes"):
            self.shapes.add(tuple(inputs["input_ids"].shape))
        return super().compute_loss(model, inputs, *args, **kwargs)


def num_compiled() -> int:
    return int(counters["frames"]["ok"])


def gave_up() -> bool:
    """Whether dynamo met its limit of recompilations and runs the model uncompiled from then on."""
    return any("recompile limit" in reason for reason in counters["unimplemented"])


def causal_rows(count: int = 64) -> list[dict[str, Any]]:
    return with_labels(token_rows(count), masked_prefix)


def compiled_trainer(
    how: str, folder: Path, backend: str = "eager", dynamic: bool | None = None, **changes: Any
) -> SeesShapes:
    model = build(LlamaForCausalLM, llama_config(num_hidden_layers=1))
    if how == "torch_compile=True":
        changes["torch_compile_backend"] = backend
    elif how == "model.compile()":
        model.compile(backend=backend, dynamic=dynamic)
    else:
        model = torch.compile(model, backend=backend, dynamic=dynamic)
    return mbp_trainer(model, changes.pop("rows", causal_rows()), folder, trainer_class=SeesShapes, **changes)


@pytest.mark.parametrize("how", HOW)
def test_changing_shapes_compile_a_few_times(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = compiled_trainer(how, tmp_path, max_steps=4)
    trainer.train()
    assert trainer.compiled_before == 0  # what is tried on the side runs uncompiled
    assert len(trainer.shapes) >= 15
    assert {rows == 1 for rows, _ in trainer.shapes} == {False, True}
    assert 1 <= num_compiled() <= FEW
    assert not gave_up()
    assert capsys.readouterr().out.count("the model is compiled for any number of rows and any width") == 1


def test_a_model_that_notes_something_at_its_first_loss(tmp_path: Path) -> None:
    """Sequence classification sets `problem_type` in its configuration."""
    rows = with_labels(token_rows(64), lambda index, _: index % 2)
    model = torch.compile(
        build(BertForSequenceClassification, bert_config(num_labels=2, num_hidden_layers=1)), backend="eager"
    )
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=SeesShapes, max_steps=6)
    trainer.train()
    assert trainer.compiled_before == 0
    assert len(trainer.shapes) >= 15
    assert 1 <= num_compiled() <= FEW


@pytest.mark.parametrize(("how", "accumulation"), [*zip(HOW, [4, 1, 4], strict=True)])
def test_the_gradient_is_that_of_the_whole_batch(how: str, accumulation: int, tmp_path: Path) -> None:
    rows, recorder = causal_rows(16), Recorder()
    trainer = compiled_trainer(
        how,
        tmp_path,
        backend="aot_eager",
        rows=rows,
        callbacks=[recorder],
        on_inexact="error",
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    assert num_compiled() >= 1
    plain = build(LlamaForCausalLM, llama_config(num_hidden_layers=1))
    expected_loss, expected = whole_gradients(plain, lambda m: m(**Pad()(rows)).loss)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in recorder.gradients[0].items()}
    assert relative_error(expected, gradients) < 3e-6
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected_loss, rel=1e-6)


def test_micro_batches_are_those_of_the_model_that_is_not_compiled(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config(num_hidden_layers=1))
    plain = mbp_trainer(model, causal_rows(), tmp_path, trainer_class=SeesShapes)
    compiled = compiled_trainer("torch_compile=True", tmp_path)
    for trainer in (plain, compiled):
        trainer.train()
    assert compiled.shapes == plain.shapes
    assert all(rows * width <= 64 for rows, width in compiled.shapes)


@pytest.mark.parametrize("how", ["torch_compile=True", "torch.compile(model)"])
def test_the_budget_is_sized_for_a_compiled_model(how: str, tmp_path: Path) -> None:
    trainer = compiled_trainer(how, tmp_path, max_tokens_per_micro_batch=None)
    trainer.train()
    assert trainer.compiled_before == 0
    assert trainer.state.log_history[0]["mbp_max_tokens"] > 1000


@pytest.mark.parametrize("is_marked", [True, False])
def test_static_shapes_are_too_many_unless_marked(
    is_marked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`dynamic=False` compiles each shape by itself; what is marked varies even then."""
    if not is_marked:
        monkeypatch.setattr(wrapped, "mark_varying", lambda inputs: None)
    trainer = compiled_trainer("torch.compile(model)", tmp_path, dynamic=False, max_steps=3)
    trainer.train()
    assert len(trainer.shapes) > 8
    assert gave_up() is not is_marked
    assert (num_compiled() <= FEW) is is_marked


def test_who_compiles_is_seen() -> None:
    accelerator, model = Accelerator(cpu=True), torch.nn.Linear(2, 2)
    assert not wrapped.compiles(accelerator, model)
    assert wrapped.compiles(accelerator, torch.compile(model, backend="eager"))
    assert wrapped.compiles(accelerator, torch.nn.Sequential(torch.compile(model, backend="eager")))
    model.compile(backend="eager")
    assert wrapped.compiles(accelerator, model)


def test_widths_of_tokens_vary_and_sizes_of_images_do_not() -> None:
    ids, pixels, scalar = torch.ones(3, 5, dtype=torch.long), torch.ones(3, 3, 8, 8), torch.ones(())
    wrapped.mark_varying({"input_ids": ids, "pixel_values": pixels, "scalar": scalar, "name": "x"})
    assert ids._dynamo_weak_dynamic_indices == {0, 1}
    assert pixels._dynamo_weak_dynamic_indices == {0}
    assert not hasattr(scalar, "_dynamo_weak_dynamic_indices")


def test_a_loop_without_a_trainer() -> None:
    rows, plain = causal_rows(), build(LlamaForCausalLM, llama_config(num_hidden_layers=1))
    expected = whole_gradients(plain, lambda m: m(**Pad()(rows)).loss)[1]
    model = torch.compile(plain, backend="eager")
    report = run_mini_batch(
        rows,
        model=model,
        loss=lambda inputs: model(**inputs).loss,
        collate_fn=Pad(),
        accelerator=Accelerator(cpu=True),
        max_tokens=64,
    )
    assert report.num_micro_batches >= 10
    assert relative_error(expected, {name: p.grad for name, p in plain.named_parameters()}) < 3e-6
    assert 1 <= num_compiled() <= FEW
