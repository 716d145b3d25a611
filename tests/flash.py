"""Flash attention in a few lines of PyTorch, in the place of its kernels, which need a GPU: for transformers' own code.

What transformers makes of masks, positions and boundaries before it calls a kernel is what runs in the tests.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import modeling_flash_attention_utils as upstream

NAME = "flash_attention_2"


class Kernels:
    """Attention over padded and over concatenated rows; counts the calls of each."""

    def __init__(self) -> None:
        self.padded = 0
        self.boundaries: list[list[int]] = []

    def flash(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        """`[rows, width, heads, size]`, every row as long as the others."""
        self.padded += 1
        rows = [_attention(*row, softmax_scale, causal, window_size) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def varlen(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:
        """`[tokens, heads, size]`, rows from one boundary to the next."""
        ends = cu_seqlens_q.tolist()
        assert cu_seqlens_q.dtype == torch.int32
        assert ends == cu_seqlens_k.tolist()
        assert ends[-1] == len(q)
        assert max_seqlen_q == max_seqlen_k == max(b - a for a, b in pairwise(ends))
        self.boundaries.append(ends)
        spans = [slice(a, b) for a, b in pairwise(ends)]
        return torch.cat([_attention(q[s], k[s], v[s], softmax_scale, causal, window_size) for s in spans])


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, causal: bool, window: tuple[int, int]
) -> torch.Tensor:
    """Of one row, `[tokens, heads, size]`."""
    groups = q.shape[1] // k.shape[1]
    k, v = (value.repeat_interleave(groups, dim=1) for value in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    place = torch.arange(len(q))
    distance = place[:, None] - place[None, :]  # how far a key lies before its query
    left, right = (len(q) if size < 0 else size for size in window)
    seen = (distance <= left) & (distance >= (0 if causal else -right))
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def install(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Has `flash_attention_2` of transformers call these."""
    kernels = Kernels()
    replaced: dict[str, Any] = {
        "_loaded_implementation": NAME,
        "_flash_fn": kernels.flash,
        "_flash_varlen_fn": kernels.varlen,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": upstream._pad_input,
        "_unpad_fn": upstream._unpad_input,
        "_process_flash_kwargs_fn": upstream._lazy_define_process_function(kernels.varlen),
        "_process_with_kvcache_kwargs_fn": dict,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(upstream, name, value, raising=False)
    return kernels


def with_flash(model: Any) -> Any:
    """The model with flash attention, which it would refuse to be loaded with on a CPU."""
    model.config._attn_implementation = NAME
    return model
