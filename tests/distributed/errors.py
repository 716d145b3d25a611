"""Prints the table of docs/distributed.md: how far training on several processes is from plain PyTorch.

    python -m tests.distributed.errors [--write]

Needs what `scripts/test.sh` installs. `--write` puts the table into the page.
"""

import argparse
import tempfile
from pathlib import Path

import accelerate
import torch
import transformers

from tests.distributed.cases import Case
from tests.distributed.reference import GROUPS, compared

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
START, END = "<!-- errors of several processes -->", "<!-- end of errors -->"

STRATEGIES = {"ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def label(name: str, case: Case, ranks: int) -> str:
    """The first columns of the line of a case; its name without what the other columns say."""
    words = [word for word in name.split(", ") if word not in (*STRATEGIES, "on four")]
    return f"| {STRATEGIES[case.strategy]} | {ranks} | {', '.join(words) or 'even'} |"


def lines_of(group: str) -> list[str]:
    """Lines of the table for the cases of one launch."""
    with tempfile.TemporaryDirectory() as folder:
        saved = GROUPS[group].run(Path(folder))
    lines = []
    for name, case in GROUPS[group].cases.items():
        comparison = compared(case, saved[name])
        assert set(comparison.steps) == {comparison.expected_steps}, name
        errors = f"{comparison.expected_steps} | {comparison.weights:.0e} | {comparison.losses:.0e} |"
        lines.append(f"{label(name, case, GROUPS[group].ranks)} {errors}")
    return lines


def table() -> str:
    """The whole table, with the versions it was made with."""
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    head = ["| strategy | processes | what | steps | weights | losses |", "| --- | ---: | --- | ---: | ---: | ---: |"]
    lines = [line for group in GROUPS for line in lines_of(group)]
    return "\n".join([*head, *lines, "", f"Made with {versions}, gloo on a CPU."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/distributed.md")
    made = table()
    if parser.parse_args().write:
        before, rest = PAGE.read_text().split(START)
        PAGE.write_text(f"{before}{START}\n\n{made}\n\n{END}{rest.split(END)[1]}")
    else:
        print(made)


if __name__ == "__main__":
    main()
