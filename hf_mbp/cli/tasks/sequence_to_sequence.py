"""A text for a text: translation, summaries, and whatever else an encoder-decoder writes."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError, say
from hf_mbp.cli.metrics import ExactMatch, RougeL
from hf_mbp.cli.models import length_limit, load_model
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks import language_modeling
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.language_modeling import IGNORED, sum_row
from hf_mbp.cli.tokenization import CUT, Batch, column_lengths, encode_rows, encode_splits, rows_cut, texts
from hf_mbp.cli.trainers import FinetuneSeq2SeqTrainer


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize sources and targets, load an encoder-decoder, let it generate texts as long as the targets."""
    if not getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{model_arguments.model_name_or_path or model_arguments.config_name} has no encoder and decoder;"
            " use a model such as T5 or BART, or the task language_modeling"
        )
    if data_arguments.max_length is not None:
        raise UserError(
            "max_length says nothing here, where rows have two lengths; write max_source_length and max_target_length"
        )
    columns: dict[str, str | None] = {
        "source_column": data_arguments.source_column,
        "target_column": data_arguments.target_column,
    }
    splits = _with_inner_columns(splits, columns.values())
    require_columns(splits, columns)
    train, validation = encode_splits(
        splits, partial(_encode, config=config, tokenizer=tokenizer, arguments=data_arguments)
    )
    model = load_model(AutoModelForSeq2SeqLM, model_arguments)
    _set_generation_length(model, data_arguments.max_target_length, max(column_lengths(train, "labels")))
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        # With the model it makes what the decoder reads, for losses that are computed without the model's own.
        collator=DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        compute_metrics=metrics_with(tokenizer),
        preprocess_logits_for_metrics=tokens_or_sums,
        make_trainer=FinetuneSeq2SeqTrainer,
    )


def _with_inner_columns(splits: Splits, columns: Any) -> Splits:
    """Splits whose columns of columns are taken apart, if one is asked for: data for translation have them."""
    if not any("." in column and column not in splits.train.column_names for column in columns):
        return splits
    validation = None if splits.validation is None else splits.validation.flatten()
    return replace(splits, train=splits.train.flatten(), validation=validation)


def _encode(
    part: Part, *, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_source_length, "max_source_length", config=config)
    target_limit = length_limit(tokenizer, arguments.max_target_length, "max_target_length", config=config)

    def encode(batch: Batch) -> Batch:
        targets = texts(batch, arguments.target_column)
        learned = [i for i, target in enumerate(targets) if target.strip()]
        sources = [arguments.source_prefix + source for source in texts(batch, arguments.source_column)]
        encoded = _tokenize(tokenizer, [sources[i] for i in learned], limit)
        labels = _tokenize(tokenizer, [targets[i] for i in learned], target_limit, side="text_target")
        was_cut = [source or target for source, target in zip(encoded[CUT], labels[CUT], strict=True)]
        return {"input_ids": encoded["input_ids"], "labels": labels["input_ids"], CUT: was_cut}

    encoded = encode_rows(
        part,
        encode,
        limit=f"{limit or 'all'} tokens of the source or {target_limit or 'all'} of the target",
        option="max_source_length, max_target_length",
        workers=arguments.preprocessing_num_workers,
    )
    lengths = column_lengths(encoded, "labels")
    say(f"{part.name}: tokens a target: median {statistics.median(lengths):.0f}, longest {max(lengths)}")
    return encoded


def _tokenize(tokenizer: PreTrainedTokenizerBase, values: list[str], limit: int | None, *, side: str = "text") -> Batch:
    if not values:
        return {"input_ids": [], CUT: []}
    options = {"truncation": limit is not None, "max_length": limit, "return_attention_mask": False}
    encoded = tokenizer(**{side: values}, **options)
    return {"input_ids": encoded["input_ids"], CUT: rows_cut(encoded, limit)}


def _set_generation_length(model: PreTrainedModel, limit: int | None, longest: int) -> None:
    """Let the model generate texts as long as the targets: its own limit, or as long as the longest of the training.

    Else it would stop after 20 tokens. ``generation_max_length`` wins over this. One more token starts the decoder.
    """
    generation = model.generation_config
    if limit is not None or (generation.max_length is None and generation.max_new_tokens is None):
        generation.max_length = 1 + (limit or longest)
        generation.max_new_tokens = None


def tokens_or_sums(predictions: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return generated tokens as they are, and reduce logits to sums of log-likelihoods, as language modelling does."""
    predictions = predictions[0] if isinstance(predictions, tuple) else predictions
    if not predictions.is_floating_point():
        return predictions  # type: ignore[no-any-return]
    return torch.stack([sum_row(row, row_labels) for row, row_labels in zip(predictions, labels, strict=True)])


def metrics_with(tokenizer: PreTrainedTokenizerBase) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return the function that compares generated texts with the targets (``predict_with_generate``).

    Without it the predictions are sums of log-likelihoods, which make perplexity and mean loss.
    """

    def text_of(tokens: Any) -> list[str]:
        tokens = np.where(tokens == IGNORED, tokenizer.pad_token_id, tokens)
        return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        predictions = np.asarray(prediction.predictions)
        if predictions.dtype.kind == "f":
            return language_modeling.compute_metrics(prediction)
        written, expected = text_of(predictions), text_of(np.asarray(prediction.label_ids))
        return {
            **ExactMatch().compute(predictions=written, references=expected),
            **RougeL().compute(predictions=written, references=expected),
        }

    return compute_metrics
