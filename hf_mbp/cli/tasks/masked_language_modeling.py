"""Tokens that are hidden, to be told from those around them: how encoders learn a language."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import Perplexity
from hf_mbp.cli.models import length_limit, load_model, tell_new_head
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, encode_splits, rows_cut, texts

# What the loss of transformers leaves out.
IGNORED = -100
# Models that were saved with a head for masked tokens.
_HEADS = ("ForMaskedLM", "ForPreTraining")


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize, hide tokens of the validation rows once and for all, load a model that predicts hidden tokens."""
    require_columns(splits, {"text_column": data_arguments.text_column})
    if tokenizer.mask_token is None:
        raise UserError(
            f"the tokenizer of {model_arguments.model_name_or_path} has no mask token; use an encoder such as BERT, or"
            " task language_modeling"
        )
    tell_new_head(model_arguments, config, _HEADS, "predicts masked tokens")
    share = data_arguments.mlm_probability

    def encode(part: Part) -> Dataset:
        encoded = _encode(part, tokenizer=tokenizer, arguments=data_arguments)
        return hide_tokens(encoded, tokenizer, share) if part.name == "validation" else encoded

    train, validation = encode_splits(splits, encode)
    return TaskSetup(
        model=load_model(AutoModelForMaskedLM, model_arguments),
        train=train,
        validation=validation,
        collator=MaskingCollator(tokenizer, mlm_probability=share),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=sum_hidden,
    )


def _encode(part: Part, *, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)

    def encode(batch: Batch) -> Batch:
        written = [text for text in texts(batch, arguments.text_column) if text.strip()]  # text files have empty lines
        if not written:
            return {"input_ids": [], CUT: []}
        encoded = tokenizer(
            written,
            truncation=limit is not None,
            max_length=limit,
            return_attention_mask=False,  # without padding it is all ones; the collator makes it
            return_token_type_ids=False,  # there is one text
        )
        return {"input_ids": encoded["input_ids"], CUT: rows_cut(encoded, limit)}

    return encode_rows(part, encode, limit=limit, workers=arguments.preprocessing_num_workers)


def hide_tokens(rows: Dataset, tokenizer: PreTrainedTokenizerBase, share: float) -> Dataset:
    """Return rows whose tokens are hidden already, with labels on these; the same ones whatever a run's seed.

    So two evaluations ask the same questions. All that are chosen become the mask token, where training leaves some as
    they are and changes others: what could be read off the input says nothing of what the model can guess.
    """

    def hide(row: dict[str, Any], index: int) -> dict[str, list[int]]:
        ids: list[int] = row["input_ids"]
        special = tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        hidden = choose_hidden(special, share, seed=index)
        return {
            "input_ids": [tokenizer.mask_token_id if i in hidden else token for i, token in enumerate(ids)],
            "labels": [token if i in hidden else IGNORED for i, token in enumerate(ids)],
        }

    return rows.map(hide, with_indices=True, desc="masking validation rows")


def choose_hidden(special: Sequence[int], share: float, seed: int) -> set[int]:
    """Return a random ``share`` of the places where ``special`` is 0, at least one if there is one.

    >>> choose_hidden([1, 0, 1], 0.15, seed=0)
    {1}
    """
    places = [index for index, is_special in enumerate(special) if not is_special]
    number = min(len(places), max(1, round(share * len(places))))
    return set(random.Random(seed).sample(places, number))  # noqa: S311 - reproducible, not secret


class MaskingCollator(DataCollatorForLanguageModeling):
    """Hides tokens at random, anew in each epoch, but leaves rows as they are that have labels: those of evaluation."""

    def __call__(self, rows: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        """Return padded tensors of the rows."""
        if isinstance(rows[0], Mapping) and "labels" in rows[0]:
            padding = DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORED)
            return padding(rows, return_tensors=return_tensors)
        return super().__call__(rows, return_tensors=return_tensors)


def sum_hidden(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduce ``logits`` [rows, width, vocabulary] to [rows, 3]: negative log-likelihood, number, and number right.

    Evaluation would otherwise keep the logits of the whole evaluation set: 30,000 numbers a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack([_sum_row(row, row_labels) for row, row_labels in zip(logits, labels, strict=True)])


def _sum_row(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    counted = targets != IGNORED
    logits, targets = logits[counted].float(), targets[counted]
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return torch.stack([loss, counted.sum().to(loss), (logits.argmax(dim=-1) == targets).sum().to(loss)])


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return pseudo-perplexity, accuracy and mean loss of the hidden tokens, from the sums of each row.

    Pseudo-perplexity is ``exp`` of the mean negative log-likelihood of a hidden token. The number of Salazar et al.
    (2020) hides one token at a time, in as many passes as there are tokens; here a share of a row is hidden together,
    so that the numbers are larger, and comparable only with the same share and tokenizer.
    """
    sums = np.asarray(prediction.predictions)
    counts = sums[:, 1].astype(np.int64)
    result = Perplexity().compute(predictions=sums[:, 0], references=counts)
    return {
        "pseudo_perplexity": result["perplexity"],
        "accuracy": float(sums[:, 2].sum() / max(1, counts.sum())),
        "mean_loss": result["mean_loss"],
    }
