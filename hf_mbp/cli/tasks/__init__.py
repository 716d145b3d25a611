"""The tasks: one module each, that turns rows into a model and the data to train it on.

A new task is a module with a ``prepare`` function like those here, and a line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Mapping

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.tasks import (
    language_modeling,
    masked_language_modeling,
    question_answering,
    text_classification,
    token_classification,
)
from hf_mbp.cli.tasks.base import Prepare

TASKS: Mapping[str, Prepare] = {
    "language_modeling": language_modeling.prepare,
    "masked_language_modeling": masked_language_modeling.prepare,
    "question_answering": question_answering.prepare,
    "text_classification": text_classification.prepare,
    "token_classification": token_classification.prepare,
}


def find_task(name: str) -> Prepare:
    """Return the ``prepare`` function of a task.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"task is {name!r}; write one of {', '.join(TASKS)}")
    return TASKS[name]
