"""Which options belong to which tasks: with any other task they would be ignored without a word."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.errors import UserError

_CONVERSATIONS = ("language_modeling", "instruction_tuning")

OPTIONS_OF_TASKS: Mapping[tuple[str, ...], tuple[str, ...]] = MappingProxyType(
    {
        ("text_classification",): ("text_pair_column",),
        ("text_classification", "image_classification"): ("label_column",),
        ("image_classification",): ("image_column",),
        ("token_classification",): ("words_column", "tags_column"),
        ("question_answering",): (
            *("question_column", "context_column", "answers_column"),
            *("doc_stride", "max_answer_length"),
        ),
        ("masked_language_modeling",): ("mlm_probability",),
        _CONVERSATIONS: ("answer_column", "messages_column", "assistant_only_loss"),
        (*_CONVERSATIONS, "preference_tuning"): ("prompt_column",),
        ("preference_tuning",): ("chosen_column", "rejected_column", "rejected_from_other_rows"),
        ("sequence_to_sequence",): (
            *("source_column", "target_column", "source_prefix", "max_source_length", "max_target_length"),
            "predict_with_generate",
        ),
        ("embedding",): ("query_column", "passage_column", "similarity_scale"),
    }
)
"""Options that all tasks have, or may have, are not here."""

_DEFAULTS: Mapping[str, Any] = MappingProxyType({"predict_with_generate": False, **vars(DataArguments(train_file="-"))})


def refuse_options_of_others(task: str, given: Mapping[str, Any]) -> None:
    """Refuse what another task would do; a saved recipe may name all options, with the values that they have anyway.

    Raises:
        UserError: an option that says nothing with this task.
    """
    for tasks, names in OPTIONS_OF_TASKS.items():
        for name in names:
            if name in given and given[name] != _DEFAULTS[name] and task not in tasks:
                raise UserError(f"{name} is an option of {' and '.join(tasks)}, not of {task}; leave it out")
