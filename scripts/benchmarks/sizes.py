"""Sizes: models of known shapes, with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from benchmarks.rows import CLASSES, PADDING


@dataclass(frozen=True, kw_only=True)
class Size:
    """The shape of a transformer.

    A causal one is a Llama, whatever it is trained for; the others are that for language modelling only, and a BERT
    for classification.
    """

    name: str
    shape_of: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    is_causal: bool = False

    def model(self, *, is_language_model: bool) -> Any:
        """A model to train, on the CPU and in float32."""
        shape = {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "pad_token_id": PADDING,
            "use_cache": False,
        }
        if not (is_language_model or self.is_causal):
            return BertForSequenceClassification(BertConfig(**shape, num_labels=CLASSES))
        config = LlamaConfig(
            **shape, num_key_value_heads=self.kv_heads, max_position_embeddings=8192, tie_word_embeddings=True
        )
        if is_language_model:
            return LlamaForCausalLM(config)
        config.num_labels = CLASSES
        return LlamaForSequenceClassification(config)

    def what(self, *, is_language_model: bool) -> str:
        """The model in words."""
        kind = "Llama" if is_language_model or self.is_causal else "BERT"
        task = "language modelling" if is_language_model else "sequence classification"
        return (
            f"{kind} of {self.layers} layers x {self.hidden} ({self.shape_of}), {self.heads} heads, "
            f"vocabulary {self.vocabulary:,}, random weights, {task}"
        )


SIZES = {
    size.name: size
    for size in (
        Size(
            name="tiny",
            shape_of="tiny",
            layers=2,
            hidden=32,
            heads=2,
            kv_heads=2,
            intermediate=64,
            vocabulary=100,
        ),
        # Of MiniLM's 30,522 words a classifier only looks up those it is given, but its optimizer steps all of them.
        Size(
            name="minilm",
            shape_of="MiniLM's shape, with fewer words",
            layers=6,
            hidden=384,
            heads=12,
            kv_heads=12,
            intermediate=1536,
            vocabulary=8000,
        ),
        Size(
            name="smollm2",
            shape_of="SmolLM2-135M's shape",
            layers=30,
            hidden=576,
            heads=9,
            kv_heads=3,
            intermediate=1536,
            vocabulary=49152,
            is_causal=True,
        ),
        Size(
            name="llama1b",
            shape_of="Llama-3.2-1B's shape",
            layers=16,
            hidden=2048,
            heads=32,
            kv_heads=8,
            intermediate=8192,
            vocabulary=128256,
            is_causal=True,
        ),
    )
}
"""From small to large. The last one needs some 20 GB for weights, gradients and optimizer states in float32."""
