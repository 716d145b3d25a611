"""Show how a recipe would train, before it does: lengths, micro-batches, padding, memory; without weights or device."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from hf_mbp.cli.command import run_command
from hf_mbp.cli.errors import EXIT_CODE, UserError, say, user_errors
from hf_mbp.cli.help import option_sections
from hf_mbp.cli.plan_text import as_text
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run

_INTRODUCTION = f"""\
usage: hf-mbp plan RECIPE.yaml [--steps 3] [--output plan.png] [--device cuda] [--option value ...]

Show how a recipe would train, before it does: the lengths of its rows, the micro-batches of a few steps with what is
wasted on padding, and the predicted memory. Needs neither the weights of the model nor the device.

  hf-mbp plan recipes/text_classification/spam.yaml
  hf-mbp plan my.yaml --device cuda --memory_limit 24GiB --bf16

The exit code is {EXIT_CODE} after a mistake in the recipe or the options.

plan
  --steps                   steps to draw [3]
  --output                  where to draw them [plan.png]
  --device                  what to plan for, cpu or cuda; it need not be there [the one that is]"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is this script's own."""

    steps: int
    output: Path
    device: torch.device


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, lambda _: "\n\n".join((_INTRODUCTION, *option_sections())), _plan)


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
