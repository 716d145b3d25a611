"""Show how a recipe would train, before it does: lengths, micro-batches, padding, memory; without weights or device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from hf_mbp.cli.command import run_command
from hf_mbp.cli.errors import UserError, say, user_errors
from hf_mbp.cli.plan_text import as_text
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is this script's own."""

    steps: int
    output: Path
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, _plan)


def _plan(argv: Sequence[str]) -> None:
    options, rest = _take_options(argv)
    recipe = read_recipe(rest)
    plan = plan_run(recipe, options.device)
    say(as_text(plan, options.device))
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed, so nothing is drawn; pip install 'hf-mbp[recipes]' brings it")
        return
    from hf_mbp.cli.plan_plot import plot_plan

    with user_errors(f"--output {options.output}"):
        plot_plan(plan, options.steps, options.output)
    say(f"drawn in {options.output}")


def _take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that are this script's own, and the others."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--steps", default="3")
    parser.add_argument("--output", default="plan.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    if not known.steps.isdecimal() or int(known.steps) < 1:
        raise UserError(f"command line: --steps is {known.steps!r}; write a whole number from 1, such as 3")
    if known.device not in ("cpu", "cuda"):
        raise UserError(f"command line: --device is {known.device!r}; write cpu or cuda")
    output = Path(known.output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"command line: --output is {known.output!r}; write a name that ends in .png, .pdf or .svg")
    return Options(steps=int(known.steps), output=output, device=torch.device(known.device)), rest
