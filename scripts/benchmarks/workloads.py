"""Workloads: a model, its rows, and how they are padded."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

DATA = Path(__file__).resolve().parents[2] / "recipes" / "data"

Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Rows of an optimizer step: `rows_per_batch x batches`, `per_device_train_batch_size x accumulation`.

    Example:
        >>> Shape.parse("8x4").rows_per_step
        32
    """

    rows_per_batch: int
    batches: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `8x4`; raises `ValueError` for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise ValueError(
                f"{text!r} is not per_device_train_batch_size x gradient_accumulation_steps; write for example 8x4"
            )
        return cls(rows_per_batch=int(match[1]), batches=int(match[2]))

    @property
    def rows_per_step(self) -> int:
        """Rows of a mini-batch."""
        return self.rows_per_batch * self.batches

    def __str__(self) -> str:
        return f"{self.rows_per_batch}x{self.batches}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and as many row lengths as there are rows in an epoch; `lengths` and `model` make them anew, alike.

    The label of a row is whether its first token is even; a language model is to predict the next token instead.
    """

    name: str
    what: str
    lengths: Callable[[], list[int]]
    model: Callable[[], Any]
    vocabulary: int
    shapes: tuple[str, ...]
    is_language_model: bool = False

    def rows(self) -> Rows:
        """Rows of random tokens."""
        return self._rows_of(self.lengths())

    def equal_rows(self) -> Rows:
        """As many rows, all of the mean length: nearly as many tokens, and nothing to pad."""
        lengths = self.lengths()
        return self._rows_of([round(sum(lengths) / len(lengths))] * len(lengths))

    def _rows_of(self, lengths: list[int]) -> Rows:
        random = np.random.default_rng(0)
        tokens = [random.integers(5, self.vocabulary, length).tolist() for length in lengths]
        return [{"input_ids": ids} | ({} if self.is_language_model else {"labels": ids[0] % 2}) for ids in tokens]


def pad(rows: Rows) -> dict[str, torch.Tensor]:
    """Pads with zeros to the longest row; where rows have no labels, their tokens are the labels."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    has_labels = "labels" in rows[0]
    labels = torch.tensor([row["labels"] for row in rows]) if has_labels else ids.masked_fill(ids == 0, -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def lognormal(count: int, mean: float, sigma: float, low: int, high: int) -> list[int]:
    """Lengths of text: many short, a few long."""
    random = np.random.default_rng(0)
    return [int(length) for length in np.clip(random.lognormal(mean, sigma, count), low, high)]


def lengths_of_texts(file: str, field: str, count: int) -> list[int]:
    """Of the first texts of a recipe's data: words and punctuation marks, clipped to 8..256."""
    with lzma.open(DATA / file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)[field] for _, line in zip(range(count), lines, strict=False)]
    return [min(256, max(8, len(re.findall(r"\w+|[^\w\s]", text)))) for text in texts]


def small_llama() -> Any:
    """14 million parameters."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=1024,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def small_bert() -> Any:
    """14 million parameters."""
    config = BertConfig(
        vocab_size=8000,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    )
    return BertForSequenceClassification(config)


def tiny_bert() -> Any:
    """For a first try."""
    config = BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return BertForSequenceClassification(config)


SMALL_BERT = "BERT of 6 layers x 384, 12 heads, vocabulary 8,000, sequence classification"

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="lognormal",
            what=f"{SMALL_BERT}; 192 rows of lognormal(4.2, 0.8) lengths, clipped to 8..512",
            lengths=lambda: lognormal(192, 4.2, 0.8, 8, 512),
            model=small_bert,
            vocabulary=8000,
            shapes=("4x16", "8x8", "64x1"),
        ),
        Workload(
            name="equal",
            what=f"{SMALL_BERT}; 192 rows of 128 tokens each, as a control: nothing to gain",
            lengths=lambda: [128] * 192,
            model=small_bert,
            vocabulary=8000,
            shapes=("8x8",),
        ),
        Workload(
            name="spam",
            what=f"{SMALL_BERT}; lengths of 128 e-mails of SpamAssassin, in words and punctuation marks, cut at 256",
            lengths=lambda: lengths_of_texts("spam-train.jsonl.xz", "text", 128),
            model=small_bert,
            vocabulary=8000,
            shapes=("8x8", "64x1"),
        ),
        Workload(
            name="jargon",
            what="Llama of 6 layers x 384, 6 heads, vocabulary 8,000, language modelling; lengths of 128 entries of "
            "the Jargon File, in words and punctuation marks, cut at 256",
            lengths=lambda: lengths_of_texts("jargon-train.jsonl.xz", "definition", 128),
            model=small_llama,
            vocabulary=8000,
            shapes=("8x8", "64x1"),
            is_language_model=True,
        ),
        Workload(
            name="tiny",
            what="BERT of 2 layers x 32; 24 rows of lognormal(2.5, 0.8) lengths, clipped to 4..48; for a first try",
            lengths=lambda: lognormal(24, 2.5, 0.8, 4, 48),
            model=tiny_bert,
            vocabulary=100,
            shapes=("2x4", "8x1"),
        ),
    )
}
"""Another one needs an entry here. All rows of a workload are an epoch, which has to be whole optimizer steps."""
