"""Losses that are not the model's own, labels born in the collator, and padding on the left."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

from hf_mbp import MBPTrainer
from hf_mbp.padding import IGNORE_INDEX
from tests.helpers import (
    VOCABULARY,
    Pad,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    tokenizer,
    whole_gradients,
    with_labels,
)
from tests.test_check import ClassWeightedCounted
from tests.test_equivalence import HEAD_IN_FLOAT32, IN_FLOAT64, causal_rows, class_rows, run, seq2seq_rows


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), **kwargs)


def whole(model: Any, rows: Any, loss: Any, collate: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Reference with the loss of logits and labels written out."""

    def of_batch(m: Any) -> torch.Tensor:
        batch = (collate or Pad())(rows)
        return loss(m(**batch).logits, batch["labels"])

    return whole_gradients(model, of_batch)


def assert_equal(trainer: MBPTrainer, expected: tuple[float, dict[str, torch.Tensor]], bound: float) -> None:
    loss, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches >= 2
    assert relative_error(expected[1], gradients) < bound
    assert loss == pytest.approx(expected[0], rel=1e-6)


def smoothed(logits: torch.Tensor, labels: torch.Tensor, epsilon: float = 0.2) -> torch.Tensor:
    """Label smoothing written out: a mix of the true label and all labels alike, a mean over real targets."""
    log_probabilities = logits.log_softmax(-1).flatten(0, -2)
    labels = labels.flatten()
    log_probabilities, labels = log_probabilities[labels != IGNORE_INDEX], labels[labels != IGNORE_INDEX]
    nll = -log_probabilities.gather(1, labels[:, None]).mean()
    return (1 - epsilon) * nll - epsilon * log_probabilities.mean()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_of_a_classifier(accumulation: int, tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()
    trainer = mbp_trainer(
        model,
        rows,
        tmp_path,
        label_smoothing_factor=0.2,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        on_inexact="error",
    )
    assert_equal(trainer, whole(model, rows, smoothed), HEAD_IN_FLOAT32)


@pytest.mark.parametrize(("model_class", "config"), [(GPT2LMHeadModel, gpt2_config), (LlamaForCausalLM, llama_config)])
def test_label_smoothing_of_a_language_model_shifts(model_class: Any, config: Any, tmp_path: Path) -> None:
    model, rows = build(model_class, config()), causal_rows()
    trainer = mbp_trainer(model, rows, tmp_path, label_smoothing_factor=0.2, on_inexact="error")
    expected = whole(model, rows, lambda logits, labels: smoothed(logits[:, :-1], labels[:, 1:]))
    assert_equal(trainer, expected, HEAD_IN_FLOAT32)


def test_a_loss_function_that_divides_by_the_count(tmp_path: Path) -> None:
    model, rows = build(LlamaForCausalLM, llama_config()), causal_rows()

    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(outputs.logits[:, :-1], labels[:, 1:], reduction="sum") / num_items_in_batch

    trainer = mbp_trainer(model, rows, tmp_path, compute_loss_func=loss_function, on_inexact="error")
    expected = whole(model, rows, lambda logits, labels: cross_entropy(logits[:, :-1], labels[:, 1:]))
    assert_equal(trainer, expected, IN_FLOAT64)


def test_a_loss_function_that_takes_the_mean(tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()

    def loss_function(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return cross_entropy(outputs.logits, labels)

    trainer = mbp_trainer(
        model,
        rows,
        tmp_path,
        compute_loss_func=loss_function,
        gradient_accumulation_steps=4,
        per_device_train_batch_size=4,
        on_inexact="error",
    )
    assert_equal(trainer, whole(model, rows, cross_entropy), IN_FLOAT64)


class DividesByTheCount(MBPTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("check_at_start", [True, False])
@pytest.mark.parametrize(
    ("returned", "got"),
    [
        (lambda losses: losses, r"one of shape \[\d+\]\."),
        (lambda losses: losses.mean().item(), "a float"),
        (lambda losses: losses.mean().detach(), r"one of shape \[\] without a gradient"),
        (lambda losses: {"loss": losses.mean()}, "a dict"),
    ],
)
def test_a_loss_that_is_no_number_with_a_gradient(
    returned: Any, got: str, check_at_start: bool, tmp_path: Path
) -> None:
    class Odd(MBPTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return returned(cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none"))

    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=Odd, check_at_start=check_at_start)
    with pytest.raises(TypeError, match=rf"^Odd.compute_loss must return the mean loss, .*, got {got}"):
        trainer.train()


def test_a_loss_of_one_element(tmp_path: Path) -> None:
    class OneElement(MBPTrainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(**inputs).loss[None]

    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=OneElement, on_inexact="error")
    assert_equal(trainer, whole(model, rows, cross_entropy), IN_FLOAT64)


class AsksTheNextClass(MBPTrainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch)


@pytest.mark.parametrize("trainer_class", [DividesByTheCount, AsksTheNextClass])
def test_an_overridden_compute_loss(trainer_class: Any, tmp_path: Path) -> None:
    rows = with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]])
    model = build(BertForTokenClassification, bert_config(num_labels=4))
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=trainer_class, on_inexact="error")
    assert_equal(trainer, whole(model, rows, cross_entropy), IN_FLOAT64)


def test_an_overridden_compute_loss_of_a_language_model(tmp_path: Path) -> None:
    model, rows = build(GPT2LMHeadModel, gpt2_config()), causal_rows()
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=AsksTheNextClass, on_inexact="error")
    expected = whole(model, rows, lambda logits, labels: cross_entropy(logits[:, :-1], labels[:, 1:]))
    assert_equal(trainer, expected, HEAD_IN_FLOAT32)


