"""Pairs of texts that belong together: to find the passage of a query among all others."""

from __future__ import annotations

from functools import partial

from datasets import Dataset
from transformers import AutoModel, PreTrainedConfig, PreTrainedTokenizerBase

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.embedding_trainer import SIDES, Embedder, EmbeddingTrainer, PairCollator, retrieval_metrics
from hf_mbp.cli.models import length_limit, load_model
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, rows_cut, texts


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,  # noqa: ARG001
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize both sides, load a model without a head."""
    columns = {f"{side}_column": getattr(data_arguments, f"{side}_column") for side in SIDES}
    require_columns(splits, columns)
    train, validation = splits.encoded(partial(_encode, tokenizer=tokenizer, arguments=data_arguments))
    model = load_model(AutoModel, model_arguments)
    pooler = getattr(model, "pooler", None)
    if pooler is not None:  # not part of the embedding; several processes refuse what gets no gradient
        pooler.requires_grad_(False)
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        collator=PairCollator(tokenizer),
        compute_metrics=retrieval_metrics,
        model_with_loss=Embedder(model),
        inputs_of=Embedder.inputs,
        make_trainer=partial(EmbeddingTrainer, similarity_scale=data_arguments.similarity_scale),
    )


def _encode(part: Part, *, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)

    def encode(batch: Batch) -> Batch:
        sides = {
            side: tokenizer(
                texts(batch, getattr(arguments, f"{side}_column")),
                truncation=limit is not None,
                max_length=limit,
                return_attention_mask=False,  # without padding it is all ones; the collator makes it
                return_token_type_ids=False,  # there is one text
            )
            for side in SIDES
        }
        was_cut = [any(cut) for cut in zip(*(rows_cut(side, limit) for side in sides.values()), strict=True)]
        return {**{f"{side}_input_ids": encoded["input_ids"] for side, encoded in sides.items()}, CUT: was_cut}

    return encode_rows(part, encode, limit=limit, workers=arguments.preprocessing_num_workers)
