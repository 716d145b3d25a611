"""Prints how far the gradient of Trainer and of MBPTrainer is from that of plain PyTorch on the whole batch.

    python scripts/compare_gradients.py

Tiny random models in float64, 16 rows of uneven lengths, as 8 batches of 2 by gradient accumulation.
"""

import copy
import random
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mbp import MBPConfig, MBPTrainer

Row = dict[str, list[int]]
VOCABULARY = 50
BERT = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
GPT2 = GPT2Config(
    vocab_size=VOCABULARY,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
T5 = T5Config(
    vocab_size=VOCABULARY,
    d_model=16,
    d_kv=8,
    d_ff=32,
    num_layers=2,
    num_heads=2,
    dropout_rate=0.0,
    decoder_start_token_id=0,
)
HEADS: dict[str, tuple[Any, Any, Callable[[Row], Any]]] = {
    "causal LM (GPT-2)": (GPT2LMHeadModel, GPT2, lambda row: row["input_ids"]),
    "causal LM (Llama)": (LlamaForCausalLM, LLAMA, lambda row: row["input_ids"]),
    "masked LM (BERT)": (BertForMaskedLM, BERT, lambda row: [t if t % 4 == 0 else -100 for t in row["input_ids"]]),
    "text classification (BERT)": (BertForSequenceClassification, BERT, lambda row: row["input_ids"][0] % 2),
    "token classification (BERT)": (BertForTokenClassification, BERT, lambda row: [t % 2 for t in row["input_ids"]]),
    "translation (T5)": (T5ForConditionalGeneration, T5, lambda row: row["input_ids"][::2]),
}


class GradientRecorder(TrainerCallback):
    """Keeps the gradient that the optimizer is about to use."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Called by the training loop."""
        self.gradient = flat_gradient(model)


def flat_gradient(model: torch.nn.Module) -> torch.Tensor:
    """All gradients in one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def pad(rows: list[Row]) -> dict[str, torch.Tensor]:
    """Rows as one batch, padded on the right."""
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] for row in rows])
        if isinstance(rows[0][key], int)
        else torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[key]) for row in rows], batch_first=True, padding_value=fill[key]
        )
        for key in rows[0]
    }


def make_rows(label: Callable[[Row], Any]) -> list[Row]:
    """16 rows of 3 to 30 random tokens."""
    generator = random.Random(0)  # noqa: S311
    tokens = [[generator.randrange(5, VOCABULARY) for _ in range(generator.randint(3, 30))] for _ in range(16)]
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    return [{**row, "labels": label(row)} for row in rows]


def trained_gradient(trainer_class: Any, model: Any, rows: list[Row], folder: str, **extra: Any) -> torch.Tensor:
    """The gradient of the first step of a trainer."""
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=8,
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    recorder = GradientRecorder()
    trainer_class(
        model=copy.deepcopy(model), args=args, train_dataset=rows, data_collator=pad, callbacks=[recorder], **extra
    ).train()
    return recorder.gradient


def main() -> None:
    """Prints one line a head."""
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"{'relative error of the gradient':<32}{'Trainer':>12}{'MBPTrainer':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (model_class, config, label) in HEADS.items():
            transformers.set_seed(0)
            model, rows = model_class(config).double(), make_rows(label)
            whole = copy.deepcopy(model)
            whole(**pad(rows)).loss.backward()
            expected = flat_gradient(whole)
            options = {"mbp_config": MBPConfig(max_tokens_per_micro_batch=64)}
            errors = [
                float((trained_gradient(kind, model, rows, folder, **extra) - expected).norm() / expected.norm())
                for kind, extra in ((Trainer, {}), (MBPTrainer, options))
            ]
            print(f"{name:<32}{errors[0]:>12.2g}{errors[1]:>12.2g}")


if __name__ == "__main__":
    main()
