"""The tasks: one module each, that turns rows into a model and the data to train it on.

A new task is a module with a ``prepare`` function like those here, and a line in ``TASKS``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_mbp.cli.arguments import ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.models import load_image_processor, load_tokenizer
from hf_mbp.cli.tasks import (
    embedding,
    image_classification,
    instruction_tuning,
    language_modeling,
    masked_language_modeling,
    preference_tuning,
    question_answering,
    sequence_to_sequence,
    text_classification,
    token_classification,
)
from hf_mbp.cli.tasks.base import Prepare

TASKS: Mapping[str, Prepare] = {
    "embedding": embedding.prepare,
    "image_classification": image_classification.prepare,
    "instruction_tuning": instruction_tuning.prepare,
    "language_modeling": language_modeling.prepare,
    "masked_language_modeling": masked_language_modeling.prepare,
    "preference_tuning": preference_tuning.prepare,
    "question_answering": question_answering.prepare,
    "sequence_to_sequence": sequence_to_sequence.prepare,
    "text_classification": text_classification.prepare,
    "token_classification": token_classification.prepare,
}

_PROCESSORS: Mapping[str, Callable[[ModelArguments, PreTrainedConfig], Any]] = {
    "image_classification": load_image_processor,
}
"""What to load where it is no tokenizer."""


def find_task(name: str) -> Prepare:
    """Return the ``prepare`` function of a task.

    Raises:
        UserError: there is no such task.
    """
    if name not in TASKS:
        raise UserError(f"task is {name!r}; write one of {', '.join(TASKS)}")
    return TASKS[name]


def load_processor(task: str, arguments: ModelArguments, config: PreTrainedConfig) -> Any:
    """Load what makes inputs of the rows of a task: the model's tokenizer, or its image processor."""
    return _PROCESSORS.get(task, load_tokenizer)(arguments, config)
