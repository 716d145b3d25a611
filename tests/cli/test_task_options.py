"""Options are refused with tasks that would ignore them."""

from collections import Counter

import pytest

from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import field_types
from hf_mbp.cli.task_options import OPTIONS_OF_TASKS, refuse_options_of_others
from hf_mbp.cli.tasks import TASKS
from hf_mbp.cli.training_arguments import training_arguments

OF_ALL = {
    *("dataset_name", "dataset_config_name", "train_split", "validation_split", "train_file", "validation_file"),
    *("validation_fraction", "text_column", "preparation", "max_length", "max_train_samples", "max_eval_samples"),
    "preprocessing_num_workers",
}
"""Options about data that every task has, or may have: rows of any task may be made of texts."""


def test_every_option_about_data_has_its_tasks() -> None:
    named = Counter(name for names in OPTIONS_OF_TASKS.values() for name in names)
    assert set(named.values()) == {1}
    assert (set(named) | OF_ALL) - {"predict_with_generate"} == set(field_types(DataArguments))
    assert "predict_with_generate" in field_types(training_arguments("sequence_to_sequence"))
    assert {task for tasks in OPTIONS_OF_TASKS for task in tasks} <= set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_an_option_is_taken_by_its_tasks_and_refused_by_others(task: str) -> None:
    for tasks, names in OPTIONS_OF_TASKS.items():
        given = dict.fromkeys(names, "another value")
        if task in tasks:
            refuse_options_of_others(task, given)
        else:
            with pytest.raises(UserError, match=f"^{names[0]} is an option of {' and '.join(tasks)}, not of {task}; "):
                refuse_options_of_others(task, given)


def test_values_that_options_have_anyway_are_taken() -> None:
    """A recipe that was saved names them."""
    refuse_options_of_others("embedding", {**vars(DataArguments(train_file="a")), "predict_with_generate": False})
