"""What went wrong, told in one line: a user's mistake, or a run that failed."""

from __future__ import annotations

import os
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

MISTAKE = 2
"""After a user's mistake."""

FAILED = 1
"""After a run that failed."""

INTERRUPTED = 130
"""After Ctrl-C, as shells count it."""

_MOST_CHARACTERS = 800
"""Of a message in one line; some of torch's are pages."""

_MOST_OF_A_WORD = 200
"""Of a word in it, or a word as long as the line would be all that is left out, and nothing told."""

Kinds = type[Exception] | tuple[type[Exception], ...]


class UserError(ValueError):
    """A mistake in the recipe, the command line or the data, with the remedy in its message."""


class RunFailedError(Exception):
    """A run in a process of its own that failed, which has said why and kept its traceback."""


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


def _speaks_for_its_machine() -> bool:
    """Whether this process tells mistakes: they are those of all processes, or of this machine, which lacks a file."""
    return is_first_process() or os.environ.get("LOCAL_RANK") == "0"


def keep_other_processes_quiet() -> None:
    """Turn off progress bars and warnings of the libraries on all processes but the first."""
    if not is_first_process():
        import datasets  # not above: the console command's help does without
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def say(message: str) -> None:
    """Print a line on the first process."""
    if is_first_process():
        print(message, flush=True)


def tell_error(message: str) -> None:
    """Print ``error: ...`` in one line."""
    print("error: " + _shortened(message, _MOST_CHARACTERS), file=sys.stderr, flush=True)


def _shortened(message: str, most_characters: int) -> str:
    words = (word if len(word) <= _MOST_OF_A_WORD else f"{word[:_MOST_OF_A_WORD]}..." for word in message.split())
    return textwrap.shorten(" ".join(words), most_characters, placeholder=" ...")


def run_reporting_errors(command: Callable[[], int | None], argv: Sequence[str]) -> int:
    """Run a command; return its exit code, after telling in one line what went wrong, if something did.

    Where it came from is shown if ``argv`` asks for it. What is not the user's mistake may be ours, and may have come
    after hours: its traceback is kept in a file.
    """
    show_traceback = shows_traceback(argv)
    try:
        return command() or 0
    except UserError as error:
        if show_traceback:
            traceback.print_exc()
        if _speaks_for_its_machine():
            tell_error(f"{error}{_which_process()}")
        return MISTAKE
    except RunFailedError as error:
        tell_error(str(error))
        return FAILED
    except KeyboardInterrupt:
        if show_traceback:
            traceback.print_exc()
        if _speaks_for_its_machine():
            tell_error(f"interrupted{_which_process()}")
        return INTERRUPTED
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        tell_error(_failure(error, is_shown=show_traceback))
        return FAILED


def shows_traceback(argv: Sequence[str]) -> bool:
    """Whether a command was asked to show where an error came from."""
    return any(word.startswith(("--debug_traceback", "--debug-traceback")) for word in argv)


def _failure(error: Exception, *, is_shown: bool) -> str:
    """Any process may be the one that fails, so that each speaks for itself."""
    text = _shortened(f"{type(error).__name__}: {error}", _MOST_CHARACTERS // 2)
    # Which process failed first, where this one only lost the connection to it.
    text = " ".join((text, *getattr(error, "__notes__", ())))
    remedy = "" if is_shown else f"; the traceback is in {_keep_traceback()}, --debug_traceback shows it here"
    return f"the run failed{_which_process()}: {text}{remedy}"


def _which_process() -> str:
    return "" if is_first_process() else f" in process {os.environ['RANK']}"


def _keep_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="hf-mbp-", suffix=".log", delete=False, encoding="utf-8") as file:
        file.write(traceback.format_exc())
    return file.name
