"""Runs functions, each in a process of its own that is forked from one that has done nothing but import."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class ProcessDiedError(Exception):
    """The process ended without an answer."""


class OwnProcesses:
    """Where the functions run; what they print is dropped.

    Args:
        preload: modules that the processes find imported.
    """

    def __init__(self, preload: list[str]) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, *preload])
        # Before Python 3.13 that process looks for modules only where the environment says, and goes without.
        places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns.

        Raises:
            ProcessDiedError: it was killed, or raised.
        """
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(there, function, arguments))
        process.start()
        there.close()
        try:
            return here.recv()
        except EOFError:
            process.join()
            raise ProcessDiedError(f"the process ended without a word (exit code {process.exitcode})") from None
        finally:
            process.join()


def _answer(there: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = function(*arguments)
    there.send(result)
