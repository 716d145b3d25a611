"""A user's mistake, told in one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import datasets
import transformers

EXIT_CODE = 2

Kinds = type[Exception] | tuple[type[Exception], ...]


class UserError(ValueError):
    """A mistake in the recipe, the command line or the data, with the remedy in its message."""


@contextmanager
def user_errors(what: str, kinds: Kinds = (ValueError, OSError)) -> Iterator[None]:
    """Turn exceptions of the given kinds into a :class:`UserError` that begins with ``what``.

    For calls into libraries whose exceptions speak of the user's input: a file that is not there, a model name that
    is wrong.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, UserError) and kinds is not UserError:
            raise  # it says already what the matter is
        raise UserError(f"{what}: {error}") from error


def is_first_process() -> bool:
    """Whether this process is the one that talks to the user.

    Read from the launcher's variable, because messages are due before any process group exists.
    """
    return os.environ.get("RANK", "0") == "0"


def keep_other_processes_quiet() -> None:
    """Turn off progress bars and warnings of the libraries on all processes but the first."""
    if not is_first_process():
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def say(message: str) -> None:
    """Print a line on the first process."""
    if is_first_process():
        print(message, flush=True)


def run_reporting_errors(command: Callable[[], None], *, show_traceback: bool) -> int:
    """Run a command; return its exit code, after printing ``error: ...`` in one line if the user made a mistake."""
    try:
        command()
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        if is_first_process():
            print("error: " + " ".join(str(error).split()), file=sys.stderr, flush=True)
        return EXIT_CODE
    return 0
