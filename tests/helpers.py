"""Tiny models, rows and plain references that the tests share."""

import copy
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_mbp import MBPConfig, MBPTrainer

VOCABULARY = 60
PAD = 0

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_config(**changes: Any) -> BertConfig:
    return BertConfig(**{"vocab_size": VOCABULARY, "max_position_embeddings": 64, **BERT, **NO_DROPOUT, **changes})


def gpt2_config(**changes: Any) -> GPT2Config:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCABULARY}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2Config(**{**sizes, **dropout, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD, **changes})


def llama_config(**changes: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(**{**sizes, "vocab_size": VOCABULARY, "pad_token_id": PAD, **changes})


def t5_config(**changes: Any) -> T5Config:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": VOCABULARY}
    return T5Config(**{**sizes, "dropout_rate": 0.0, "decoder_start_token_id": PAD, "pad_token_id": PAD, **changes})


def build(model_class: type[PreTrainedModel], config: Any, *, seed: int = 0) -> Any:
    """A randomly initialised model in float64."""
    set_seed(seed)
    return model_class(config).double()


def lengths(count: int = 16, *, low: int = 3, high: int = 30, seed: int = 0) -> list[int]:
    """Row lengths, uneven on purpose and never all equal."""
    generator = random.Random(seed)
    return [generator.randint(low, high) for _ in range(count)]


def tokens(length: int, generator: random.Random) -> list[int]:
    return [generator.randrange(5, VOCABULARY) for _ in range(length)]


def token_rows(count: int = 16, *, seed: int = 0, **kwargs: Any) -> list[dict[str, Any]]:
    """Rows of `input_ids` and `attention_mask` of uneven lengths."""
    generator = random.Random(seed)
    return [
        {"input_ids": tokens(length, generator), "attention_mask": [1] * length}
        for length in lengths(count, seed=seed, **kwargs)
    ]


def with_labels(rows: Iterable[dict[str, Any]], label: Callable[[int, dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """The rows with `labels` made from index and row."""
    return [{**row, "labels": label(index, row)} for index, row in enumerate(rows)]


def masked_prefix(index: int, row: dict[str, Any]) -> list[int]:
    """Labels for language modelling whose first tokens, a different number in each row, do not count."""
    cut = index % 3
    return [-100] * cut + row["input_ids"][cut:]


FILL = {"input_ids": PAD, "attention_mask": 0, "token_type_ids": 0, "labels": -100}


class Pad:
    """Pads lists of tokens; numbers become tensors. A reference collator of few lines."""

    def __init__(self, side: str = "right", pad_to_multiple_of: int | None = None) -> None:
        self.side = side
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: self.column(key, [row[key] for row in rows]) for key in rows[0]}

    def column(self, key: str, values: list[Any]) -> torch.Tensor:
        values = [torch.as_tensor(value, dtype=torch.long if value == [] else None) for value in values]
        if values[0].is_floating_point():
            return torch.stack(values).double()
        if values[0].ndim == 0:
            return torch.stack(values)
        width = max(len(value) for value in values)
        multiple = self.pad_to_multiple_of or 1
        width = -(-width // multiple) * multiple
        padded = torch.full((len(values), width), FILL.get(key, 0))
        for row, value in zip(padded, values, strict=True):
            row[slice(0, len(value)) if self.side == "right" else slice(width - len(value), width)] = value
        return padded


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of `VOCABULARY` words `w5`, `w6`, ... with the special tokens that collators ask for."""
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"]
    words = {word: index for index, word in enumerate(special + [f"w{index}" for index in range(5, VOCABULARY)])}
    backend = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        mask_token="[MASK]",
    )


def word_tokenizer() -> PreTrainedTokenizerFast:
    """`tokenizer` that splits texts at spaces."""
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return words


class Recorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, and the training logs."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """Arguments for a short, quiet run without clipping."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16,
        "max_steps": 1,
        "learning_rate": 0.01,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    return TrainingArguments(**{**defaults, **changes})


def mbp_trainer(model: Any, rows: Any, folder: Path, **changes: Any) -> MBPTrainer:
    """An `MBPTrainer` that splits 16 rows into several micro-batches; `changes` go where they belong."""
    trainer_class = changes.pop("trainer_class", MBPTrainer)
    init = {
        name: changes.pop(name)
        for name in ("data_collator", "compute_loss_func", "callbacks", "eval_dataset", "processing_class")
        if name in changes
    }
    options = {"max_tokens_per_micro_batch": 64}
    options |= {name: changes.pop(name) for name in MBPConfig.__dataclass_fields__ if name in changes}
    return trainer_class(
        model=model,
        args=arguments(folder, **changes),
        train_dataset=rows,
        **{"data_collator": Pad(), **init},
        mbp_config=MBPConfig(**options),
    )


def whole_gradients(model: Any, loss: Callable[[Any], torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Plain PyTorch: loss and gradients of a copy of the model, of one batch."""
    model = copy.deepcopy(model).train()
    value = loss(model)
    value.backward()
    return float(value.detach()), {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


def relative_error(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, over the norm of the expected ones."""
    assert expected.keys() == actual.keys()
    difference = sum(float((expected[name] - actual[name]).double().pow(2).sum()) for name in expected)
    return (difference / sum(float(value.double().pow(2).sum()) for value in expected.values())) ** 0.5
