"""The error for a row that does not fit the memory by itself: which row it is, what it needs, and what to do."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from hf_mbp import device_memory
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.recovery import Fault

SEARCH_SECONDS = 10
"""For which a data set is looked through for the row that does not fit."""


def too_large_error(trainer: Any, fault: Fault, need: float | None, checkpoint: str | None) -> MemoryError:
    """What to raise about a row; `need` are the bytes predicted for it, `checkpoint` where the run so far is kept."""
    if not fault.reason:
        return MemoryError(f"Process {fault.rank} has a row that does not fit its memory; it says which.")
    device = trainer.args.device
    how = "with activation checkpointing" if fault.is_checkpointed else "and the model has no activation checkpointing"
    needs = "" if need is None else f"It needs about {format_bytes(need)}, and "
    free = f"{format_bytes(device_memory.free_memory(device))} are free on {device}. "
    kept = f" The run so far is kept in {checkpoint}: go on with resume_from_checkpoint." if checkpoint else ""
    return MemoryError(
        f"{_named(trainer, fault)} of {fault.width:,} tokens does not fit the memory by itself, {how} "
        f"({fault.reason}). {(needs + free)[:1].upper()}{(needs + free)[1:]}Shorten such rows (truncation=True, "
        "max_length=...), take a smaller model or dtype, or train fewer parameters, or give it more memory." + kept
    )


def _named(trainer: Any, fault: Fault) -> str:
    index = _index_of(fault.row, trainer.train_dataset)
    return f"A row of step {trainer.state.global_step + 1}" if index is None else f"Row {index:,} of train_dataset,"


def _index_of(row: Any, dataset: Any) -> int | None:
    """Where a data set has a row with the same tokens; `None` if that cannot be found out."""
    tokens = _tokens(row)
    if tokens is None or isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
        return None
    ends = time.monotonic() + SEARCH_SECONDS
    for index in range(len(dataset)):
        if time.monotonic() > ends:
            return None
        if _tokens(dataset[index]) == tokens:
            return index
    return None


def _tokens(row: Any) -> list[Any] | None:
    tokens = row.get("input_ids") if isinstance(row, Mapping) else None
    if tokens is None:
        return None
    return tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)
