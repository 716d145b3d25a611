"""Prints useful tokens a second with rows padded and with rows laid end to end, for several budgets.

    python scripts/padding_free.py [attention]

For a random Llama of 4 layers, 256 wide, 64 rows a step with lengths from a lognormal distribution (median 67, clipped
to 8..512), on the device that `Trainer` picks. With the attention that transformers gives the model, or that of the
argument, as `flash_attention_2`, which takes bfloat16. Both are run in turn, three times; the first step of each run,
which also checks exactness, is left out.
"""

import statistics
import sys
import tempfile
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from benchmarks.workloads import pad
from hf_mbp import MBPConfig, MBPTrainer

ROWS, STEPS, TURNS = 64, 4, 3
BUDGETS = (512, 2048, 8192)


class Logs(TrainerCallback):
    """Keeps what is logged of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.steps.append(dict(logs))


def make_model(attention: str | None) -> Any:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=8, intermediate_size=768, vocab_size=2000
    )
    model = LlamaForCausalLM(config)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model.bfloat16() if "flash" in str(attention) else model


def make_rows() -> list[dict[str, Any]]:
    """Rows of random tokens, of very different lengths; the collator makes every token a label."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(4.2, 0.8, ROWS * STEPS), 8, 512).astype(int)
    return [{"input_ids": generator.integers(1000, 2000, length).tolist()} for length in lengths]


def steps_of(attention: str | None, budget: int, *, padding_free: bool) -> list[dict[str, float]]:
    """What is logged of the steps of a short run, but for the first."""
    logs = Logs()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = MBPTrainer(
            model=make_model(attention),
            args=args,
            train_dataset=make_rows(),
            data_collator=pad,
            callbacks=[logs],
            mbp_config=MBPConfig(max_tokens_per_micro_batch=budget, padding_free=padding_free),
        )
        trainer.train()
    return logs.steps[1:]


def main(attention: str | None) -> None:
    """Prints a table."""
    lines = ["| budget (tokens) | rows | micro-batches | padding | useful tokens a second (range) |"]
    lines += ["| ---: | --- | ---: | ---: | ---: |"]
    for budget in BUDGETS:
        runs: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for _ in range(TURNS):
            for padding_free, steps in runs.items():
                steps += steps_of(attention, budget, padding_free=padding_free)
        for padding_free, steps in runs.items():
            speeds = [step["mbp_tokens_per_second"] for step in steps]
            lines.append(
                f"| {budget:,} | {'end to end' if padding_free else 'padded'} "
                f"| {statistics.mean(step['mbp_micro_batches'] for step in steps):.1f} "
                f"| {statistics.mean(step['mbp_padding_fraction'] for step in steps):.1%} "
                f"| {statistics.median(speeds):,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) |"
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
