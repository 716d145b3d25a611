"""Dropout is taken out of training mode, wherever it hides; what else is random is left out and said."""

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
)

from hf_mbp import check_equivalence
from hf_mbp.training_mode import training_mode_without_dropout
from hf_mbp.undisturbed import undisturbed
from tests.helpers import VOCABULARY, bert_config, build, gpt2_config, mbp_trainer, token_rows, with_labels

DROPOUT = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
LAYERS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def classes() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: index % 3)


class Recurrent(BertForSequenceClassification):
    """With dropout between the layers of an LSTM, in torch's own attention, and by functions with a rate of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.recurrent = torch.nn.LSTM(size, size, num_layers=2, dropout=0.5, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(size, 2, dropout=0.5, batch_first=True)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        embedded = self.recurrent(self.get_input_embeddings()(input_ids))[0]
        hidden = [attention_mask == 0, embedded.unsqueeze(1)]
        embedded = embedded + self.attention(embedded, embedded, embedded, key_padding_mask=hidden[0])[0]
        allowed = attention_mask[:, None, None, :].bool()
        embedded = embedded + functional.scaled_dot_product_attention(*[hidden[1]] * 3, allowed, 0.5)[:, 0]
        for drop in (functional.dropout, functional.alpha_dropout, functional.feature_alpha_dropout):
            embedded = drop(embedded, 0.5, self.training)
        embedded = torch.dropout(embedded, 0.5, self.training)
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels)


def bart(**changes: Any) -> Any:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3}
    rates = {"dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "classifier_dropout": 0.5}
    return build(BartForSequenceClassification, BartConfig(**sizes, **heads, **special, **rates, **changes))


def sentences() -> list[dict[str, Any]]:
    """That end with the token which BART's classifier looks for."""
    return [
        {**row, "input_ids": [*row["input_ids"][:-1], 2]} for row in with_labels(token_rows(), lambda i, row: i % 3)
    ]


def jittery() -> Any:
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.5}
    config = MixtralConfig(**LAYERS, **experts, vocab_size=VOCABULARY, pad_token_id=0, num_labels=3)
    config._experts_implementation = "eager"
    return build(MixtralForSequenceClassification, config).float()


MODELS: dict[str, tuple[Any, Any]] = {
    "modules": (lambda: build(BertForSequenceClassification, bert_config(num_labels=3, **DROPOUT)), classes),
    "eager attention": (
        lambda: build(BertForSequenceClassification, bert_config(num_labels=3, **DROPOUT, attn_implementation="eager")),
        classes,
    ),
    "functions": (lambda: build(Recurrent, bert_config(num_labels=3, **DROPOUT)), classes),
    "rates of layers": (bart, sentences),
    "left-out layers": (lambda: bart(encoder_layerdrop=0.5, decoder_layerdrop=0.5), sentences),
    "gpt2": (
        lambda: build(GPT2ForSequenceClassification, gpt2_config(num_labels=3, attn_pdrop=0.5, resid_pdrop=0.5)),
        classes,
    ),
    "jitter of routers": (jittery, classes),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_with_dropout_are_compared_in_training_mode(kind: str, tmp_path: Path) -> None:
    model, rows = MODELS[kind]
    report = check_equivalence(mbp_trainer(model(), rows(), tmp_path))
    assert report.is_exact, report
    assert report.is_training_mode
    assert report.reservations == ()


def test_checkpointed_activations_do_not_bring_dropout_back(tmp_path: Path) -> None:
    model = build(BertForSequenceClassification, bert_config(num_labels=3, **DROPOUT))
    trainer = mbp_trainer(model, classes(), tmp_path)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    flags = [vars(module).get("gradient_checkpointing") for module in model.modules()]
    assert any(flags)
    calls = []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    report = check_equivalence(trainer)
    assert report.is_exact
    assert report.is_training_mode
    assert sum(calls) == 1 + report.num_micro_batches  # and none again in the backward pass
    assert [vars(module).get("gradient_checkpointing") for module in model.modules()] == flags


def test_dropout_is_back_afterwards() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.5)).eval()
    with training_mode_without_dropout(model, []):
        assert model.training
        assert functional.dropout(torch.ones(9), 0.5).tolist() == [1.0] * 9
    assert 0 < int((functional.dropout(torch.ones(999), 0.5) == 0).sum()) < 999


def test_modules_do_not_drop_in_other_threads_either() -> None:
    """As those in which a GPU computes checkpointed activations again, and which know nothing of the function mode."""
    model, outputs = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.AlphaDropout(0.5)), []
    with undisturbed([model]):
        with training_mode_without_dropout(model, []):
            thread = Thread(target=lambda: outputs.append(model(torch.ones(9))))
            thread.start()
            thread.join()
        assert outputs[0].tolist() == [1.0] * 9
    assert [module.p for module in model] == [0.5, 0.5]


class Masks(BertForSequenceClassification):
    """Leaves out tokens at random in training mode, as SpecAugment does, with a rate that is nowhere to be seen."""

    def forward(self, **inputs: Any) -> Any:
        if self.training:
            kept = torch.rand(inputs["input_ids"].shape) < 0.7
            inputs["input_ids"] = inputs["input_ids"] * kept
        return super().forward(**inputs)


def test_random_parts_of_training_mode_are_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = mbp_trainer(build(Masks, bert_config(num_labels=3)), classes(), tmp_path, on_inexact="error")
    report = check_equivalence(trainer)
    assert report.is_exact
    assert not report.is_training_mode
    assert "in evaluation mode: random parts of training mode were left out" in str(report)
    trainer.train()
    assert "exact, in evaluation mode: random parts of training mode were left out: split" in capsys.readouterr().out