def test_class_weights_with_their_own_count(tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()
    weights = ClassWeightedCounted.weights
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=ClassWeightedCounted, on_inexact="error")
    expected = whole(model, rows, lambda logits, labels: cross_entropy(logits, labels, weight=weights))
    assert_equal(trainer, expected, IN_FLOAT64)


class KeepsItsMicroBatches:
    """A collator that remembers what it returned, so that a test can put the mini-batch together again."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator
        self.returned: list[dict[str, torch.Tensor]] = []

    def __call__(self, rows: Any) -> Any:
        batch = self.collator(rows)
        self.returned.append({key: value.clone() for key, value in batch.items()})
        return batch


def test_masks_drawn_by_the_collator(tmp_path: Path) -> None:
    model, rows = build(BertForMaskedLM, bert_config()), token_rows()
    untrained = copy.deepcopy(model)
    collator = KeepsItsMicroBatches(DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3))
    trainer = mbp_trainer(model, rows, tmp_path, data_collator=collator, check_at_start=False)
    loss, gradients, num_micro_batches = run(trainer)
    unpadded = [
        {key: value[index, : int(mask.sum())] for key, value in batch.items()}
        for batch in collator.returned
        for index, mask in enumerate(batch["attention_mask"])
    ]
    whole_loss, expected = whole_gradients(untrained, lambda m: m(**Pad()(unpadded)).loss)
    assert len(unpadded) == 16
    assert num_micro_batches == len(collator.returned) >= 2
    assert relative_error(expected, gradients) < IN_FLOAT64
    assert loss == pytest.approx(whole_loss)


def test_the_check_passes_with_masks_drawn_by_the_collator(tmp_path: Path) -> None:
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
    trainer = mbp_trainer(
        build(BertForMaskedLM, bert_config()), token_rows(), tmp_path, data_collator=collator, on_inexact="error"
    )
    assert trainer.train().training_loss > 0


def test_the_usual_collators(tmp_path: Path) -> None:
    by_hand: dict[str, Any] = {
        "seq2seq": (T5ForConditionalGeneration, t5_config(), seq2seq_rows(), DataCollatorForSeq2Seq(tokenizer())),
        "token classification": (
            BertForTokenClassification,
            bert_config(num_labels=4),
            with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]]),
            DataCollatorForTokenClassification(tokenizer()),
        ),
        "padding to a multiple": (
            BertForSequenceClassification,
            bert_config(num_labels=3),
            class_rows(),
            Pad(pad_to_multiple_of=8),
        ),
    }
    for name, (model_class, config, rows, collator) in by_hand.items():
        model = build(model_class, config)
        expected = whole_gradients(model, lambda m, rows=rows: m(**Pad()(rows)).loss)
        trainer = mbp_trainer(model, rows, tmp_path / name, data_collator=collator, on_inexact="error")
        assert_equal(trainer, expected, IN_FLOAT64)


def test_rows_laid_end_to_end_without_padding(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config(attn_implementation="eager"))
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in causal_rows()]
    padded = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    expected = whole(model, padded, lambda logits, labels: cross_entropy(logits[:, :-1], labels[:, 1:]))
    trainer = mbp_trainer(model, rows, tmp_path, data_collator=DataCollatorWithFlattening(), on_inexact="error")
    assert_equal(trainer, expected, HEAD_IN_FLOAT32)
    assert trainer.state.log_history[0]["mbp_padding_fraction"] == 0


def first_token_is_no_target(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "labels": [-100, *row["labels"][1:]]}


@pytest.mark.parametrize(("model_class", "config"), [(GPT2LMHeadModel, gpt2_config), (LlamaForCausalLM, llama_config)])
def test_left_padding_trains_as_right_padding_does(model_class: Any, config: Any, tmp_path: Path) -> None:
    """Whatever pads a row, its tokens see the same tokens at the same positions, and its first is no target."""
    model = build(model_class, config())
    rows = with_labels(token_rows(), lambda index, row: row["input_ids"])
    expected = whole_gradients(model, lambda m: m(**Pad()(list(map(first_token_is_no_target, rows)))).loss)
    trainer = mbp_trainer(model, rows, tmp_path, data_collator=Pad(side="left"), on_inexact="error")
    assert_equal(trainer, expected, HEAD_IN_FLOAT32)


def test_a_micro_batch_without_items_is_left_out(tmp_path: Path) -> None:
    """The longest rows run by themselves and have no labels; their mean would be 0/0."""
    model = build(LlamaForCausalLM, llama_config())

    def labels(index: int, row: dict[str, Any]) -> list[int]:
        return [-100] * len(row["input_ids"]) if len(row["input_ids"]) > 20 else masked_prefix(index, row)

    rows = with_labels(token_rows(), labels)
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    trainer = mbp_trainer(model, rows, tmp_path, max_tokens_per_micro_batch=30, on_inexact="error")
    assert_equal(trainer, expected, HEAD_IN_FLOAT32)


def test_a_step_without_items_changes_nothing_and_warns_once(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = with_labels(token_rows(), lambda index, row: [-100] * len(row["input_ids"]))
    trainer = mbp_trainer(model, rows, tmp_path, max_steps=3, optim="adamw_torch", weight_decay=0.1)
    with pytest.warns(UserWarning, match="nothing to learn from") as caught:
        trainer.train()
    assert len([warning for warning in caught if "nothing to learn from" in str(warning.message)]) == 1
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert [log["loss"] for log in trainer.state.log_history[:3]] == [0.0, 0.0, 0.0]


def test_the_tokenizer_of_the_tests_knows_its_vocabulary() -> None:
    assert isinstance(tokenizer(), PreTrainedTokenizerFast)
    assert len(tokenizer()) == VOCABULARY


class ScalesGradients(MBPTrainer):
    """With the gradient scaler of fp16, which insists on gradients in every step."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.accelerator.scaler = torch.amp.GradScaler("cpu")
        return super().create_optimizer(*args, **kwargs)


def test_a_step_without_items_passes_the_gradient_scaler(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config()).float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = with_labels(token_rows(), lambda index, row: [-100] * len(row["input_ids"]))
    trainer = mbp_trainer(
        model, rows, tmp_path, trainer_class=ScalesGradients, max_steps=3, optim="adamw_torch", max_grad_norm=1.0
    )
    with pytest.warns(UserWarning, match="nothing to learn from"):
        trainer.train()
    assert trainer.state.global_step == 3
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
