"""Prints how far the gradient is from the float32 one, for each precision, whole and in more and more micro-batches.

    python scripts/compare_precision.py

A small random Llama whose weights are bfloat16 numbers, 256 rows of 24 tokens, on a CPU. The reference is the float32
gradient of the same weights, from plain PyTorch on all rows at once.
"""

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from hf_mbp import run_mini_batch

ROWS, TOKENS, VOCABULARY = 256, 24, 512
MICRO_BATCHES = (1, 4, 16, 64, 256)
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4
)

Inputs = dict[str, torch.Tensor]


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of random tokens, of equal lengths, so that a budget gives a known number of micro-batches."""
    generator = random.Random(0)  # noqa: S311
    tokens = [[generator.randrange(VOCABULARY) for _ in range(TOKENS)] for _ in range(ROWS)]
    return [{"input_ids": ids, "labels": ids} for ids in tokens]


def stack(rows: list[dict[str, list[int]]]) -> Inputs:
    """The rows as one batch."""
    return {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}


def plain_loss(model: Any, inputs: Inputs) -> torch.Tensor:
    """The model's own loss."""
    loss: torch.Tensor = model(**inputs).loss
    return loss


def autocast_loss(model: Any, inputs: Inputs) -> torch.Tensor:
    """The model's own loss under autocast, as with `TrainingArguments(bf16=True)`."""
    with torch.autocast("cpu", torch.bfloat16):
        return plain_loss(model, inputs)


def gradient_of(model: Any) -> torch.Tensor:
    """All gradients in one float32 vector."""
    return torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


def split_gradient(
    model: Any, loss: Callable[[Any, Inputs], torch.Tensor], num_micro_batches: int, *, accumulate_in_fp32: bool
) -> torch.Tensor:
    """The gradient of a copy of the model, from that many micro-batches."""
    model = copy.deepcopy(model)
    report = run_mini_batch(
        make_rows(),
        model=model,
        loss=lambda inputs: loss(model, inputs),
        collate_fn=stack,
        accelerator=Accelerator(cpu=True),
        max_tokens=ROWS // num_micro_batches * TOKENS,
        accumulate_in_fp32=accumulate_in_fp32,
    )
    assert report.num_micro_batches == num_micro_batches  # noqa: S101
    return gradient_of(model)


def main() -> None:
    """Prints one line a number of micro-batches."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the tensors are so small that threads would wait for each other
    transformers.set_seed(0)
    half = LlamaForCausalLM(CONFIG).bfloat16().train()
    single = copy.deepcopy(half).float()
    whole = copy.deepcopy(single)
    plain_loss(whole, stack(make_rows())).backward()
    expected = gradient_of(whole)
    columns: dict[str, tuple[Any, Callable[[Any, Inputs], torch.Tensor], bool]] = {
        "bfloat16 weights": (half, plain_loss, False),
        "and `accumulate_in_fp32`": (half, plain_loss, True),
        "float32 weights, autocast": (single, autocast_loss, False),
        "float32": (single, plain_loss, False),
    }
    print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
    print(f"| micro-batches | {' | '.join(columns)} |")
    print(f"| ---: |{' ---: |' * len(columns)}")
    for number in MICRO_BATCHES:
        errors = [
            float((split_gradient(model, loss, number, accumulate_in_fp32=in_fp32) - expected).norm() / expected.norm())
            for model, loss, in_fp32 in columns.values()
        ]
        print(f"| {number} | {' | '.join(f'{error:.1e}' if error < 1e-4 else f'{error:.2%}' for error in errors)} |")


if __name__ == "__main__":
    main()
