"""`run_mini_batch` leaves the gradient of plain PyTorch on the whole batch, and `scripts/accelerate_loop.py` trains."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import BertForSequenceClassification, BertForTokenClassification, GPT2LMHeadModel, LlamaForCausalLM

from hf_mbp import run_mini_batch
from tests.faults import Faults
from tests.helpers import (
    Pad,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    relative_error,
    tokenizer,
    whole_gradients,
    with_labels,
)
from tests.helpers import token_rows as plain_rows
from tests.test_equivalence import HEADS

ROOT = Path(__file__).parents[1]


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(model: Any, rows: list[Any], pad: Any = None, **changes: Any) -> Any:
    options = {"loss": lambda inputs: model(**inputs).loss, "max_tokens": 64}
    options["accelerator"] = changes.pop("accelerator", None) or Accelerator(cpu=True)
    return run_mini_batch(rows, model=model, collate_fn=pad or Pad(), **{**options, **changes})


@pytest.mark.parametrize("head", HEADS)
def test_gradient_and_loss_are_those_of_the_whole_batch(head: str) -> None:
    model_class, config, make_rows, pad, tolerance = HEADS[head]
    model, rows = build(model_class, config()).train(), make_rows()
    whole_loss, expected = whole_gradients(model, lambda m: m(**pad(rows)).loss)
    report = run(model, rows, pad, max_tokens=128 if head == "multiple_choice" else 64)
    assert report.num_micro_batches > 3
    assert relative_error(expected, gradients_of(model)) < tolerance
    assert report.loss == pytest.approx(whole_loss, rel=1e-6)
    assert report.cells >= report.tokens > 0
    assert report.padding_fraction == pytest.approx(1 - report.tokens / report.cells)


def test_left_padded_rows_are_settled() -> None:
    rows = with_labels(plain_rows(), lambda _, row: row["input_ids"])
    right, left = (build(LlamaForCausalLM, llama_config()) for _ in range(2))
    run(right, rows, Pad())
    run(left, rows, Pad(side="left"))
    assert relative_error(gradients_of(right), gradients_of(left)) < 3e-6


def test_a_count_of_ones_own() -> None:
    weights = torch.tensor([1.0, 5.0, 0.5]).double()
    rows = with_labels(plain_rows(), lambda index, _: index % 3)

    def loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        labels = inputs["labels"]
        logits = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        return torch.nn.functional.cross_entropy(logits, labels, weight=weights)

    model = build(BertForSequenceClassification, bert_config(num_labels=3)).train()
    expected = whole_gradients(model, lambda m: loss(m, Pad()(rows)))[1]
    report = run(
        model,
        rows,
        loss=lambda inputs: loss(model, inputs),
        num_items=lambda inputs: float(weights[inputs["labels"]].sum()),
    )
    assert report.num_items == pytest.approx(float(weights[[row["labels"] for row in rows]].sum()))
    assert relative_error(expected, gradients_of(model)) < 1e-12


def test_gradients_add_up_over_mini_batches() -> None:
    rows = with_labels(plain_rows(), lambda index, _: index % 3)
    model = build(BertForSequenceClassification, bert_config(num_labels=3)).train()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss + m(**Pad()(rows[:5])).loss)[1]
    run(model, rows)
    run(model, rows[:5])
    assert relative_error(expected, gradients_of(model)) < 1e-12


def test_nothing_to_learn_leaves_no_gradient() -> None:
    rows = with_labels(plain_rows(), lambda _, row: [-100] * len(row["input_ids"]))
    model = build(LlamaForCausalLM, llama_config())
    report = run(model, rows)
    assert (report.loss, report.num_items) == (0, 0)
    assert not gradients_of(model)


def test_a_row_longer_than_the_budget_runs_alone_and_is_warned_of() -> None:
    rows = with_labels(plain_rows(4, low=5, high=9), masked_prefix)
    rows += with_labels(plain_rows(1, low=40, high=40), masked_prefix)
    model = build(LlamaForCausalLM, llama_config()).train()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    with pytest.warns(UserWarning, match="40 tokens"):
        run(model, rows, max_tokens=20)
    assert relative_error(expected, gradients_of(model)) < 3e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "rows is empty"),
        ({"max_tokens": 0}, "max_tokens must be a positive integer"),
        ({"accumulation": 4}, "gradient_accumulation_steps=4"),
    ],
)
def test_mistakes_are_refused(changes: dict[str, Any], message: str) -> None:
    changes = dict(changes)
    model = build(LlamaForCausalLM, llama_config())
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=changes.pop("accumulation", 1))
    changes = {"accelerator": accelerator, **changes}
    with pytest.raises(ValueError, match=message):
        run(model, **{"rows": with_labels(plain_rows(), masked_prefix), **changes})


def test_the_example_trains(tmp_path: Path) -> None:
    BertForSequenceClassification(bert_config(max_position_embeddings=512)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    script = ROOT / "scripts" / "accelerate_loop.py"
    assert len(script.read_text().splitlines()) < 60
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(  # noqa: S603
        [sys.executable, str(script), "--model", str(tmp_path / "model"), "--batch_size", "16", "--max_steps", "2"],
        cwd=ROOT,
        env=environment,
        timeout=270,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [line for line in done.stdout.splitlines() if line.startswith("step ")]
    assert len(steps) == 2
    assert all("micro-batches, padding" in line for line in steps)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # while it is compiled
@pytest.mark.parametrize("wrap", ["compiled", "kwargs"])
def test_a_wrapped_model_counts_positions_from_the_first_token(wrap: str) -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    rows = with_labels(plain_rows(), lambda _, row: row["input_ids"])
    model = build(GPT2LMHeadModel, gpt2_config())
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    wrapped = Wrapped(model) if wrap == "kwargs" else torch.compile(model, backend="eager")
    run(wrapped, rows, Pad(side="left"))
    assert relative_error(expected, gradients_of(model)) < 3e-6


def test_a_model_with_two_losses() -> None:
    rows = with_labels(plain_rows(), masked_prefix)
    model = build(LlamaForCausalLM, llama_config()).train()

    def tags(m: Any, inputs: dict[str, Any]) -> torch.Tensor:
        logits = m(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    for loss, shifts in ((lambda m, inputs: m(**inputs).loss, True), (tags, False)):
        expected = whole_gradients(model, lambda m, loss=loss: loss(m, Pad()(rows)))[1]
        model.zero_grad()
        run(model, rows, loss=lambda inputs, loss=loss: loss(model, inputs), shifts_labels=shifts)
        assert relative_error(expected, gradients_of(model)) < 3e-6


@pytest.mark.parametrize("seed", range(6))
def test_rounding_does_not_hide_whether_labels_are_shifted(seed: int) -> None:
    """In bf16 one label among many changes nothing that can be seen in the loss."""
    rows = with_labels(plain_rows(8, low=20, high=30), lambda _, row: [token % 2 for token in row["input_ids"]])
    model = build(BertForTokenClassification, bert_config(num_labels=2), seed=seed).bfloat16()
    assert run(model, rows).num_items == sum(len(row["labels"]) for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"input_ids": [[1, 2]]}}, "rows is a dict, and must be a list of rows"),
        ({"rows": iter([])}, "must be a list of rows"),
        ({"loss": lambda _: (torch.ones(()),)}, "got a tuple. Write for example"),
        ({"loss": lambda _: torch.ones(3, requires_grad=True)}, r"got one of shape \[3\]"),
        ({"loss": lambda _: torch.ones(())}, r"got one of shape \[\] without a gradient"),
    ],
)
def test_inputs_of_the_wrong_kind_are_named(changes: dict[str, Any], message: str) -> None:
    model = build(BertForSequenceClassification, bert_config(num_labels=3))
    rows = with_labels(plain_rows(), lambda index, _: index % 3)
    with pytest.raises(TypeError, match=message):
        run(model, **{"rows": rows, **changes})


def test_a_negative_count_is_refused() -> None:
    rows = with_labels(plain_rows(), masked_prefix)
    with pytest.raises(ValueError, match="must return a number that is not negative, got -1"):
        run(build(LlamaForCausalLM, llama_config()), rows, num_items=lambda _: -1)


# Running out of memory


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_mini_batch_is_run_again_when_memory_runs_out(stage: str) -> None:
    """On top of a gradient that was there before."""
    model, rows = build(LlamaForCausalLM, llama_config()), with_labels(plain_rows(16), masked_prefix)
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss + m(**Pad()(rows[:5])).loss)[1]
    run(model, rows[:5])
    faults = Faults(model.model.layers[1], stage, {1}).install(model)
    report = run(model, rows, max_tokens=100)
    assert (faults.raised, report.oom_retries) == (1, 1)
    assert report.max_tokens <= 50
    assert relative_error(expected, gradients_of(model)) < 1e-7


def test_a_head_beside_the_model_is_put_back() -> None:
    """It is prepared like the model, and the loss uses both."""
    rows = with_labels(plain_rows(16), lambda index, row: index % 3)
    gradients = []
    for passes in (set(), {1}):
        accelerator = Accelerator(cpu=True)
        model = build(BertForSequenceClassification, bert_config(num_labels=3))
        torch.manual_seed(0)
        head = accelerator.prepare(torch.nn.Linear(3, 3).double())

        def loss(inputs: Any, model: Any = model, head: Any = head) -> torch.Tensor:
            labels = inputs.pop("labels")
            return torch.nn.functional.cross_entropy(head(model(**inputs).logits), labels)

        faults = Faults(model.classifier, "backward", passes).install(model)
        run(model, rows, loss=loss, accelerator=accelerator)
        assert faults.raised == len(passes)
        gradients.append(gradients_of(head))
    assert relative_error(*gradients) < 1e-9


def test_a_row_that_does_not_fit_is_checkpointed_and_then_given_up() -> None:
    model, rows = build(LlamaForCausalLM, llama_config()), with_labels(plain_rows(4), masked_prefix)
    layer = model.model.layers[0]
    faults = Faults(layer, "forward", set(range(100))).install(model)
    with pytest.raises(
        MemoryError, match=r"A row of \d+ tokens does not fit the memory by itself \(CUDA out of memory"
    ):
        run(model, rows, max_tokens=100)
    assert faults.raised > 2
    assert not layer.gradient_checkpointing


class Queue(torch.nn.Module):
    """A model that keeps what it has seen in a large buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = build(GPT2LMHeadModel, gpt2_config())
        self.register_buffer("queue", torch.zeros(2**17))

    def forward(self, **inputs: Any) -> Any:
        self.queue += 1
        return self.model(**inputs)


def test_what_is_found_out_about_a_model_does_not_keep_it_alive() -> None:
    def train() -> "weakref.ref[torch.nn.Module]":
        model = Queue().train()
        accelerator = Accelerator(cpu=True)
        run(
            accelerator.prepare(model),
            with_labels(plain_rows(), lambda _, row: row["input_ids"]),
            accelerator=accelerator,
        )
        return weakref.ref(model)

    trained = train()
    gc.collect()
    assert trained() is None
