"""Short runs of tiny float64 models whose rows may lie end to end, and what they are compared with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.helpers import (
    VOCABULARY,
    Pad,
    Recorder,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    token_rows,
    whole_gradients,
    with_labels,
)
from tests.test_equivalence import masked_rows

IN_FLOAT64 = 1e-12
FLOAT32_INSIDE = 1e-7
LOSS_IN_FLOAT32 = 1e-6

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIRST_PASSES = 4
"""Passes of training mode before the first step, in which rows are compared: the whole, and three parts of it."""

WINDOW = 5
"""Tokens that attention with a window looks back, fewer than most rows have."""

CAUSAL = with_labels(token_rows(), masked_prefix)
MASKED = masked_rows()


def qwen2() -> Any:
    return build(Qwen2ForCausalLM, Qwen2Config(**SIZES, **SPECIAL, num_key_value_heads=1))


def mistral() -> Any:
    config = MistralConfig(**SIZES, **SPECIAL, num_key_value_heads=2, sliding_window=WINDOW)
    return build(MistralForCausalLM, config)


def modernbert() -> Any:
    config = ModernBertConfig(**SIZES, **SPECIAL, local_attention=2 * WINDOW, cls_token_id=1, sep_token_id=2)
    return build(ModernBertForMaskedLM, config)


def jamba() -> Any:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
    return build(JambaForCausalLM, JambaConfig(**SIZES, **SPECIAL, **layers, num_key_value_heads=2))


def mamba() -> Any:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return build(MambaForCausalLM, MambaConfig(**sizes, **SPECIAL))


def bloom() -> Any:
    return build(BloomForCausalLM, BloomConfig(**SPECIAL, hidden_size=16, n_layer=2, n_head=2))


def llama() -> Any:
    return build(LlamaForCausalLM, llama_config())


def token_classes() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]])


def next_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """In float64, where that of transformers is rounded to float32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def plain(model: Any, rows: list[dict[str, Any]], loss: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch, padded, with stock attention."""
    inputs = Pad()(rows)
    if loss is None:
        return whole_gradients(model, lambda m: m(**inputs).loss)
    labels = inputs.pop("labels")
    return whole_gradients(model, lambda m: loss(m(**inputs), labels))


def trained(model: Any, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> Any:
    """A trainer after one step; gradients are in `trainer.recorder`."""
    recorder = Recorder()
    trainer = mbp_trainer(model, rows, folder, **{"callbacks": [recorder], "on_inexact": "error", **changes})
    trainer.recorder = recorder
    trainer.train()
    return trainer


def assert_whole(trainer: Any, expected: tuple[float, dict[str, torch.Tensor]], bound: float) -> None:
    loss, gradients = expected
    assert relative_error(gradients, trainer.recorder.gradients[0]) < bound
    assert trainer.recorder.logs[0]["loss"] == pytest.approx(loss, rel=LOSS_IN_FLOAT32)


class Calls:
    """Which inputs a model gets in training, and in evaluation."""

    def __init__(self, model: Any) -> None:
        self.training: list[dict[str, Any]] = []
        self.evaluation: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, kwargs: Any) -> None:
        (self.training if model.training and torch.is_grad_enabled() else self.evaluation).append(dict(kwargs))
