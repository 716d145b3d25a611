"""Check without training whether micro-batches are exact for a recipe's model, data and options."""

from __future__ import annotations

import argparse
import tempfile
import textwrap
from collections.abc import Sequence

from hf_mbp.cli.command import run_command
from hf_mbp.cli.errors import FAILED, UserError, say, user_errors
from hf_mbp.cli.finetune import build_trainer
from hf_mbp.cli.recipe import Recipe, read_recipe
from hf_mbp.equivalence import EquivalenceReport, check_equivalence

NOT_EXACT = FAILED

_WIDTH = 100
_FEWEST_ROWS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, _check)


def _check(argv: Sequence[str]) -> int:
    num_rows, rest = _take_num_rows(argv)
    with tempfile.TemporaryDirectory() as folder:
        report = check(read_recipe([*rest, "--output_dir", folder]), num_rows)
    say(as_text(report))
    return 0 if report.is_exact else NOT_EXACT


def _take_num_rows(argv: Sequence[str]) -> tuple[int, list[str]]:
    """The option that is this script's own, and the others."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--num_rows", "--num-rows", default="8")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    if not known.num_rows.isdecimal() or int(known.num_rows) < _FEWEST_ROWS:
        raise UserError(
            f"command line: --num_rows is {known.num_rows!r}; write a whole number from {_FEWEST_ROWS}, such as 8"
        )
    return int(known.num_rows), rest


def check(recipe: Recipe, num_rows: int) -> EquivalenceReport:
    """Load what the recipe names, as for training, and compare `num_rows` rows whole and split.

    Raises:
        UserError: it cannot be loaded, or there is nothing to compare.
    """
    recipe.train.push_to_hub = False  # or the trainer would make a repository on the Hub as soon as it is made
    trainer = build_trainer(recipe)
    with user_errors("the check refuses", ValueError):
        return check_equivalence(trainer, num_rows)


def as_text(report: EquivalenceReport) -> str:
    """Return the verdict, the numbers and the findings, in lines of at most 100 characters."""
    verdict = "exact: micro-batches give the gradient of the whole batch"
    if not report.is_exact:
        verdict = "NOT exact: micro-batches give another gradient than the whole batch"
    numbers = {
        "rows": f"{report.num_rows}, as one batch and as {report.num_micro_batches} micro-batches",
        "loss": f"{report.whole_loss:.8g} whole, {report.split_loss:.8g} split",
        "largest relative error": f"{report.max_relative_error:.2g} (up to {report.tolerance:g} is rounding)",
        "of the gradient of": report.worst_parameter,
    }
    lines = [verdict, "", *(f"  {name:<24}{value}" for name, value in numbers.items())]
    for reservation in report.reservations:
        lines += ["", *_wrapped(f"Checked {reservation}.", "  ")]
    for finding in report.findings:
        lines += ["", *_wrapped(finding, "- ")]
    return "\n".join(lines)


def _wrapped(text: str, start: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
