"""A few inputs of each kind of `scripts/fuzz.py`; and that it tells failures from what is right."""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fuzz import bench, made, tried
from fuzzing.kinds import KINDS, right_recipe
from fuzzing.tables import TASKS
from fuzzing.trial import Bench, Ending, Input
from hf_mbp.cli.errors import UserError, run_reporting_errors
from hf_mbp.cli.training_arguments import TRL_TASKS

INPUTS = 12
"""Of each kind: with more the test would take more than a few seconds."""
RIGHT = ("train", "recipe.yaml", "--dry_run")


@pytest.fixture(scope="module")
def place() -> Iterator[Bench]:
    with bench() as place:
        yield place


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_inputs(kind: str, place: Bench) -> None:
    trials = {number: tried(place, kind, made(kind, 0, number)) for number in range(INPUTS)}
    assert {number: trial for number, trial in trials.items() if trial.ending.is_failure} == {}
    assert Ending.REFUSED in {trial.ending for trial in trials.values()}


def test_an_input_is_made_again_by_its_number() -> None:
    assert made("data", 3, 5) == made("data", 3, 5) != made("data", 3, 6)


@pytest.mark.parametrize("task", [task for task in TASKS if task not in TRL_TASKS])  # which have tests of dry runs
def test_what_is_right_is_taken(task: str, place: Bench) -> None:
    """Or nothing would be learned from what is not."""
    trial = tried(place, "recipe", Input(argv=RIGHT, files=right_recipe(task)))
    assert trial.ending is Ending.ACCEPTED, trial.said


def raising(error: BaseException) -> Callable[[], int]:
    def run() -> int:
        def command() -> None:
            raise error

        return run_reporting_errors(command, [])

    return run


def say_in_two_lines() -> int:
    print("error: look at seed\nerror: and at task", file=sys.stderr)
    return 2


def connect() -> int:
    with socket.socket() as s:
        s.connect_ex(("127.0.0.1", 9))
    return 0


ENDINGS: dict[str, tuple[Callable[[], int], Ending]] = {
    "taken": (lambda: 0, Ending.ACCEPTED),
    "refused, with the option": (raising(UserError("seed is x")), Ending.REFUSED),
    "refused, with the file": (raising(UserError("rows.csv is empty")), Ending.REFUSED),
    "refused, with nothing": (raising(UserError("it does not work")), Ending.UNCLEAR),
    "refused in two lines": (say_in_two_lines, Ending.UNCLEAR),
    "exit code 1": (raising(KeyError("x")), Ending.TRACEBACK),
    "an exception": (lambda: 1 // 0, Ending.TRACEBACK),
    "written beside the input": (lambda: len(Path("new").write_text("")), Ending.WROTE),
    "a folder made": (lambda: os.mkdir("new") or 0, Ending.WROTE),
    "the input changed": (lambda: os.truncate("rows.csv", 0) or 0, Ending.WROTE),
    "written where it may": (lambda: Path("run").mkdir() or 0, Ending.ACCEPTED),
    "connected": (connect, Ending.WROTE),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_failures_are_told_from_what_is_right(name: str, place: Bench) -> None:
    run, ending = ENDINGS[name]
    trial = place.trial(Input(files={"rows.csv": b"a"}), run, may_write=("run",))
    assert trial.ending is ending, trial.said
