"""What is known about the trainers of TRL and sentence-transformers, which `MBPMixin` can be put before."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

TRL_SUPPORTED = ("SFTTrainer", "RewardTrainer", "DPOTrainer")

COMPARES_PAIRS = ("aot", "aot_unpaired")
"""Losses of DPO that sort the pairs of a batch against each other."""


def refusals(trainer: Any) -> Iterator[tuple[str, str]]:
    """What cannot be split of this trainer and its loss: what it is, and why with the remedy."""
    for name in _classes_of(trainer, "trl"):
        if name.endswith("Trainer") and not name.startswith("_") and name not in TRL_SUPPORTED:
            yield f"trl.{name}", f"only {', '.join(TRL_SUPPORTED)} of TRL are tested. Use trl.{name} as it is."
    if is_trl(trainer, "DPOTrainer"):
        yield from _dpo_refusals(trainer.loss_types)


def _dpo_refusals(loss_types: list[str]) -> Iterator[tuple[str, str]]:
    what, remedy = f"loss_type={loss_types} of DPO", "Use one of them, or trl.DPOTrainer as it is."
    if "sft" in loss_types and len(loss_types) > 1:
        yield what, f"it adds up a mean over tokens ('sft') and one over pairs, two denominators. {remedy}"
    if sorts := [name for name in loss_types if name in COMPARES_PAIRS]:
        yield (
            what,
            f"{sorts[0]!r} compares the pairs of a batch with each other, and micro-batches have fewer. {remedy}",
        )


def num_items(trainer: Any, inputs: Mapping[str, Any]) -> float | None:
    """What the loss averages over, where it is not what the labels or rows of `inputs` say; else `None`.

    `loss_type="sft"` of DPO is a mean over the tokens of the chosen completions, whose first has no prediction.
    """
    mask = inputs.get("completion_mask")
    if is_trl(trainer, "DPOTrainer") and trainer.loss_types == ["sft"] and isinstance(mask, torch.Tensor):
        return float(mask[:, 1:].chunk(2)[0].sum())
    return None


def rows_each(trainer: Any) -> int:
    """Rows of a collated batch that stay together: 2 for preference pairs, the chosen ones first, then the rejected."""
    return 2 if is_trl(trainer, "DPOTrainer") or is_trl(trainer, "RewardTrainer") else 1


def is_trl(trainer: Any, name: str) -> bool:
    """Whether a trainer is the one of TRL with that name, or built on it."""
    return name in _classes_of(trainer, "trl")


def is_sentence_transformers(trainer: Any) -> bool:
    """Whether a trainer is one of sentence-transformers.

    Their collators tokenise, so lengths are only known once a batch is collated; and most of their losses compare the
    rows of a batch with each other, so that an inexact one is no detail to be warned of.
    """
    return bool(_classes_of(trainer, "sentence_transformers"))


def _classes_of(trainer: Any, package: str) -> list[str]:
    return [cls.__name__ for cls in type(trainer).__mro__ if cls.__module__.split(".")[0] == package]
