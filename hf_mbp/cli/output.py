"""The folder of a run: what may be in it before, and what is in it after."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_mbp.checkpoints import STATE, fault_of_state, last_checkpoint
from hf_mbp.cli.errors import UserError, user_errors
from hf_mbp.cli.sources import is_there

RECIPE = "recipe.yaml"
BEFORE_RESULTS = "eval_before_results.json"
TRAIN_RESULTS = "train_results.json"
ALL_RESULTS = "all_results.json"
# What a run writes beside model and tokenizer, which the next run replaces anyway.
_RESULTS = (RECIPE, BEFORE_RESULTS, TRAIN_RESULTS, "eval_results.json", ALL_RESULTS, STATE)
PLOTS = ("loss.png", "padding.png")
CARD = "README.md"
CARD_MARK = "<!-- This card was written by hf-mbp train. -->"
"""In a card of ours: another README.md is the user's, and is left alone."""


def refuse_other_run(folder: Path, *, overwrite: bool, resuming: bool) -> None:
    """Check that the folder holds no earlier run, unless that is to be overwritten or continued.

    Raises:
        UserError: it does, or its path is a file.
    """
    with user_errors(f"output_dir {folder}", (OSError, ValueError)):  # a name that no file system takes
        found = _traces(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file; name a folder")
    if found and not (overwrite or resuming):
        can_go_on = any(path.name.startswith("checkpoint-") for path in found)
        raise UserError(
            f"output_dir {folder} holds an earlier run ({found[0].name}); name another folder, or write"
            " --overwrite_output_dir to delete that run"
            + (
                ", or --resume_from_checkpoint last to go on with it"
                if can_go_on
                else "; it has no checkpoint to go on from"
            )
        )


def delete_run(folder: Path) -> None:
    """Delete what an earlier run left in the folder; files that are not ours stay."""
    card = [folder / CARD] if has_own_card(folder) else []
    for path in (*_traces(folder), *(folder / name for name in PLOTS), *card):
        if path.is_dir() and not path.is_symlink():  # what a link points to is elsewhere, and not the run's
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def delete_start(folder: Path) -> None:
    """Delete what a run has written before its first step."""
    for name in (RECIPE, BEFORE_RESULTS, ALL_RESULTS):
        (folder / name).unlink(missing_ok=True)


def has_own_card(folder: Path) -> bool:
    """Whether the folder's README.md is one that a run has written."""
    file = folder / CARD
    return file.is_file() and CARD_MARK in file.read_text(encoding="utf-8", errors="replace")


@contextmanager
def kept(file: Path) -> Iterator[None]:
    """Undo what is done to a file meanwhile: it has its content back, or is not there, as before."""
    content = file.read_bytes() if file.is_file() else None
    try:
        yield
    finally:
        if content is not None:
            file.write_bytes(content)
        elif file.is_file():
            file.unlink()


def find_checkpoint(wanted: str | None, folder: Path) -> Path | None:
    """Return the checkpoint to go on from: ``true`` or ``last`` is the last whole one in the folder, else its path.

    Raises:
        UserError: there is none.
    """
    if wanted is None or wanted.lower() in ("false", "none"):
        return None
    if wanted.lower() in ("true", "last"):
        last = last_checkpoint(folder) if is_there(folder) else None
        if last is None:
            raise UserError(
                f"resume_from_checkpoint is {wanted!r}, but output_dir {folder} has no whole checkpoint-* folder"
            )
        return Path(last)
    if not (is_there(Path(wanted)) and Path(wanted).is_dir()):
        raise UserError(
            f"resume_from_checkpoint: there is no folder {wanted}; name a checkpoint-* folder, or write last"
        )
    if fault := fault_of_state(Path(wanted)):
        raise UserError(f"resume_from_checkpoint: {wanted} is not a whole checkpoint of the Trainer ({fault})")
    return Path(wanted)


def is_of_run(checkpoint: Path | None, folder: Path) -> bool:
    """Whether going on from the checkpoint goes on with the run in the folder, and not with one that was elsewhere."""
    return checkpoint is not None and checkpoint.resolve().parent == folder.resolve()


def _traces(folder: Path) -> list[Path]:
    return [
        path for path in (*(folder / name for name in _RESULTS), *sorted(folder.glob("checkpoint-*"))) if path.exists()
    ]
