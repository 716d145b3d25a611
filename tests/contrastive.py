"""Pairs of texts, a tiny model that embeds them, and a contrastive loss, for the tests of two passes."""

from typing import Any

import torch
from transformers import BertModel

from hf_mbp import MBPTrainer
from tests.helpers import bert_config, build, token_rows

SCALE = 5.0


def pair_rows(count: int = 16) -> list[dict[str, Any]]:
    """Queries and longer passages, of uneven lengths."""
    queries, passages = token_rows(count, seed=1, high=8), token_rows(count, seed=2, low=4)
    return [
        {f"{name}_{key}": value for name, row in (("query", query), ("passage", passage)) for key, value in row.items()}
        for query, passage in zip(queries, passages, strict=True)
    ]


def bert(**changes: Any) -> Any:
    return build(BertModel, bert_config(**changes))


def embedded(model: Any, inputs: dict[str, Any], name: str) -> torch.Tensor:
    """Means over the tokens, of length 1."""
    mask = inputs[f"{name}_attention_mask"]
    hidden = model(input_ids=inputs[f"{name}_input_ids"], attention_mask=mask).last_hidden_state
    means = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return torch.nn.functional.normalize(means, dim=-1)


def in_batch_negatives(embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    queries, passages = embeddings
    return torch.nn.functional.cross_entropy(SCALE * queries @ passages.T, torch.arange(len(queries)))


class Contrastive(MBPTrainer):
    """In-batch negatives; notes the embeddings of both passes."""

    def embed_rows(self, model: Any, inputs: dict[str, Any]) -> Any:
        embeddings = embedded(model, inputs, "query"), embedded(model, inputs, "passage")
        self.seen = [*getattr(self, "seen", []), (torch.is_grad_enabled(), embeddings[0].detach().clone())]
        return embeddings

    def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
        return in_batch_negatives(embeddings)
