"""Evaluation and prediction in micro-batches give what the stock Trainer gives for whole batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_mbp import MBPConfig, MBPMixin, MBPSeq2SeqTrainer, MBPTrainer, evaluation, memory, sizing
from tests.helpers import (
    FILL,
    PAD,
    VOCABULARY,
    Pad,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    t5_config,
    token_rows,
    tokenizer,
    with_labels,
)

CPU = torch.device("cpu")
BUDGET = 64
NUM_ROWS = 50
BATCH = 32
"""Rows of an evaluation batch: 50 rows are a whole batch, which is split, and one of 18 rows, which also is."""

TIMES = ("runtime", "samples_per_second", "steps_per_second", "preparation_time")


class Shapes:
    """Notes `[rows, columns]` of every forward pass of a model."""

    def __init__(self, model: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["decoder_input_ids"]
        self.shapes.append(tuple(ids.shape))

    @property
    def cells(self) -> int:
        return sum(rows * width for rows, width in self.shapes)


def rows_of(label: Callable[[int, dict[str, Any]], Any] | None, count: int = NUM_ROWS) -> list[dict[str, Any]]:
    rows = token_rows(count)
    return rows if label is None else with_labels(rows, label)


def longest(rows: list[dict[str, Any]], key: str = "input_ids") -> int:
    return max(len(row[key]) for row in rows)


def is_list(rows: list[dict[str, Any]], key: str) -> bool:
    return isinstance(rows[0].get(key), list)


def token_classes(index: int, row: dict[str, Any]) -> list[int]:
    return [-100 if (token + index) % 4 == 0 else token % 5 for token in row["input_ids"]]


def spans(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "start_positions": i % 3, "end_positions": len(row["input_ids"]) - 1} for i, row in enumerate(rows)]


def targets(index: int, row: dict[str, Any]) -> list[int]:
    return row["input_ids"][: 2 + index % 7]


def accuracy(prediction: Any) -> dict[str, float]:
    predictions = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
    counted = prediction.label_ids != -100
    return {"accuracy": float((predictions.argmax(-1) == prediction.label_ids)[counted].mean())}


def next_token_accuracy(prediction: Any) -> dict[str, float]:
    labels, predictions = prediction.label_ids[:, 1:], prediction.predictions[:, :-1]
    return {"accuracy": float((predictions == labels)[labels != -100].mean())}


def picked(logits: Any, labels: Any) -> torch.Tensor:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits.argmax(dim=-1)


INIT = ("data_collator", "compute_metrics", "preprocess_logits_for_metrics", "processing_class", "compute_loss_func")


def trainer_of(trainer_class: Any, model: Any, folder: Path, **changes: Any) -> Any:
    """A trainer, stock or with `MBPMixin`, that is only there to evaluate; `changes` go where they belong."""
    init = {name: changes.pop(name) for name in INIT if name in changes}
    options = {"max_tokens_per_micro_batch": BUDGET}
    options |= {name: changes.pop(name) for name in MBPConfig.__dataclass_fields__ if name in changes}
    config = {"mbp_config": MBPConfig(**options)} if issubclass(trainer_class, MBPMixin) else {}
    arguments_class = Seq2SeqTrainingArguments if issubclass(trainer_class, Seq2SeqTrainer) else TrainingArguments
    defaults = {
        "output_dir": str(folder),
        "per_device_eval_batch_size": BATCH,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    args = arguments_class(**{**defaults, **changes})
    return trainer_class(model=model, args=args, **{"data_collator": Pad(), **init}, **config)


def both(model: Any, rows: Any, folder: Path, *, seq2seq: bool = False, **changes: Any) -> tuple[Any, Any, Shapes]:
    """What stock predicts and what ours does, and the shapes that ours ran; micro-batches keep to the budget."""
    stock_class, our_class = (Seq2SeqTrainer, MBPSeq2SeqTrainer) if seq2seq else (Trainer, MBPTrainer)
    whole = trainer_of(stock_class, model, folder, **changes).predict(rows)
    shapes = Shapes(model)
    split = trainer_of(our_class, model, folder, **changes).predict(rows)
    budget = changes.get("max_tokens_per_micro_batch", BUDGET)
    assert max(rows * width for rows, width in shapes.shapes) <= budget
    assert len(shapes.shapes) > 2 * math.ceil(len(rows) / BATCH)
    return whole, split, shapes


def assert_same(whole: Any, split: Any, rows: list[dict[str, Any]]) -> None:
    assert set(split.metrics) == set(whole.metrics)
    names = [name for name in whole.metrics if not name.endswith(TIMES)]
    assert {name: split.metrics[name] for name in names} == {
        name: pytest.approx(whole.metrics[name], rel=1e-6) for name in names
    }
    assert_same_arrays(whole.predictions, split.predictions, rows)
    assert_same_labels(whole.label_ids, split.label_ids)


def assert_same_labels(whole: Any, split: Any) -> None:
    assert type(whole) is type(split)
    if isinstance(whole, tuple):
        for one, other in zip(whole, split, strict=True):
            assert_same_labels(one, other)
    elif whole is not None:
        assert whole.dtype == split.dtype
        np.testing.assert_array_equal(split, whole)


def assert_same_arrays(whole: Any, split: Any, rows: list[dict[str, Any]]) -> None:
    """The same in every row, but in its padding, where micro-batches may have no columns, or -100."""
    assert type(whole) is type(split)
    if isinstance(whole, tuple):
        for one, other in zip(whole, split, strict=True):
            assert_same_arrays(one, other, rows)
        return
    assert (whole.shape, whole.dtype) == (split.shape, split.dtype)
    width = whole.shape[1] if whole.ndim > 1 else 0
    keys = [key for key in ("labels", "input_ids") if is_list(rows, key) and width >= longest(rows, key)]
    used = [len(row[keys[-1]]) if keys else None for row in rows]
    for one, other, length in zip(whole, split, used, strict=True):
        np.testing.assert_allclose(other[:length], one[:length], rtol=1e-6, atol=1e-9)


CASES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "classification": (
        BertForSequenceClassification,
        bert_config(num_labels=3),
        rows_of(lambda i, _: i % 3),
        {"compute_metrics": accuracy},
    ),
    "regression": (
        BertForSequenceClassification,
        bert_config(num_labels=1),
        rows_of(lambda i, _: i / 7),
        {"compute_metrics": lambda p: {"mse": float(((p.predictions[:, 0] - p.label_ids) ** 2).mean())}},
    ),
    "multi-label": (
        BertForSequenceClassification,
        bert_config(num_labels=4, problem_type="multi_label_classification"),
        rows_of(lambda i, _: [float(i >> bit & 1) for bit in range(4)]),
        {},
    ),
    "token classes": (
        BertForTokenClassification,
        bert_config(num_labels=5),
        rows_of(token_classes),
        {"compute_metrics": accuracy},
    ),
    "masked LM": (BertForMaskedLM, bert_config(), rows_of(masked_prefix), {"compute_metrics": accuracy}),
    "causal LM": (
        GPT2LMHeadModel,
        gpt2_config(),
        rows_of(masked_prefix),
        {"compute_metrics": next_token_accuracy, "preprocess_logits_for_metrics": picked},
    ),
    "left-padded causal LM": (
        GPT2LMHeadModel,
        gpt2_config(),
        rows_of(masked_prefix),
        {"data_collator": Pad("left"), "compute_metrics": next_token_accuracy, "preprocess_logits_for_metrics": picked},
    ),
    "Llama": (LlamaForCausalLM, llama_config(), rows_of(masked_prefix), {}),
    "question answering": (
        BertForQuestionAnswering,
        bert_config(),
        spans(rows_of(None)),
        {"label_names": ["start_positions", "end_positions"]},
    ),
    "T5": (T5ForConditionalGeneration, t5_config(), rows_of(targets), {"compute_metrics": accuracy}),
    "BART": (
        BartForConditionalGeneration,
        BartConfig(
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            dropout=0.0,
            max_position_embeddings=64,
        ),
        rows_of(targets),
        {},
    ),
    "no labels": (BertForSequenceClassification, bert_config(num_labels=3), rows_of(None), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_predictions_and_metrics_are_those_of_stock(name: str, tmp_path: Path) -> None:
    model_class, config, rows, options = CASES[name]
    model = build(model_class, config)
    whole, split, shapes = both(model, rows, tmp_path, **options)
    assert ("test_loss" in split.metrics) == ("labels" in rows[0] or "start_positions" in rows[0])
    if name not in ("left-padded causal LM", "question answering"):  # which keep the width of their batch
        assert shapes.cells < 0.85 * sum(len(part) * longest(part) for part in (rows[:BATCH], rows[BATCH:]))
    assert_same(whole, split, rows)


# Options of the stock loop


@pytest.fixture
def tagger() -> Any:
    return build(BertForTokenClassification, bert_config(num_labels=5))


TAGGED = rows_of(token_classes)


@pytest.mark.parametrize("steps", [1, 2])
def test_accumulation_steps(tagger: Any, tmp_path: Path, steps: int) -> None:
    whole, split, _ = both(tagger, TAGGED, tmp_path, eval_accumulation_steps=steps, compute_metrics=accuracy)
    assert_same(whole, split, TAGGED)


def test_loss_only(tagger: Any, tmp_path: Path) -> None:
    whole, split, _ = both(tagger, TAGGED, tmp_path, prediction_loss_only=True)
    assert split.predictions is None
    assert split.label_ids is None
    assert split.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


def test_evaluate_logs_what_stock_logs(tagger: Any, tmp_path: Path) -> None:
    metrics = [
        trainer_of(kind, tagger, tmp_path, compute_metrics=accuracy).evaluate(TAGGED) for kind in (Trainer, MBPTrainer)
    ]
    assert metrics[0].keys() == metrics[1].keys()
    for name in ("eval_loss", "eval_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-6)


class BatchMetrics:
    """A metric that is put together batch by batch."""

    def __init__(self) -> None:
        self.correct = self.total = 0
        self.batches: list[int] = []

    def __call__(self, prediction: Any, compute_result: bool) -> dict[str, float]:
        counted = prediction.label_ids != -100
        self.batches.append(len(prediction.label_ids))
        self.correct += int((prediction.predictions.argmax(-1) == prediction.label_ids)[counted].sum())
        self.total += int(counted.sum())
        return {"accuracy": self.correct / self.total} if compute_result else {}


def test_metrics_of_each_batch(tagger: Any, tmp_path: Path) -> None:
    """`compute_metrics` sees stock's batches, and not micro-batches."""
    found, seen = [], []
    for kind in (Trainer, MBPTrainer):
        metric = BatchMetrics()
        trainer = trainer_of(kind, tagger, tmp_path, compute_metrics=metric, batch_eval_metrics=True)
        found.append(trainer.evaluate(TAGGED))
        seen.append(metric.batches)
    assert seen == [[BATCH, NUM_ROWS - BATCH]] * 2
    assert found[1]["eval_accuracy"] == pytest.approx(found[0]["eval_accuracy"], rel=1e-6)


