"""What may fail in a run: each fault comes once, in the fourth step or at the third checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Trainer, TrainerCallback

from hf_mbp import MBPTrainer, last_checkpoint
from reliability.run import ACCUMULATION, BATCH, SAVE_STEPS, train

STEP = 3
"""In which faults come, counted from 0: after the first checkpoint, and before the second."""

READ = STEP * BATCH * ACCUMULATION + 9
"""Rows that were read before the one that fails: a worker is two batches ahead, which is still within the step."""


class Rows:
    """Rows one of which is disturbed, and marked: `disturb(row)` gives what comes in its place."""

    def __init__(self, rows: list[Any], disturb: Callable[[Any], Any]) -> None:
        self.rows, self.disturb, self.num_read = rows, disturb, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        """The row; it is counted where it is read, which is in one worker."""
        self.num_read += 1
        is_due = self.num_read == READ + 1
        return {**(self.disturb(self.rows[index]) if is_due else self.rows[index]), "is_due": is_due}


class Collator:
    """A collator that, of the marked row, returns `disturb(batch)`."""

    def __init__(self, collate: Callable[[Any], Any], disturb: Callable[[Any], Any]) -> None:
        self.collate, self.disturb = collate, disturb

    def __call__(self, rows: list[Any]) -> Any:
        """The batch."""
        batch = self.collate(rows)
        return self.disturb(batch) if any(row["is_due"] for row in rows) else batch


def disturbed_row(disturb: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A fault of a row."""

    def prepare(trainer: Any) -> None:
        trainer.train_dataset = Rows(trainer.train_dataset, disturb)

    return prepare


def disturbed_batch(disturb: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A fault of the collator."""

    def prepare(trainer: Any) -> None:
        trainer.train_dataset = Rows(trainer.train_dataset, lambda row: row)
        trainer.data_collator = Collator(trainer.data_collator, disturb)

    return prepare


def kill_worker(row: Any) -> Any:  # noqa: ARG001
    """The worker that reads the row is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse_row(row: Any) -> Any:  # noqa: ARG001
    """The data set raises."""
    raise KeyError("a column that is not there")


def lose_row(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One row fewer than the collator was given."""
    return {name: values[1:] for name, values in batch.items()}


def not_a_number(trainer: Any) -> None:
    """The first loss of the step is NaN."""
    is_due = [True]

    def spoil(module: Any, args: Any, output: Any) -> Any:  # noqa: ARG001
        if is_due[0] and module.training and trainer.state.global_step == STEP:
            is_due[0] = False
            output["loss"] = output["loss"] * float("nan")
        return output

    trainer.model.register_forward_hook(spoil)


class BeforeSaving(TrainerCallback):
    """Does something to the folder of the third checkpoint, which is about to be written."""

    def __init__(self, spoil: Callable[[Path], None]) -> None:
        self.spoil = spoil

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Saving comes after it."""
        if state.global_step == 3 * SAVE_STEPS:
            self.spoil(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def disturbed_saving(spoil: Callable[[Path], None]) -> Callable[[Any], None]:
    """A fault of the disk."""
    return lambda trainer: trainer.add_callback(BeforeSaving(spoil))


def fill_disk(folder: Path) -> None:
    """Whoever writes to /dev/full is told that no space is left on the device."""
    folder.mkdir()
    (folder / "optimizer.pt").symlink_to("/dev/full")


LARGEST_FILE = 2**14
"""The model has some 60 KiB, so that its file breaks off."""


def limit_files(folder: Path) -> None:  # noqa: ARG001
    """As a quota does: larger files cannot be written in this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, resource.RLIM_INFINITY))


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that fails.

    Args:
        what: it is, for the table.
        prepare: a trainer for it.
    """

    what: str
    prepare: Callable[[Any], None]


FAULTS = {
    "killed worker": Fault(what="a loader's worker is killed", prepare=disturbed_row(kill_worker)),
    "raising row": Fault(what="the data set raises at a row", prepare=disturbed_row(refuse_row)),
    "empty row": Fault(what="a row has no tokens", prepare=disturbed_row(lambda row: {**row, "input_ids": []})),
    "batch of nothing": Fault(what="the collator returns `None`", prepare=disturbed_batch(lambda _: None)),
    "batch of another type": Fault(
        what="the collator returns a list", prepare=disturbed_batch(lambda batch: list(batch.values()))
    ),
    "batch of fewer rows": Fault(what="the collator loses a row", prepare=disturbed_batch(lose_row)),
    "loss that is no number": Fault(what="a loss is NaN", prepare=not_a_number),
    "full disk": Fault(what="no space is left when the optimizer is saved", prepare=disturbed_saving(fill_disk)),
    "quota": Fault(what="the file of the model becomes too large", prepare=disturbed_saving(limit_files)),
}


TRAINERS = {"Trainer": Trainer, "MBPTrainer": MBPTrainer}


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A run that something failed in.

    Args:
        fault: its name.
        error: that ended the run, and what was noted at it; empty if it came to its end.
        warnings: what was warned of.
        is_finite: whether all weights are numbers at the end.
    """

    fault: str
    error: str
    warnings: tuple[str, ...]
    is_finite: bool

    @property
    def says(self) -> str:
        """The error or the warnings, and what they do not say."""
        lost = "" if self.is_finite else "trains on, with weights that are NaN"
        return "; ".join(filter(None, [self.error, *self.warnings, lost])) or "nothing; trains on"


def attempt(fault: str, trainer: str, folder: Path) -> Attempt:
    """Trains with the fault; to be called in a process of its own."""
    _settle()
    error = ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            train(folder, FAULTS[fault].prepare, TRAINERS[trainer])
        except Exception as raised:
            error = shortened(raised)
    weights = {} if error else torch.load(folder / "outcome0.pt")["weights"]
    return Attempt(
        fault=fault,
        error=error,
        warnings=tuple(str(one.message) for one in warned),
        is_finite=all(bool(value.isfinite().all()) for value in weights.values()),
    )


def go_on(folder: Path) -> str:
    """Trains to the end, from the last whole checkpoint, whose name is returned; in a process of its own."""
    _settle()
    for file in folder.glob("*/optimizer.pt"):
        if file.is_symlink():
            file.unlink()  # the disk has room again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of checkpoints that are passed over
        last = last_checkpoint(folder)
        train(folder)
    return Path(last).name if last else "the start"


def _settle() -> None:
    multiprocessing.set_start_method("fork", force=True)  # for loaders' workers; as it is, they would import it all
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def shortened(error: BaseException) -> str:
    """An exception in one line: of a traceback in its text the first line and the last one, and no process numbers."""
    lines = str(error).strip().splitlines()
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return re.sub(r"pid \d+", "pid ...", f"`{type(error).__name__}: {text}`")
