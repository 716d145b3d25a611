"""Tiny models with tokenizers, on disk as a user would have them; caches in a folder of the test's own."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets.config
import evaluate.config
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
    set_seed,
)

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]
WORDS = [*"abcdefghijklmnopqrstuvwxyz", "good", "bad", "user", "assistant", "system", ".", "?"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|> ' + m['role'] + ' ' + m['content'] + ' <|im_end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
Rows = Iterable[dict[str, Any]]


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache" / "metrics"))


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **options)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, which reads 32 tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save_pretrained(folder)
    set_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, whose end token pads, as in many real models."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = word_tokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[[str, Rows], Path]:
    def write(name: str, rows: Rows) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def review(index: int) -> dict[str, str]:
    """A text whose label can be learned, of a length that differs from row to row."""
    label = "good" if index % 2 else "bad"
    return {"text": " ".join([label, *WORDS[: 1 + index % 20]]), "label": label}


@pytest.fixture
def reviews(write_rows: Callable[[str, Rows], Path]) -> tuple[Path, Path]:
    train = write_rows("train.jsonl", [review(i) for i in range(40)])
    return train, write_rows("test.jsonl", [review(i) for i in range(3, 20)])


@pytest.fixture
def recipe(tmp_path: Path, encoder: Path, reviews: tuple[Path, Path]) -> Callable[..., Path]:
    """Writes a recipe that trains the tiny encoder; ``None`` leaves a key out."""

    def write(**changes: Any) -> Path:
        keys: dict[str, Any] = {
            "task": "text_classification",
            "model_name_or_path": str(encoder),
            "train_file": str(reviews[0]),
            "validation_file": str(reviews[1]),
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "learning_rate": "1e-2",
            "max_steps": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
        }
        path = tmp_path / "recipe.yaml"
        lines = (f"{key}: {json.dumps(value)}" for key, value in {**keys, **changes}.items() if value is not None)
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny ViT for colour images of 8 x 8, with its image processor; no weights."""
    folder = tmp_path_factory.mktemp("images")
    ViTConfig(image_size=8, patch_size=4, initializer_range=0.2, **SIZES).save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a tiny T5 that reads bytes; no weights."""
    folder = tmp_path_factory.mktemp("bytes")
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 32, "num_heads": 2, "num_layers": 1, "dropout_rate": 0.0}
    ids = {"vocab_size": 384, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    T5Config(**sizes, **ids).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    return folder