def test_inputs_and_losses_for_metrics(tagger: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def note(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        return {}

    both(tagger, TAGGED, tmp_path, include_for_metrics=["inputs", "loss"], compute_metrics=note)
    whole, split = seen
    np.testing.assert_array_equal(split.inputs, whole.inputs)
    np.testing.assert_allclose(split.losses, whole.losses, rtol=1e-6)
    assert len(set(whole.losses.tolist())) == 2, "a loss for each batch"
    assert split.inputs.shape == split.label_ids.shape == split.predictions.shape[:2]


def test_batches_that_are_not_concatenated(tagger: Any, tmp_path: Path) -> None:
    whole, split, _ = both(tagger, TAGGED, tmp_path, eval_do_concat_batches=False)
    assert len(whole.predictions) == len(split.predictions) == 2
    for one, other, rows in zip(whole.predictions, split.predictions, (TAGGED[:BATCH], TAGGED[BATCH:]), strict=True):
        assert_same_arrays(one, other, rows)


def test_keys_that_are_ignored(tmp_path: Path) -> None:
    model = build(T5ForConditionalGeneration, t5_config())
    rows = rows_of(targets)
    whole = trainer_of(Trainer, model, tmp_path).predict(
        rows, ignore_keys=["encoder_last_hidden_state", "past_key_values", "cache"]
    )
    split = trainer_of(MBPTrainer, model, tmp_path).predict(
        rows, ignore_keys=["encoder_last_hidden_state", "past_key_values", "cache"]
    )
    assert isinstance(whole.predictions, np.ndarray)
    assert_same(whole, split, rows)


def test_several_evaluation_sets(tagger: Any, tmp_path: Path) -> None:
    sets = {"first": TAGGED[:20], "second": TAGGED[20:]}
    whole, split = (trainer_of(kind, tagger, tmp_path).evaluate(sets) for kind in (Trainer, MBPTrainer))
    for name in ("eval_first_loss", "eval_second_loss"):
        assert split[name] == pytest.approx(whole[name], rel=1e-6)


# Preprocessing


def test_logits_are_preprocessed_in_micro_batches(tmp_path: Path) -> None:
    """Or those of a batch would be on the host, or on the device, all at once."""
    model, rows, sizes = build(GPT2LMHeadModel, gpt2_config()), rows_of(masked_prefix), []

    def pick(logits: Any, labels: Any) -> torch.Tensor:
        sizes.append(logits.shape[0] * logits.shape[1])
        assert labels.shape == logits.shape[:2]
        return logits.argmax(-1)

    whole, split, _ = both(model, rows, tmp_path, preprocess_logits_for_metrics=pick)
    assert sizes[0] > 10 * BUDGET
    assert max(sizes[2:]) <= BUDGET
    assert_same_arrays(whole.predictions, split.predictions, rows)


def test_preprocessing_that_compares_rows_sees_whole_batches(tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), rows_of(lambda i, _: i % 3)
    whole, split, _ = both(
        model, rows, tmp_path, preprocess_logits_for_metrics=lambda logits, _: logits - logits.mean(dim=0)
    )
    assert_same(whole, split, rows)


@pytest.mark.parametrize("picked_from", [lambda logits: logits.mean(1), lambda logits: logits.amax(1) - logits.mean()])
def test_preprocessing_over_columns_sees_no_columns_that_stock_has_not(picked_from: Any, tmp_path: Path) -> None:
    """What stock would have to preprocess must not be filled up with -100: neither in a batch nor in a micro-batch."""
    model, rows = build(GPT2LMHeadModel, gpt2_config()), rows_of(masked_prefix)
    whole, split, _ = both(model, rows, tmp_path, preprocess_logits_for_metrics=lambda logits, _: picked_from(logits))
    assert whole.predictions.shape == (NUM_ROWS, VOCABULARY)
    np.testing.assert_allclose(split.predictions, whole.predictions, rtol=1e-6, atol=1e-9)


# Losses


def test_loss_function_of_the_user(tmp_path: Path) -> None:
    def summed(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs.logits.flatten(0, 1)
        total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
        return total / (num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum())

    model = build(BertForTokenClassification, bert_config(num_labels=5))
    whole, split, _ = both(model, TAGGED, tmp_path, compute_loss_func=summed)
    assert_same(whole, split, TAGGED)


def test_label_smoothing(tmp_path: Path) -> None:
    model, rows = build(GPT2LMHeadModel, gpt2_config()), rows_of(masked_prefix)
    whole, split, _ = both(model, rows, tmp_path, label_smoothing_factor=0.2)
    assert split.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


def test_micro_batches_without_items_do_not_count(tmp_path: Path) -> None:
    """The mean over none of the tokens is not a number; the long rows run by themselves."""
    rows = rows_of(
        lambda index, row: [-100] * len(row["input_ids"]) if len(row["input_ids"]) > 20 else row["input_ids"]
    )
    whole, split, _ = both(build(GPT2LMHeadModel, gpt2_config()), rows, tmp_path)
    assert math.isfinite(split.metrics["test_loss"])
    assert split.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


def weighted(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(outputs.logits, labels, weight=CLASS_WEIGHTS)


CLASS_WEIGHTS = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)


class CountsWeights(MBPTrainer):
    def num_items(self, micro_batch: Any) -> float:
        return float(CLASS_WEIGHTS[micro_batch["labels"]].sum())


def test_weighted_losses_are_split_if_their_items_are_counted(tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), rows_of(lambda i, _: i * 7 % 3)
    whole = trainer_of(Trainer, model, tmp_path, compute_loss_func=weighted).predict(rows)
    with pytest.warns(UserWarning, match="override num_items if it has weights"):
        unsplit = trainer_of(MBPTrainer, model, tmp_path, compute_loss_func=weighted).predict(rows)
    shapes = Shapes(model)
    split = trainer_of(CountsWeights, model, tmp_path, compute_loss_func=weighted).predict(rows)
    assert len(shapes.shapes) > 10
    assert_same(whole, unsplit, rows)
    assert_same(whole, split, rows)


@pytest.mark.parametrize("first", [[0] * BATCH, [0, 0, 1] * BATCH], ids=["one class", "two classes"])
def test_weighted_losses_are_found_where_labels_differ(first: list[int], tmp_path: Path) -> None:
    """The weights of one class, or of two that weigh the same, cancel; a later batch shows them."""
    weights = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64)

    def loss_of(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels, weight=weights)

    model = build(BertForSequenceClassification, bert_config(num_labels=3))
    rows = rows_of(lambda i, _: first[i] if i < BATCH else i % 3, 2 * BATCH)
    whole = trainer_of(Trainer, model, tmp_path, compute_loss_func=loss_of).predict(rows)
    with pytest.warns(UserWarning, match="override num_items if it has weights"):
        split = trainer_of(MBPTrainer, model, tmp_path, compute_loss_func=loss_of).predict(rows)
    assert_same(whole, split, rows)


def test_labels_are_tried_so_that_few_rows_of_another_weight_show(tmp_path: Path) -> None:
    """The two shortest rows have the same label, and so have most."""
    rows = sorted(rows_of(None, BATCH), key=lambda row: len(row["input_ids"]))
    rows = with_labels(rows, lambda i, _: 2 if i == 20 else 0)
    model = build(BertForSequenceClassification, bert_config(num_labels=3))
    whole = trainer_of(Trainer, model, tmp_path, compute_loss_func=weighted).predict(rows)
    with pytest.warns(UserWarning, match="override num_items if it has weights"):
        split = trainer_of(MBPTrainer, model, tmp_path, compute_loss_func=weighted).predict(rows)
    assert_same(whole, split, rows)


def test_a_first_batch_without_items_leaves_the_loss_to_the_next(tmp_path: Path) -> None:
    class SumOfTokens(BertForTokenClassification):
        def forward(self, labels: Any = None, **kwargs: Any) -> Any:
            output = super().forward(labels=labels, **kwargs)
            output.loss = torch.nn.functional.cross_entropy(
                output.logits.flatten(0, 1), labels.flatten(), reduction="sum"
            )
            return output

    rows = rows_of(lambda i, row: [-100] * len(row["input_ids"]) if i < BATCH else token_classes(i, row))
    model = build(SumOfTokens, bert_config(num_labels=5))
    whole = trainer_of(Trainer, model, tmp_path).predict(rows)
    with pytest.warns(UserWarning, match="Evaluation batches run whole"):
        split = trainer_of(MBPTrainer, model, tmp_path).predict(rows)
    assert_same(whole, split, rows)


class StrangeCount(Trainer):
    """Passes another number of items than the loss is a mean over, as stock does for some models."""

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return super()._get_num_items_in_batch(batch_samples, device) * 2


class OurStrangeCount(MBPMixin, StrangeCount):
    pass


@pytest.mark.parametrize(
    ("model_class", "config"), [(GPT2LMHeadModel, gpt2_config()), (BertForMaskedLM, bert_config())]
)
def test_what_stock_counts_has_the_effect_it_has_there(model_class: Any, config: Any, tmp_path: Path) -> None:
    """GPT-2 divides by the count that is passed, BERT ignores it."""
    model, rows = build(model_class, config), rows_of(masked_prefix)
    plain = trainer_of(Trainer, model, tmp_path).evaluate(rows)["eval_loss"]
    whole, split = (
        trainer_of(kind, model, tmp_path).evaluate(rows)["eval_loss"] for kind in (StrangeCount, OurStrangeCount)
    )
    assert whole == pytest.approx(plain / 2 if model_class is GPT2LMHeadModel else plain)
    assert split == pytest.approx(whole, rel=1e-6)


# What is not split, or not cut


class SeesPadding(BertForSequenceClassification):
    """Its logits depend on the width that rows are padded to."""

    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        output.logits = output.logits * input_ids.shape[1]
        return output


class SeesOtherRows(BertForSequenceClassification):
    """Its logits depend on the other rows of the batch."""

    def forward(self, input_ids: Any, labels: Any = None, **kwargs: Any) -> Any:
        output = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        output.logits = output.logits - output.logits.mean(dim=0)
        return output


CLASSIFIED = rows_of(lambda index, _: index % 3)


def test_models_that_see_padding_keep_the_width(tmp_path: Path) -> None:
    model = build(SeesPadding, bert_config(num_labels=3))
    whole, split, shapes = both(model, CLASSIFIED, tmp_path)
    assert_same(whole, split, CLASSIFIED)
    widths = [width for _, width in shapes.shapes]
    assert set(widths[-5:]) == {longest(CLASSIFIED[BATCH:])}


def test_padding_is_cut_only_once_it_was_tried(tmp_path: Path) -> None:
    """Rows of one length have none; those of the next batch do."""
    rows = with_labels(token_rows(BATCH, low=12, high=12) + token_rows(BATCH), lambda i, _: i % 3)
    model = build(SeesPadding, bert_config(num_labels=3))
    whole, split, shapes = both(model, rows, tmp_path)
    assert_same(whole, split, rows)
    assert {width for _, width in shapes.shapes[-5:]} == {longest(rows[BATCH:])}


def test_padding_is_cut_after_a_batch_without_any(tmp_path: Path) -> None:
    rows = with_labels(token_rows(BATCH, low=12, high=12) + token_rows(BATCH), lambda i, _: i % 3)
    whole, split, shapes = both(build(BertForSequenceClassification, bert_config(num_labels=3)), rows, tmp_path)
    assert_same(whole, split, rows)
    assert len({width for _, width in shapes.shapes[-5:]}) > 1


def test_models_that_compare_rows_run_whole_batches(tmp_path: Path) -> None:
    model = build(SeesOtherRows, bert_config(num_labels=3))
    whole = trainer_of(Trainer, model, tmp_path).predict(CLASSIFIED)
    trainer = trainer_of(MBPTrainer, model, tmp_path)
    with pytest.warns(UserWarning, match="Evaluation batches run whole: two rows had other predictions"):
        split = trainer.predict(CLASSIFIED)
    assert_same(whole, split, CLASSIFIED)
    trainer.predict(CLASSIFIED)  # says it once


def test_labels_in_the_padding_are_kept(tmp_path: Path) -> None:
    """A collator that pads labels with a class, not with -100, makes the loss count the padding."""
    model, collator = build(BertForTokenClassification, bert_config(num_labels=5)), PadWithClass()
    whole, split, shapes = both(model, TAGGED, tmp_path, data_collator=collator)
    assert {width for _, width in shapes.shapes[-5:]} == {longest(TAGGED[BATCH:])}
    assert_same(whole, split, TAGGED)


class PadWithClass(Pad):
    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = super().__call__(rows)
        return {**inputs, "labels": inputs["labels"].clamp(min=0)}


@pytest.mark.parametrize("multiple", [8, 40])
def test_shapes_are_those_of_collators_that_pad_more(tagger: Any, tmp_path: Path, multiple: int) -> None:
    options = {"data_collator": Pad(pad_to_multiple_of=multiple), "max_tokens_per_micro_batch": 2 * multiple + 40}
    whole, split, _ = both(tagger, TAGGED, tmp_path, **options)
    assert whole.predictions.shape[1] % multiple == 0
    assert_same(whole, split, TAGGED)


class PadToTheEnd(Pad):
    """Pads to 48 columns and does not say so."""

    def column(self, key: str, values: list[Any]) -> torch.Tensor:
        padded = super().column(key, values)
        if padded.ndim == 1:
            return padded
        return torch.nn.functional.pad(padded, (0, 48 - padded.shape[1]), value=FILL[key])


def test_columns_that_no_row_needs_are_cut_and_put_back(tagger: Any, tmp_path: Path) -> None:
    whole, split, shapes = both(tagger, TAGGED, tmp_path, data_collator=PadToTheEnd(), max_tokens_per_micro_batch=60)
    assert whole.predictions.shape[1] == 48
    assert max(width for _, width in shapes.shapes) == longest(TAGGED)
    assert_same(whole, split, TAGGED)


def test_classes_are_not_taken_for_columns(tmp_path: Path) -> None:
    """As many classes as the only micro-batch has columns, of more that are padding."""
    rows = with_labels(
        [{"input_ids": [7 + i % 5] * 6, "attention_mask": [1] * 6} for i in range(8)], lambda i, _: i % 6
    )
    model = build(BertForSequenceClassification, bert_config(num_labels=6))
    whole, split = (
        trainer_of(kind, model, tmp_path, data_collator=PadToTheEnd()).predict(rows) for kind in (Trainer, MBPTrainer)
    )
    assert_same(whole, split, rows)


def test_sequences_laid_end_to_end_run_as_they_are(tmp_path: Path) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows_of(None, 12)]
    model = build(LlamaForCausalLM, llama_config())
    whole, split = (
        trainer_of(
            kind,
            model,
            tmp_path,
            data_collator=DataCollatorWithFlattening(return_position_ids=True),
            prediction_loss_only=True,
        ).predict(rows)
        for kind in (Trainer, MBPTrainer)
    )
    assert split.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


def test_random_masks_are_those_of_stock(tmp_path: Path) -> None:
    """The collator runs once a batch, as it does there."""
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
    model, rows = build(BertForMaskedLM, bert_config()), [{"input_ids": row["input_ids"]} for row in rows_of(None)]
    losses = []
    for kind in (Trainer, MBPTrainer):
        trainer = trainer_of(kind, model, tmp_path, data_collator=collator, processing_class=tokenizer())
        set_seed(3)
        losses.append(trainer.evaluate(rows)["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


# Generation


@pytest.mark.parametrize("beams", [1, 2])
def test_generation(tmp_path: Path, beams: int) -> None:
    model, rows = build(T5ForConditionalGeneration, t5_config(eos_token_id=37)), rows_of(targets)
    options = {"predict_with_generate": True, "generation_num_beams": beams, "generation_max_length": 12}
    whole = trainer_of(Seq2SeqTrainer, model, tmp_path, **options).predict(rows)
    assert beams > 1 or len({int((row != PAD).sum()) for row in whole.predictions}) > 1, "rows of different lengths"
    encoded = Shapes(model.encoder)
    split = trainer_of(MBPSeq2SeqTrainer, model, tmp_path, **options).predict(rows)
    assert max(rows * width for rows, width in encoded.shapes) * beams <= BUDGET
    np.testing.assert_array_equal(split.predictions, whole.predictions)
    np.testing.assert_array_equal(split.label_ids, whole.label_ids)
    assert split.metrics["test_loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-6)


def test_generation_without_labels(tmp_path: Path) -> None:
    model, rows = build(T5ForConditionalGeneration, t5_config(eos_token_id=37)), rows_of(None)
    options = {"predict_with_generate": True, "generation_max_length": 12}
    encoded = Shapes(model.encoder)
    split, whole = (
        trainer_of(kind, model, tmp_path, **options).predict(rows) for kind in (MBPSeq2SeqTrainer, Seq2SeqTrainer)
    )
    assert len(encoded.shapes) > 10
    assert split.label_ids is None
    np.testing.assert_array_equal(split.predictions, whole.predictions)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
@pytest.mark.parametrize("budget", [BUDGET, None])
def test_generation_to_the_default_length(budget: int | None, tmp_path: Path) -> None:
    """Stock's first batch may be a token longer: its step writes the default into the configuration afterwards."""
    predicted = []
    for kind in (Seq2SeqTrainer, MBPSeq2SeqTrainer):
        model = build(T5ForConditionalGeneration, t5_config(eos_token_id=37))
        options = {"predict_with_generate": True, "max_tokens_per_micro_batch": budget, "memory_limit": None}
        predicted.append(trainer_of(kind, model, tmp_path, **options).predict(rows_of(targets)))
    assert_same_labels(predicted[0].predictions, predicted[1].predictions)


# Plans


def test_micro_batches_are_planned_for_forward_passes(
    tagger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are what a micro-batch of training costs here; without them there is no reason to pad."""
    quick = replace(sizing.DEVICE_CLASSES["cpu"], launches=1e12)
    monkeypatch.setitem(sizing.DEVICE_CLASSES, "cpu", quick)
    whole = trainer_of(Trainer, tagger, tmp_path).predict(TAGGED)
    cost = sizing.cost_of(tagger, CPU)
    counts = {}
    for forward_only in (True, False):
        if not forward_only:
            monkeypatch.setattr(evaluation, "cost_of", lambda *_, **__: cost)
        trainer = trainer_of(MBPTrainer, tagger, tmp_path, max_tokens_per_micro_batch=10**6)
        shapes = Shapes(tagger)
        assert_same(whole, trainer.predict(TAGGED), TAGGED)
        before = len(shapes.shapes)
        assert_same(whole, trainer.predict(TAGGED), TAGGED)
        counts[forward_only] = len(shapes.shapes) - before  # without the trial
    batches = [TAGGED[start : start + BATCH] for start in range(0, len(TAGGED), BATCH)]
    assert counts[True] == sum(len({len(row["input_ids"]) for row in batch}) for batch in batches)
    assert counts[False] < counts[True]


def test_another_model_is_planned_for_by_its_own_cost(
    tagger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned_for: list[Any] = []
    monkeypatch.setattr(
        evaluation, "cost_of", lambda model, *_, **__: planned_for.append(model) or sizing.cost_of(model, CPU)
    )
    trainer = trainer_of(MBPTrainer, tagger, tmp_path)
    trainer.predict(TAGGED)
    trainer.model = trainer.model_wrapped = build(BertForTokenClassification, bert_config(num_labels=6))
    trainer.predict(TAGGED)
    assert planned_for == [tagger, trainer.model]


# Memory


def test_an_evaluation_without_a_budget_is_sized_from_memory(tagger: Any, tmp_path: Path) -> None:
    trainer = trainer_of(MBPTrainer, tagger, tmp_path, max_tokens_per_micro_batch=None, memory_limit="100TB")
    whole = trainer_of(Trainer, tagger, tmp_path).predict(TAGGED)
    assert_same(whole, trainer.predict(TAGGED), TAGGED)


def test_what_there_is_no_memory_for_is_not_measured(
    tagger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = memory.measure_activations

    def scarce(run: Any) -> int:
        size = measure(run)
        if measured:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        measured.append(size)
        return size

    monkeypatch.setattr(memory, "measure_activations", scarce)
    trainer = trainer_of(MBPTrainer, tagger, tmp_path, max_tokens_per_micro_batch=None, memory_limit="100TB")
    whole = trainer_of(Trainer, tagger, tmp_path).predict(TAGGED)
    assert_same(whole, trainer.predict(TAGGED), TAGGED)
    assert len(measured) == 1


def test_less_memory_makes_smaller_micro_batches(tagger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer_of(Trainer, tagger, tmp_path).predict(TAGGED)
    most, num_probes = [], 8 + 4  # of the trial, and to measure
    for room in (10**9, 2 * 10**5):
        found = memory.Room(allowed_bytes=room, resting_bytes=0)
        monkeypatch.setattr(memory, "room_for_training", lambda *_, found=found: found)
        shapes = Shapes(tagger)
        split = trainer_of(MBPTrainer, tagger, tmp_path, max_tokens_per_micro_batch=None).predict(TAGGED)
        assert_same(whole, split, TAGGED)
        most.append(max(rows * width for rows, width in shapes.shapes[num_probes:]))
    assert most[1] < most[0] / 2


def test_the_budget_of_training_holds_for_the_evaluation_in_it(tagger: Any, tmp_path: Path) -> None:
    trainer = mbp_trainer(tagger, TAGGED[:16], tmp_path, memory_limit="100TB", max_tokens_per_micro_batch=None)
    trainer.train()
    profile = trainer.mbp_feed.budget._profile
    tight = {"options": profile.options | {"max_tokens": BUDGET}, "budget": replace(profile.budget, max_tokens=BUDGET)}
    trainer.mbp_feed.budget._profile = replace(profile, **tight)
    shapes = Shapes(tagger)
    trainer.evaluate(TAGGED)
    assert max(rows * width for rows, width in shapes.shapes) <= BUDGET


class OutOfMemory:
    """Fails, as an allocator does, where a forward pass has more cells than it has room for."""

    def __init__(self, model: Any, room: int) -> None:
        self.room, self.failures = room, 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].numel() > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("no more")


def test_a_micro_batch_without_memory_is_halved_and_so_are_the_next(tagger: Any, tmp_path: Path) -> None:
    whole = trainer_of(Trainer, tagger, tmp_path).predict(TAGGED)
    fault = OutOfMemory(tagger, 40)
    split = trainer_of(MBPTrainer, tagger, tmp_path, max_tokens_per_micro_batch=120).predict(TAGGED)
    assert_same(whole, split, TAGGED)
    assert 0 < fault.failures < 20


def test_a_row_without_memory_is_an_error(tagger: Any, tmp_path: Path) -> None:
    OutOfMemory(tagger, 20)
    with pytest.raises(torch.OutOfMemoryError):
        trainer_of(MBPTrainer, tagger, tmp_path).predict(TAGGED)


def test_another_error_is_no_lack_of_memory(tagger: Any, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> None:
        if calls.append(1) or len(calls) > 5:
            raise RuntimeError("a bug")

    calls: list[int] = []
    tagger.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a bug"):
        trainer_of(MBPTrainer, tagger, tmp_path).predict(TAGGED)
    assert len(calls) == 6


def test_what_was_found_out_is_kept_while_the_weights_are(tagger: Any, tmp_path: Path) -> None:
    trainer, shapes, counts = trainer_of(MBPTrainer, tagger, tmp_path), Shapes(tagger), []
    trainer.predict(TAGGED)
    for changes_weights in (False, True, False):
        if changes_weights:
            torch.nn.init.zeros_(tagger.classifier.bias)
        before = len(shapes.shapes)
        trainer.predict(TAGGED)
        counts.append(len(shapes.shapes) - before)
    assert counts[1] == counts[0] + 6 == counts[2] + 6, "forward passes of the trial, again with other weights"
    trainer.data_collator = PadToTheEnd()
    whole = trainer_of(Trainer, tagger, tmp_path, data_collator=PadToTheEnd()).predict(TAGGED)
    before = len(shapes.shapes)
    assert_same(whole, trainer.predict(TAGGED), TAGGED)
    assert len(shapes.shapes) - before >= counts[1]


def test_preprocessing_is_left_to_stock_in_every_evaluation(tmp_path: Path) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), rows_of(lambda i, _: i % 3)
    options = {"preprocess_logits_for_metrics": lambda logits, _: logits - logits.mean(dim=0)}
    whole = trainer_of(Trainer, model, tmp_path, **options).predict(rows)
    trainer = trainer_of(MBPTrainer, model, tmp_path, **options)
    for _ in range(2):
        assert_same(whole, trainer.predict(rows), rows)


def test_the_trainer_is_left_as_it_was(tagger: Any, tmp_path: Path) -> None:
    trainer = trainer_of(MBPTrainer, tagger, tmp_path, preprocess_logits_for_metrics=picked)
    trainer.predict(TAGGED)
    assert trainer.preprocess_logits_for_metrics is picked
    assert trainer.gather_function == trainer.accelerator.gather_for_metrics
    _, logits, _ = trainer.prediction_step(tagger, Pad()(TAGGED[:4]), False)
    assert logits.shape == (4, longest(TAGGED[:4]), 5)


def test_evaluation_draws_the_random_numbers_that_stock_draws(tmp_path: Path) -> None:
    """And none for what it tries before; weights and training mode are as they were."""
    model, drawn = build(BertForMaskedLM, bert_config(hidden_dropout_prob=0.1)), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in (Trainer, MBPTrainer):
        trainer = trainer_of(kind, model, tmp_path, max_tokens_per_micro_batch=None)
        set_seed(3)
        trainer.evaluate(rows_of(masked_prefix))
        drawn.append(float(torch.rand(1)))
    assert drawn[0] == drawn[1]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
