"""What every command begins with: its help if that is asked for, else what it does, with mistakes told in one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Sequence

from hf_mbp.cli.errors import keep_other_processes_quiet, run_reporting_errors, say

HELP = ("-h", "--help")


def run_command(
    argv: Sequence[str] | None,
    help_text: Callable[[Sequence[str]], str],
    command: Callable[[Sequence[str]], int | None],
    *,
    help_words: Collection[str] = HELP,
) -> int:
    """Run a command on the words after its name, by default those of the process; return its exit code."""
    words = sys.argv[1:] if argv is None else argv

    def run() -> int | None:
        if any(word in help_words for word in words):
            say(help_text(words))
            return 0
        keep_other_processes_quiet()
        return command(words)

    return run_reporting_errors(run, words)
