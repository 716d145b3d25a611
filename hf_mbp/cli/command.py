"""What every command begins with, so that mistakes are told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from hf_mbp.cli.errors import keep_other_processes_quiet, run_reporting_errors


def run_command(argv: Sequence[str] | None, command: Callable[[Sequence[str]], int | None]) -> int:
    """Run a command on the words after its name, by default those of the process; return its exit code."""
    words = sys.argv[1:] if argv is None else argv

    def run() -> int | None:
        keep_other_processes_quiet()
        return command(words)

    return run_reporting_errors(run, words)
