"""Why a run cannot go on from a checkpoint: the file of it that cannot be read, or what else was wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_mbp.cli.errors import UserError


def checkpoint_error(checkpoint: Path, error: Exception, *, is_loaded: bool) -> UserError | None:
    """What to tell of an exception before the first step; ``None`` if it does not come from the checkpoint.

    Args:
        checkpoint: the folder that was named.
        error: that was raised.
        is_loaded: whether all but the states of random numbers had been read, so that only a file that cannot be read
            speaks for it.
    """
    broken = broken_file(checkpoint)
    if broken is None and is_loaded:
        return None
    reason = broken or f"{type(error).__name__}: {error}"
    return UserError(
        f"training cannot go on from {checkpoint} (resume_from_checkpoint): {reason}; name an earlier checkpoint, or"
        " leave the option out to start anew"
    )


def broken_file(checkpoint: Path) -> str | None:
    """Return the first file that cannot be read, and why; ``None`` if all can."""
    for file in sorted(checkpoint.iterdir()):
        try:
            _READERS.get(file.suffix, _skip)(file)
        except Exception as error:  # each format has its own, and some have several
            return f"{file.name} cannot be read: {error}"
    return None


def _skip(_: Path) -> None:
    """What is not read when a run goes on."""


def _read_json(file: Path) -> None:
    if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
        raise ValueError("it holds no settings")


def _read_tensors(file: Path) -> None:
    with safe_open(file, framework="pt") as tensors:
        tensors.keys()


def _read_archive(file: Path) -> None:
    """What torch saves is an archive, which has a checksum of each of its files."""
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{damaged} in it is damaged")


_READERS: Mapping[str, Callable[[Path], Any]] = {
    ".json": _read_json,
    ".safetensors": _read_tensors,
    ".pt": _read_archive,
    ".pth": _read_archive,
}
