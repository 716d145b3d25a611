"""The gradient and the logged loss are those of plain PyTorch on the whole batch, for every head and loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from hf_mbp import MBPTrainer
from tests.helpers import (
    VOCABULARY,
    Pad,
    Recorder,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    whole_gradients,
    with_labels,
)

HEAD_IN_FLOAT32 = 3e-6
IN_FLOAT64 = 1e-12


def bart_config(**changes: Any) -> BartConfig:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    dropout = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    return BartConfig(**{**sizes, **heads, **dropout, "vocab_size": VOCABULARY, "pad_token_id": 0, **changes})


def opt_config() -> OPTConfig:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.0}
    return OPTConfig(**sizes, vocab_size=VOCABULARY, word_embed_proj_dim=16, max_position_embeddings=64, pad_token_id=0)


def causal_rows() -> list[dict[str, Any]]:
    return with_labels(token_rows(), masked_prefix)


def seq2seq_rows() -> list[dict[str, Any]]:
    targets = token_rows(seed=7, low=2, high=12)
    return with_labels(token_rows(), lambda index, row: targets[index]["input_ids"])


def class_rows() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: index % 3)


def masked_rows() -> list[dict[str, Any]]:
    def label(index: int, row: dict[str, Any]) -> list[int]:
        return [token if (index + position) % 4 == 0 else -100 for position, token in enumerate(row["input_ids"])]

    return with_labels(token_rows(), label)


def choice_rows() -> list[dict[str, Any]]:
    first, second = token_rows(), token_rows(seed=3)
    return [
        {"input_ids": [a["input_ids"], b["input_ids"]], "labels": index % 2}
        for index, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def pad_choices(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    flat = [{"input_ids": c, "attention_mask": [1] * len(c)} for row in rows for c in row["input_ids"]]
    padded = {key: value.view(len(rows), 2, -1) for key, value in Pad()(flat).items()}
    return {**padded, "labels": torch.tensor([row["labels"] for row in rows])}


def answer_rows() -> list[dict[str, Any]]:
    return [
        {**row, "start_positions": index % 3, "end_positions": len(row["input_ids"]) - 1}
        for index, row in enumerate(token_rows())
    ]


HEADS: dict[str, tuple[Any, Any, Callable[[], list[dict[str, Any]]], Any, float]] = {
    "gpt2": (GPT2LMHeadModel, gpt2_config, causal_rows, Pad(), HEAD_IN_FLOAT32),
    "llama": (LlamaForCausalLM, llama_config, causal_rows, Pad(), HEAD_IN_FLOAT32),
    "opt": (OPTForCausalLM, opt_config, causal_rows, Pad(), HEAD_IN_FLOAT32),
    "bart_causal": (BartForCausalLM, bart_config, causal_rows, Pad(), IN_FLOAT64),
    "masked_lm": (BertForMaskedLM, bert_config, masked_rows, Pad(), IN_FLOAT64),
    "single_label": (
        BertForSequenceClassification,
        lambda: bert_config(num_labels=3),
        class_rows,
        Pad(),
        IN_FLOAT64,
    ),
    "multi_label": (
        BertForSequenceClassification,
        lambda: bert_config(num_labels=3, problem_type="multi_label_classification"),
        lambda: with_labels(token_rows(), lambda index, row: [float(index >> bit & 1) for bit in range(3)]),
        Pad(),
        HEAD_IN_FLOAT32,
    ),
    "regression": (
        BertForSequenceClassification,
        lambda: bert_config(num_labels=1),
        lambda: with_labels(token_rows(), lambda index, row: -100.0 if index % 4 == 0 else index / 8),
        Pad(),
        HEAD_IN_FLOAT32,
    ),
    "token_classification": (
        BertForTokenClassification,
        lambda: bert_config(num_labels=4),
        lambda: with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]]),
        Pad(),
        IN_FLOAT64,
    ),
    "question_answering": (BertForQuestionAnswering, bert_config, answer_rows, Pad(), IN_FLOAT64),
    "multiple_choice": (BertForMultipleChoice, bert_config, choice_rows, pad_choices, IN_FLOAT64),
    "t5": (T5ForConditionalGeneration, t5_config, seq2seq_rows, Pad(), IN_FLOAT64),
    "bart": (BartForConditionalGeneration, bart_config, seq2seq_rows, Pad(), IN_FLOAT64),
}


def run(trainer: MBPTrainer) -> tuple[float, dict[str, torch.Tensor], float]:
    """One step: logged loss, gradients, micro-batches run."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    logs = trainer.state.log_history[0]
    return logs["loss"], recorder.gradients[0], logs["mbp_micro_batches"]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("head", HEADS)
def test_head_equals_the_whole_batch(head: str, accumulation: int, tmp_path: Path) -> None:
    model_class, config, make_rows, collate, bound = HEADS[head]
    model, rows = build(model_class, config()), make_rows()
    whole_loss, expected = whole_gradients(model, lambda m: m(**collate(rows)).loss)
    trainer = mbp_trainer(
        model,
        rows,
        tmp_path,
        data_collator=collate,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        on_inexact="error",
    )
    loss, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches >= 2
    assert relative_error(expected, gradients) < bound
    assert loss == pytest.approx(whole_loss, rel=max(bound, 1e-7))
