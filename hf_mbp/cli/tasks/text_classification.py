"""One label for each text, or each pair of texts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.data import Splits, require_columns
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import Accuracy, MacroF1, cross_entropy
from hf_mbp.cli.models import length_limit, load_model
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, longest_first, rows_cut, texts

# A column of ours beside the user's; the name must not be one of theirs.
_CLASS_ID = "hf_mbp_class_id"


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class names in the order of their ids, and where they come from, for messages."""

    names: tuple[str, ...]
    origin: str

    def ids(self, values: Iterable[Any], where: str) -> list[int]:
        """Return the class id of each value.

        Raises:
            UserError: a value that is none of the names.
        """
        id_of = {name: i for i, name in enumerate(self.names)}
        unknown = sorted({str(value) for value in values} - set(id_of))
        if unknown:
            raise UserError(
                f"{where} has labels that {self.origin} does not have: {_listed(unknown)};"
                f" known are {_listed(self.names)}"
            )
        return [id_of[str(value)] for value in values]


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Map labels to ids, tokenize, load a model with one output a class."""
    require_columns(
        splits,
        {
            "text_column": data_arguments.text_column,
            "text_pair_column": data_arguments.text_pair_column,
            "label_column": data_arguments.label_column,
        },
    )
    labels = find_labels(splits, data_arguments.label_column, config, new_head=model_arguments.new_head)
    train = _encode(splits.train, "train", labels, splits.train_origin, tokenizer, data_arguments)
    validation = None
    if splits.validation is not None:
        encoded = _encode(splits.validation, "validation", labels, splits.validation_origin, tokenizer, data_arguments)
        validation = longest_first(encoded)
    model = load_model(
        AutoModelForSequenceClassification,
        model_arguments,
        num_labels=len(labels.names),
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
        ignore_mismatched_sizes=model_arguments.new_head,
    )
    # Decoders find a row's last token by it.
    model.config.pad_token_id = tokenizer.pad_token_id
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=only_logits,
    )


def find_labels(splits: Splits, column: str, config: PreTrainedConfig, *, new_head: bool) -> Labels:
    """Return the classes: the model's, if it is a classifier already; else those the data set names; else those found.

    Names found in the data are sorted, integers by value, so that ids do not depend on the order of the rows.

    Raises:
        UserError: labels that are no classes: missing, fractional, or all alike.
    """
    feature = splits.train.features[column]
    is_scalar = isinstance(feature, (Value, ClassLabel))
    values = splits.train.unique(column) if is_scalar else splits.train[column][:1]
    for value in values:
        if not isinstance(value, (str, int)):
            raise UserError(
                f"{splits.train_origin}, column {column!r}: {value!r} is not a label; write names or integers"
            )
    where = f"{splits.train_origin}, column {column!r}"
    return choose_labels(values, feature, config, head="ForSequenceClassification", new_head=new_head, where=where)


def choose_labels(
    values: Sequence[Any], feature: Any, config: PreTrainedConfig, *, head: str, new_head: bool, where: str
) -> Labels:
    """Return the classes of a model that has such a ``head``, of the data set's ``feature``, or the different values.

    Raises:
        UserError: there is one value only.
    """
    architectures = getattr(config, "architectures", None) or ()
    if not new_head and any(name.endswith(head) for name in architectures):
        names = tuple(name for _, name in sorted((config.id2label or {}).items()))
        return Labels(names=names, origin="the model (to start a new head: new_head)")
    if isinstance(feature, ClassLabel):
        return Labels(names=tuple(feature.names), origin="the data set's own list of labels")
    if len(values) < 2:
        raise UserError(f"{where}: all rows have the label {values[0]!r}; nothing to tell apart")
    in_order = sorted(values) if all(isinstance(value, int) for value in values) else sorted(map(str, values))
    return Labels(names=tuple(map(str, in_order)), origin="the training data")


def _encode(
    rows: Dataset, name: str, labels: Labels, origin: str, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments
) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    column = arguments.label_column
    values = names_of(rows[column][:], rows.features[column], labels)
    rows = rows.add_column(_CLASS_ID, labels.ids(values, f"{origin}, column {column!r},"))

    def encode(batch: Batch) -> Batch:
        pair = () if arguments.text_pair_column is None else (texts(batch, arguments.text_pair_column),)
        encoded = tokenizer(
            texts(batch, arguments.text_column),
            *pair,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,  # without padding it is all ones; the collator makes it
        )
        return {**encoded, "labels": batch[_CLASS_ID], CUT: rows_cut(encoded, limit)}

    return encode_rows(rows, encode, name=name, limit=limit, workers=arguments.preprocessing_num_workers)


def names_of(values: Iterable[Any], feature: Any, labels: Labels) -> list[Any]:
    """Return labels as names, where the column's ``feature`` has ids; an id out of range stays, to be reported."""
    names = feature.names if isinstance(feature, ClassLabel) else ()
    if all(re.fullmatch(r"LABEL_\d+", name) for name in labels.names):
        names = labels.names  # the model was saved without names for its classes: its ids are all there is
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]


def only_logits(logits: Any, _labels: Any) -> Any:
    """Return the logits; some models return hidden states with them, which evaluation would pile up."""
    return logits[0] if isinstance(logits, tuple) else logits


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return accuracy, macro F1 and mean loss of ``predictions`` [rows, classes]."""
    logits, references = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    predictions = logits.argmax(axis=-1)
    return {
        **Accuracy().compute(predictions=predictions, references=references),
        **MacroF1().compute(predictions=predictions, references=references),
        "mean_loss": cross_entropy(logits, references),
    }


def _listed(names: Iterable[str], most: int = 10) -> str:
    quoted = [repr(name) for name in names]
    return ", ".join(quoted[:most]) + (f", ... ({len(quoted)} in all)" if len(quoted) > most else "")
