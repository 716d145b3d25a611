"""One label for each text, or each pair of texts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import say
from hf_mbp.cli.models import length_limit
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.classification import Labels, compute_metrics, find_labels, load_classifier, only_logits
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, encode_splits, rows_cut, texts

# A column of ours beside the user's; the name must not be one of theirs.
_CLASS_ID = "hf_mbp_class_id"
_HEAD = "ForSequenceClassification"


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
    labels = find_labels(
        splits, data_arguments.label_column, config, head=_HEAD, new_head=model_arguments.starts_new_head
    )
    say(str(labels))
    encode = partial(_encode, labels=labels, tokenizer=tokenizer, arguments=data_arguments)
    train, validation = encode_splits(splits, encode)
    model = load_classifier(AutoModelForSequenceClassification, labels, model_arguments)
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


def _encode(part: Part, *, labels: Labels, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    class_ids = labels.ids_of_rows(part.rows, arguments.label_column, part.origin)
    rows = part.rows.add_column(_CLASS_ID, class_ids)

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

    return encode_rows(replace(part, rows=rows), encode, limit=limit, workers=arguments.preprocessing_num_workers)
