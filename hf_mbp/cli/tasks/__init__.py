"""The tasks: one module each, that turns rows into a model and the data to train it on.

A new task is a module with a ``prepare`` function like those here, and a line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.tasks import instruction_tuning, language_modeling, preference_tuning, text_classification
from hf_mbp.cli.tasks.base import Prepare

TASKS: Mapping[str, Prepare] = {
    "instruction_tuning": instruction_tuning.prepare,
    "language_modeling": language_modeling.prepare,
    "preference_tuning": preference_tuning.prepare,
    "text_classification": text_classification.prepare,
}


def find_task(name: str) -> Prepare:
    """Return the ``prepare`` function of a task.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"task is {name!r}; write one of {', '.join(TASKS)}")
    return TASKS[name]
