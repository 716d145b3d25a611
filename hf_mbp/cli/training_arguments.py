"""Which class of training arguments a task has: that of its trainer. Its fields are options of the task."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from hf_mbp.cli.errors import UserError

# Trained by TRL; the others by the Trainer of transformers.
TRL_TASKS = ("instruction_tuning", "preference_tuning")

SEEDS = 2**32
"""What NumPy can be seeded with."""


class KeepsNoToken:
    """Arguments whose pickle has no token; put it before a class of training arguments.

    Trainer writes its arguments as a pickle into every checkpoint, and uploads it with the model.
    """

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the token of the Hub."""
        return {**self.__dict__, "hub_token": None}


class TrainArguments(KeepsNoToken, Seq2SeqTrainingArguments):
    """transformers' own arguments, under a heading of their own in the help."""

    _argument_group_name = "training (transformers.Seq2SeqTrainingArguments)"


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


def check_training_arguments(arguments: Any) -> None:
    """Check what transformers takes, and only stumbles over when it trains.

    Raises:
        ValueError: naming the option, its value and what to write.
    """
    get_reporting_integration_callbacks(arguments.report_to)
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; write a whole number from 1")
    for name in ("seed", "data_seed"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < SEEDS:
            raise ValueError(f"{name} is {value}; write a whole number from 0 to {SEEDS - 1}")
    if not 0 <= arguments.num_train_epochs < math.inf:
        raise ValueError(f"num_train_epochs is {arguments.num_train_epochs}; write a number from 0, such as 3")
    for name, value in vars(arguments).items():
        if name.endswith("_kwargs") and value is not None and not isinstance(value, dict):
            raise ValueError(f"{name} is {value!r:.60}; write a mapping, such as {{name: value}}")
    if getattr(arguments, "generation_config", None) is not None:
        _check_generation_config(arguments.generation_config)


def _check_generation_config(value: Any) -> None:
    try:
        Seq2SeqTrainer.load_generation_config(value)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"generation_config is {str(value)!r:.60}; write a folder with a generation_config.json, such a file, or a "
            f"model on the Hub that has one ({error})"
        ) from error


def require_extra(package: str, needed_by: str) -> None:
    """Check that a package is installed which is optional.

    Raises:
        UserError: it is not.
    """
    if find_spec(package) is None:
        raise UserError(f"{needed_by} needs the package {package}; run: pip install 'hf-mbp[trl]'")
