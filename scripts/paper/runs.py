"""A run: one trainer trains one case, in a process of its own, under a limit or none."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import Trainer, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer
from paper.cases import Case, case_of
from peak_meter import AddressSpaceMeter

REFUSED = ("allocate memory", "out of memory", "MemoryError", "bad_alloc")
"""What the allocators say."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: which trainer, on how many rows at once, under a limit or none."""

    case: str
    trainer: str
    rows: int
    steps: int
    is_limited: bool
    device: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run; bytes are counted from when model and data were there, `base_bytes` is what they took."""

    error: str = ""
    losses: list[float] = field(default_factory=list)
    base_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    micro_batches: float = 1.0
    max_tokens: int = 0

    @property
    def is_refused(self) -> bool:
        """Whether it ended because there was no memory left."""
        return any(text in self.error for text in REFUSED)

    @property
    def total_peak_bytes(self) -> int:
        """Peak of the process."""
        return self.base_bytes + self.peak_bytes


TRAINERS = {"stock": Trainer, "mbp": MBPTrainer}


def perform(run: Run, folder: str) -> Outcome:
    """Trains as `run` says, or notes the error."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    case = case_of(run.case)
    warm_up(run, case, folder)
    transformers.set_seed(0)
    model, rows, collator = case.prepare(run.rows, Path(folder))
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # else read from disk at its first use, and counted then
    trainer = TRAINERS[run.trainer](
        model=model,
        args=arguments(run, case, folder),
        train_dataset=rows,
        data_collator=collator,
        **options(run, case, model),
    )
    gc.collect()  # what the warm-up has left
    error, started = "", time.perf_counter()
    with AddressSpaceMeter(run.device) as meter:
        if run.is_limited:
            limit(run.device, case.headroom)
        try:
            trainer.train()
        except (RuntimeError, MemoryError) as raised:
            error = f"{type(raised).__name__}: {raised}"
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Outcome(
        error=error,
        losses=[log["loss"] for log in logs],
        base_bytes=meter.base_bytes,
        peak_bytes=meter.peak_bytes,
        seconds=time.perf_counter() - started,
        micro_batches=logs[-1].get("mbp_micro_batches", 1.0) if logs else 1.0,
        max_tokens=int(logs[-1].get("mbp_max_tokens", 0)) if logs else 0,
    )


def warm_up(run: Run, case: Case, folder: str) -> None:
    """Trains a step of two rows, so that code, which is read from disk at its first use, counts as being there."""
    model, rows, collator = case.prepare(2, Path(folder))
    run = replace(run, rows=2, steps=1)
    TRAINERS[run.trainer](
        model=model, args=arguments(run, case, folder), train_dataset=rows, data_collator=collator
    ).train()


def options(run: Run, case: Case, model: Any) -> dict[str, Any]:
    """A GPU's driver does not tell of the limit on the fraction of its memory."""
    if not (run.trainer == "mbp" and run.is_limited and run.device == "cuda"):
        return {}
    model.to("cuda")
    return {"mbp_config": MBPConfig(memory_limit=torch.cuda.memory_reserved() + int(0.9 * case.headroom))}


def limit(device: str, headroom: int) -> None:
    """Has the system, or torch's allocator on a GPU, refuse what would be more than `headroom` bytes on top."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + headroom) / total)
    else:
        import resource  # there is none on Windows

        most = psutil.Process().memory_info().vms + headroom
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def arguments(run: Run, case: Case, folder: str) -> TrainingArguments:
    """All rows in one batch."""
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=run.rows,
        max_steps=run.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        use_cpu=run.device == "cpu",
        seed=0,
    )
