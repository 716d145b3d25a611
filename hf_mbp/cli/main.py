"""The console command `hf-mbp`: names its commands, and imports the one that is asked for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from hf_mbp import __version__
from hf_mbp.cli.errors import MISTAKE, say, tell_error


@dataclass(frozen=True, kw_only=True)
class Command:
    """A module whose ``main`` takes the words behind the command's name and returns the exit code."""

    module: str
    says: str


COMMANDS: Mapping[str, Command] = {
    "train": Command(module="hf_mbp.cli.finetune", says="fine-tune a model as a recipe says; --dry_run stops before"),
    "plan": Command(module="hf_mbp.cli.plan", says="show how a recipe would train: lengths, micro-batches, memory"),
    "check": Command(module="hf_mbp.cli.check", says="check that micro-batches are exact for a recipe"),
    "estimate": Command(module="hf_mbp.cli.estimate", says="predict the memory of a model, and the budget that fits"),
    "bench": Command(module="hf_mbp.cli.bench", says="measure a few steps of a recipe beside the stock Trainer"),
}

HELP_WORDS = ("-h", "--help")

HELP = """\
usage: hf-mbp COMMAND [...]

The batch size you choose: the Hugging Face Trainer with micro-batches that fit the device, are exact, and waste little.

{commands}

  hf-mbp COMMAND --help     the options of a command
  hf-mbp --version          the version

A first run, from a checkout of the repository, where the recipes are:

  hf-mbp train recipes/text_classification/spam.yaml --dry_run
  hf-mbp train recipes/text_classification/spam.yaml
  accelerate launch -m hf_mbp.cli train recipes/text_classification/spam.yaml     on several devices

Exit codes: 0 all went well; 1 the run failed, or the check found that it is not exact; 2 a mistake in the recipe, the
options or the data, told in one line with its remedy; 130 interrupted. --debug_traceback shows where an error came
from."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` begins with; return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in (*HELP_WORDS, "help"):
        print(_help())
        return 0 if argv else MISTAKE
    if argv[0] == "--version":
        print(f"hf-mbp {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        tell_error(_unknown(argv[0]))
        return MISTAKE
    name, words = argv[0], argv[1:]
    # Only now, and only if no help is wanted: the modules of the commands import torch and transformers.
    if any(word in HELP_WORDS for word in words):
        say(import_module("hf_mbp.cli.help").command_help(name))
        return 0
    code: int = import_module(COMMANDS[name].module).main(words)
    return code


def _help() -> str:
    return HELP.format(commands="\n".join(f"  {name:<12}{command.says}" for name, command in COMMANDS.items()))


def _unknown(word: str) -> str:
    if word.endswith((".yaml", ".yml")):
        return f"{word} is a recipe, and no command; write hf-mbp train {word}"
    close = difflib.get_close_matches(word, COMMANDS, n=1)
    guess = f"; did you mean {close[0]}?" if close else ""
    return f"{word} is not a command; write one of {', '.join(COMMANDS)}{guess}"
