"""One label for each row, whatever the row is: what classifying texts and classifying images have in common."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

from hf_mbp.cli.arguments import ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import Accuracy, MacroF1, cross_entropy
from hf_mbp.cli.models import has_head, load_model
from hf_mbp.cli.splits import Splits


@dataclass(frozen=True, kw_only=True)
class Labels:
    """The class names in the order of their ids, and where they come from, for messages."""

    names: tuple[str, ...]
    origin: str

    def __str__(self) -> str:
        return f"labels: {len(self.names):,}, those of {self.origin}: {_listed(self.names)}"

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

    def ids_of_rows(self, rows: Dataset, column: str, origin: str) -> list[int]:
        """Return the class id of each row of a data set.

        Raises:
            UserError: a label that is none of the names.
        """
        values = names_of(rows[column][:], rows.features[column], self)
        return self.ids(values, f"{origin}, column {column!r},")


def find_labels(splits: Splits, column: str, config: PreTrainedConfig, *, head: str, new_head: bool) -> Labels:
    """Return the classes: the model's, if it is a classifier already; else those the data set names; else those found.

    It is one if its architecture ends in ``head``. Names found in the data are sorted, integers by value, so that ids
    do not depend on the order of the rows.

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
    return choose_labels(values, feature, config, head=head, new_head=new_head, where=where)


def choose_labels(
    values: Sequence[Any], feature: Any, config: PreTrainedConfig, *, head: str, new_head: bool, where: str
) -> Labels:
    """Return the classes of a model that has such a ``head``, of the data set's ``feature``, or the different values.

    Raises:
        UserError: there is one value only.
    """
    if not new_head and has_head(config, (head,)):
        names = tuple(name for _, name in sorted((config.id2label or {}).items()))
        return Labels(names=names, origin="the model (to start a new head: new_head)")
    if isinstance(feature, ClassLabel):
        return Labels(names=tuple(feature.names), origin="the data set's own list of labels")
    if len(values) < 2:
        raise UserError(f"{where}: all rows have the label {values[0]!r}; nothing to tell apart")
    in_order = sorted(values) if all(isinstance(value, int) for value in values) else sorted(map(str, values))
    return Labels(names=tuple(map(str, in_order)), origin="the training data")


def names_of(values: Iterable[Any], feature: Any, labels: Labels) -> list[Any]:
    """Return labels as names, where the column's ``feature`` has ids; an id out of range stays, to be reported."""
    names = feature.names if isinstance(feature, ClassLabel) else ()
    if all(re.fullmatch(r"LABEL_\d+", name) for name in labels.names):
        names = labels.names  # the model was saved without names for its classes: its ids are all there is
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in values]


def load_classifier(auto_class: Any, labels: Labels, arguments: ModelArguments) -> PreTrainedModel:
    """Load a model with one output for each class, of which one is right, whatever it was trained for before."""
    return load_model(
        auto_class,
        arguments,
        num_labels=len(labels.names),
        problem_type="single_label_classification",
        id2label=dict(enumerate(labels.names)),
        label2id={name: i for i, name in enumerate(labels.names)},
        ignore_mismatched_sizes=arguments.new_head,
    )


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
