"""Trains embeddings with in-batch negatives, in two passes, and counts how often the right text is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import DataCollatorWithPadding, EvalPrediction, PreTrainedTokenizerBase

from hf_mbp.cli.trainers import FinetuneTrainer

SIDES = ("query", "passage")


class PairCollator:
    """Pads both sides of pairs, each to its own longest."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._pad = DataCollatorWithPadding(tokenizer)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``query_input_ids``, ``query_attention_mask`` and those of the passages; ``labels`` are all ones."""
        padded: dict[str, torch.Tensor] = {}
        for side in SIDES:
            inputs = self._pad([{"input_ids": row[f"{side}_input_ids"]} for row in rows])
            padded |= {f"{side}_{name}": inputs[name] for name in ("input_ids", "attention_mask")}
        return {**padded, "labels": torch.ones(len(rows), dtype=torch.long)}  # without labels nothing is measured


class EmbeddingTrainer(FinetuneTrainer):
    """A query is to be nearer to its own passage than to all others of the mini-batch, of all ranks.

    The embedding of a text is the mean of its tokens' last hidden states, at length 1. The loss is a cross-entropy over
    the similarities, times ``similarity_scale``.
    """

    def __init__(self, *args: Any, similarity_scale: float = 20.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.similarity_scale = similarity_scale
        self.args.remove_unused_columns = False  # the columns have other names than the arguments of the model
        self.label_names = ["labels"]

    def embed_rows(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Return the embeddings of queries and of passages, ``[rows, hidden]``."""
        return tuple(_mean_tokens(model, inputs, side) for side in SIDES)

    def loss_of_embeddings(self, embeddings: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Return the cross-entropy of finding each query's passage among all."""
        queries, passages = embeddings
        scores = self.similarity_scale * queries @ passages.T
        return torch.nn.functional.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class Embedder(torch.nn.Module):
    """A model with a loss, any loss, to predict memory by: a pair takes no more than one text as long as both."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the mean of the last hidden states of ``[rows, width]``."""
        return {"loss": self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean()}

    @staticmethod
    def inputs(rows: int, width: int) -> dict[str, torch.Tensor]:
        """Return tokens without data."""
        tokens = torch.empty(rows, width, dtype=torch.long, device="meta")
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _mean_tokens(model: Any, inputs: dict[str, Any], side: str) -> torch.Tensor:
    mask = inputs[f"{side}_attention_mask"]
    hidden = model(input_ids=inputs[f"{side}_input_ids"], attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=-1)


def retrieval_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return how often a query's own passage is the nearest of all, and the mean of one over its place.

    ``predictions`` are the embeddings of queries and passages, ``[rows, hidden]`` each. Passages as near as the right
    one count as nearer.

    >>> queries, passages = np.eye(3), np.eye(3)[[0, 2, 1]]
    >>> metrics = retrieval_metrics(EvalPrediction(predictions=(queries, passages), label_ids=None))
    >>> round(metrics["recall_at_1"], 3), round(metrics["mrr"], 3)
    (0.333, 0.556)
    """
    queries, passages = prediction.predictions
    scores = np.asarray(queries) @ np.asarray(passages).T
    # Of a model that has diverged there are no numbers: then all are as near as the right one
    places = (~(scores < np.diagonal(scores)[:, None])).sum(axis=1)
    return {"recall_at_1": float(np.mean(places == 1)), "mrr": float(np.mean(1 / places))}
