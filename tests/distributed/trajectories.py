"""50 steps of AdamW with warm-up, clipping and weight decay: by the trainer on some processes, and by a plain loop."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback

from tests.helpers import Pad, llama_config, masked_prefix, mbp_trainer, set_seed, token_rows, with_labels

STEPS, WARM_UP, ROWS_A_STEP = 50, 10, 16
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 1e-3, 0.1, 0.36

BUDGETS = (24, 64, 10_000)
"""Less than the longest row, several micro-batches, and all rows of a rank in one."""

ACCUMULATIONS = (1, 4)

CELLS = [(accumulation, budget) for accumulation in ACCUMULATIONS for budget in BUDGETS]


def model_in_float32() -> Any:
    set_seed(0)
    return LlamaForCausalLM(llama_config())


def all_rows() -> list[dict[str, Any]]:
    """200 rows: 12 steps an epoch and one of half the rows."""
    return with_labels(token_rows(200), masked_prefix)


class Norms(TrainerCallback):
    """Keeps the norm of the gradient of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.norms += [logs["grad_norm"]] if "grad_norm" in logs else []


def by_trainer(folder: Path, processes: int, accumulation: int, budget: int) -> dict[str, Any]:
    """Weights and gradient norms after training; on every rank the same."""
    norms = Norms()
    trainer = mbp_trainer(
        model_in_float32(),
        all_rows(),
        folder,
        per_device_train_batch_size=ROWS_A_STEP // processes // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        optim="adamw_torch",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="linear",
        warmup_steps=WARM_UP,
        max_grad_norm=MAX_NORM,
        train_sampling_strategy="sequential",
        accelerator_config={"even_batches": False},
        max_tokens_per_micro_batch=budget,
        callbacks=[norms],
        on_inexact="error",
    )
    trainer.train()
    weights = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    return {"weights": weights, "norms": norms.norms}


def by_plain_loop() -> dict[str, Any]:
    """The same in plain PyTorch, on the whole batch of each step."""
    model, rows, pad = model_in_float32().train(), all_rows(), Pad()
    named = dict(model.named_parameters())
    decayed = [parameter for name, parameter in named.items() if "norm" not in name]
    others = [parameter for name, parameter in named.items() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)
    starts = [start for _ in range(STEPS) for start in range(0, len(rows), ROWS_A_STEP)]
    norms = []
    for step, start in enumerate(starts[:STEPS]):
        rate = step / WARM_UP if step < WARM_UP else (STEPS - step) / (STEPS - WARM_UP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rate
        model(**pad(rows[start : start + ROWS_A_STEP])).loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": {name: weight.detach() for name, weight in named.items()}, "norms": norms}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest of all differences of weights."""
    return max(float((one["weights"][name] - other["weights"][name]).abs().max()) for name in one["weights"])
