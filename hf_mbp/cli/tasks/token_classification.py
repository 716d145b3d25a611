"""One tag for each word: names in a sentence, parts of speech, how a word is written."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.entities import are_entity_tags, entity_f1
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import Accuracy, MacroF1, cross_entropy
from hf_mbp.cli.models import length_limit, require_offsets
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.classification import Labels, choose_labels, load_classifier, names_of, only_logits
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, encode_splits, rows_cut

# What the loss of transformers leaves out.
IGNORED = -100


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Map tags to ids, tokenize, load a model with one output a tag for each token."""
    require_columns(splits, {"words_column": data_arguments.words_column, "tags_column": data_arguments.tags_column})
    require_offsets(tokenizer)
    labels = find_tags(splits, data_arguments, config, new_head=model_arguments.starts_new_head)
    encode = partial(_encode, labels=labels, tokenizer=tokenizer, arguments=data_arguments)
    train, validation = encode_splits(splits, encode)
    model = load_classifier(AutoModelForTokenClassification, labels, model_arguments)
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        collator=DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED),
        compute_metrics=TagMetrics(names=labels.names),
        preprocess_logits_for_metrics=only_logits,
    )


def find_tags(splits: Splits, arguments: DataArguments, config: PreTrainedConfig, *, new_head: bool) -> Labels:
    """Return the tags in the order of their ids: the model's, those that the data set names, or those found.

    Raises:
        UserError: words and tags that are no lists of equal length, or tags that are no names or integers.
    """
    for rows, origin in ((splits.train, splits.train_origin), (splits.validation, splits.validation_origin)):
        if rows is not None:
            _check_rows(rows, origin, arguments)
    values = sorted(set(chain.from_iterable(splits.train[arguments.tags_column])), key=str)
    feature = _feature_of_tags(splits.train, arguments)
    where = f"{splits.train_origin}, column {arguments.tags_column!r}"
    if not values:
        raise UserError(f"{where}: there is no tag; all lists are empty")
    return choose_labels(values, feature, config, head="ForTokenClassification", new_head=new_head, where=where)


def _check_rows(rows: Dataset, origin: str, arguments: DataArguments) -> None:
    for option, kinds, wanted in (
        ("words_column", (str,), "words"),
        ("tags_column", (str, int), "names or integers"),
    ):
        column = getattr(arguments, option)
        for index, values in enumerate(rows[column]):
            if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
                raise UserError(
                    f"{origin}, column {column!r} (option {option}): row {index} is {values!r:.60}, but must be a list"
                    f" of {wanted}"
                )
    for index, (words, tags) in enumerate(zip(rows[arguments.words_column], rows[arguments.tags_column], strict=True)):
        if len(words) != len(tags):
            raise UserError(
                f"{origin}: row {index} has {len(words)} words ({arguments.words_column!r}) and {len(tags)} tags"
                f" ({arguments.tags_column!r}); each word needs one"
            )


def _feature_of_tags(rows: Dataset, arguments: DataArguments) -> Any:
    """Return what the data set knows of a single tag: its names, if it is a ``ClassLabel``."""
    return getattr(rows.features[arguments.tags_column], "feature", None)


def _encode(part: Part, *, labels: Labels, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    rows, origin = part.rows, part.origin
    feature = _feature_of_tags(rows, arguments)
    where = f"{origin}, column {arguments.tags_column!r},"
    # All tags at once, so that every unknown one is told
    labels.ids(set(names_of(set(chain.from_iterable(rows[arguments.tags_column])), feature, labels)), where)

    def encode(batch: Batch) -> Batch:
        rows_of_words = [words for words in batch[arguments.words_column] if any(words)]
        rows_of_tags = [
            labels.ids(names_of(tags, feature, labels), where)
            for words, tags in zip(batch[arguments.words_column], batch[arguments.tags_column], strict=True)
            if any(words)
        ]
        if not rows_of_words:
            return {"input_ids": [], "labels": [], CUT: []}
        encoded = tokenizer(
            [" ".join(words) for words in rows_of_words],
            truncation=limit is not None,
            max_length=limit,
            return_offsets_mapping=True,
            return_attention_mask=False,  # without padding it is all ones; the collator makes it
            return_token_type_ids=False,  # there is one text
        )
        token_labels = [
            label_tokens(words, tags, offsets)
            for words, tags, offsets in zip(rows_of_words, rows_of_tags, encoded["offset_mapping"], strict=True)
        ]
        return {"input_ids": encoded["input_ids"], "labels": token_labels, CUT: rows_cut(encoded, limit)}

    return encode_rows(part, encode, limit=limit, workers=arguments.preprocessing_num_workers)


def label_tokens(words: Sequence[str], tags: Sequence[int], offsets: Iterable[tuple[int, int]]) -> list[int]:
    """Return a label for each token: the tag of the word whose first piece it is, else -100.

    Args:
        words: joined by blanks they are the text. So each is tokenized as in a text, which some tokenizers do
            otherwise if they are given lists of words.
        tags: one of each word.
        offsets: where in the text each token starts and ends; special tokens are empty.

    >>> label_tokens(["a", "banana"], [5, 6], [(0, 0), (0, 1), (2, 5), (5, 8), (0, 0)])
    [-100, 5, 6, -100, -100]
    """
    labels = []
    previous = None
    for word in _words_of_tokens(words, offsets):
        labels.append(IGNORED if word is None or word == previous else tags[word])
        previous = previous if word is None else word
    return labels


def _words_of_tokens(words: Sequence[str], offsets: Iterable[tuple[int, int]]) -> Iterator[int | None]:
    """Yield the index of each token's word: the one with its last character, since blanks may belong to a token."""
    starts = list(accumulate((len(word) + 1 for word in words[:-1]), initial=0))
    for start, end in offsets:
        index = bisect_right(starts, end - 1) - 1
        is_in_word = start < end and end <= starts[index] + len(words[index])
        yield index if is_in_word else None


@dataclass(frozen=True, kw_only=True)
class TagMetrics:
    """Measures predicted tags, of the words that were not cut off.

    ``accuracy`` is the share of words whose tag is right, ``f1`` the mean of the tags' F1 (see
    :class:`~hf_mbp.cli.metrics.MacroF1`). Where the tags mark entities (B-, I-, O), ``entity_f1`` is the F1 over whole
    entities (see :func:`~hf_mbp.cli.entities.entity_f1`).
    """

    names: tuple[str, ...]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics and the mean loss of ``predictions`` [rows, width, tags]."""
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        counted, predicted = labels != IGNORED, logits.argmax(axis=-1)
        metrics = {
            **Accuracy().compute(predictions=predicted[counted], references=labels[counted]),
            **MacroF1().compute(predictions=predicted[counted], references=labels[counted]),
            "mean_loss": cross_entropy(logits[counted], labels[counted]),
        }
        if are_entity_tags(self.names):
            metrics["entity_f1"] = entity_f1(self._tags(predicted, counted), self._tags(labels, counted))
        return metrics

    def _tags(self, ids: Any, counted: Any) -> list[list[str]]:
        return [[self.names[i] for i in row[mask]] for row, mask in zip(ids, counted, strict=True)]
