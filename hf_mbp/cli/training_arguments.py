"""Which class of training arguments a task has: that of its trainer. Its fields are options of the task."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from hf_mbp.cli.arguments import TrainArguments
from hf_mbp.cli.errors import UserError

# Trained by TRL; the others by the Trainer of transformers.
TRL_TASKS = ("instruction_tuning", "preference_tuning")


def training_arguments(task: str) -> type[Any]:
    """Return the class; for a task that is not known, too, which is for others to tell.

    Raises:
        UserError: TRL is needed and not installed.
    """
    if task not in TRL_TASKS:
        return TrainArguments
    require_extra("trl", f"task {task}")
    from hf_mbp.cli import trl_arguments

    return trl_arguments.CLASSES[task]


def require_extra(package: str, needed_by: str) -> None:
    """Check that a package is installed which is optional.

    Raises:
        UserError: it is not.
    """
    if find_spec(package) is None:
        raise UserError(f"{needed_by} needs the package {package}; run: pip install 'hf-mbp[trl]'")
