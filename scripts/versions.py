"""Runs the core of the test suite with the oldest or the newest versions of what the package needs.

    python scripts/versions.py lowest
    python scripts/versions.py newest -x -k equivalence     # further words go to pytest
    python scripts/versions.py lowest --show                # only prints what it would do

Each has an environment of its own, `.venv-lowest` or `.venv-newest`, made anew. "Lowest" are the versions that
pyproject.toml names as the least, those of its extras `recipes` and `trl` included. "Core" is what needs neither
sentence-transformers nor DeepSpeed, which belong to no extra. It needs Python 3.11 (tomllib); PYTHON names the
one to make environments with.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]

TOOLS = ("hypothesis", "optuna", "pytest", "pytest-timeout", "pytest-xdist", "schedulefree", "tensorboard")
"""Of the development extra, what the core of the tests needs."""

FOR_IMAGES = "torchvision"
"""What reads images with transformers 5.17; 5.24 does without."""

CORE = (
    "tests/cli",
    "tests/contract",
    "tests/test_compat.py",
    "tests/test_cuts.py",
    "tests/test_equivalence.py",
    "tests/test_evaluation.py",
    "tests/test_first_step.py",
    "tests/test_layers.py",
    "tests/test_loop.py",
    "tests/test_losses.py",
    "tests/test_plan.py",
    "tests/test_recovery.py",
    "tests/test_released.py",
    "tests/test_step.py",
    "tests/test_trainer.py",
    "tests/test_trl.py",
)

WHICH = ("lowest", "newest")


def main(words: list[str]) -> int:
    """Make the environment, install, test; return the exit code of the tests."""
    if not words or words[0] not in WHICH:
        print(__doc__, file=sys.stderr)
        return 2
    which, show = words[0], "--show" in words
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for command in commands(which, [word for word in words[1:] if word != "--show"]):
        print("+", " ".join(command), flush=True)
        if not show:
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode  # noqa: S603 - no shell
            if code:
                return code
    return 0


def commands(which: str, for_pytest: list[str]) -> list[list[str]]:
    """What to run, in order."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    venv = f".venv-{which}"
    python = f"{venv}/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + extras["recipes"] + extras["trl"]
    needed = [lowest(requirement) for requirement in needed] if which == "lowest" else needed
    tools = [tool for tool in extras["dev"] if name_of(tool) in TOOLS]
    tools += [FOR_IMAGES] if which == "lowest" else []
    return [
        [os.environ.get("PYTHON", sys.executable), "-m", "venv", "--clear", venv],
        [*pip, *needed, *tools],  # together, so that no tool raises what is to be the lowest
        [*pip, "--no-deps", "--editable", "."],
        [python, "-m", "pip", "check", "--disable-pip-version-check"],
        [python, "-m", "pip", "list", "--disable-pip-version-check"],
        [python, "-m", "pytest", "-n", "auto", "--quiet", *CORE, *for_pytest],
    ]


def lowest(requirement: str) -> str:
    """The lowest version that a requirement allows: `torch>=2.11` gives `torch==2.11`, which pip reads as 2.11.0."""
    return requirement.replace(">=", "==")


def name_of(requirement: str) -> str:
    """The project that a requirement names."""
    return re.split(r"[\[<>=~! ]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
