"""The kinds of input: how each is made, and what takes it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml

from fuzzing import checkpoints, tables
from fuzzing.mutations import ODD_VALUES, ODD_WORDS, spoiled_bytes
from fuzzing.trial import Input, WorkBegins
from hf_mbp.cli import bench, check, estimate, finetune, plan_memory, plan_plot
from hf_mbp.cli.main import COMMANDS, main
from hf_mbp.cli.recipe import field_types, recipe_parser
from hf_mbp.cli.tasks import TASKS

RECIPES = Path(__file__).resolve().parents[2] / "recipes"

YAML_WORDS: tuple[bytes, ...] = (
    *ODD_WORDS,
    *(
        b"- ",
        b"? ",
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!set ",
        b"!!int x",
        b"!!binary '@'",
        b"!!python/name:os.system",
        b"---\n",
    ),
    *(
        b"...\n",
        b"%YAML 9\n",
        b"|-\n",
        b">\n",
        b"# ",
        b"2020-13-45",
        b"12:61:61",
        b"0b",
        b"1_",
        b"=",
        b"~",
        b"no",
        b".inf",
    ),
    *(b"1" * 5000, b"&a [*a]", b"&a {a: *a}", b"{a: b}", b"[a, b]", b"@", b"`"),
)
"""Marks of YAML, and scalars that its readers stumble over."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of input.

    `make` gives one; `run` takes it and returns an exit code; `may_write` are the folders beside it that it writes to;
    `work` is where its work begins: there a trial ends.
    """

    says: str
    make: Callable[[Random], Input]
    run: Callable[[Input], int | None]
    work: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    may_write: tuple[str, ...] = ()


def _work_begins(*_: Any, **__: Any) -> Any:
    raise WorkBegins


def _run_command(tried: Input) -> int | None:
    return main(tried.argv)


# Recipes


def make_recipe(random: Random) -> Input:
    """A recipe with odd values, or with broken text."""
    task = random.choice(list(tables.TASKS))
    keys = _tiny_recipe(task)
    if random.randrange(3):
        names = _options(task)
        for _ in range(random.randint(1, 3)):
            keys[random.choice(names)] = random.choice(ODD_VALUES)
        text = _as_yaml(random, keys)
    else:
        text = spoiled_bytes(random, _as_yaml(random, keys), YAML_WORDS)
    return Input(
        argv=("train", "recipe.yaml", "--dry_run"),
        files={"recipe.yaml": text, **tables.right_files(task)},
    )


def right_recipe(task: str) -> dict[str, bytes]:
    """A recipe with nothing wrong, and its data."""
    return {"recipe.yaml": yaml.safe_dump(_tiny_recipe(task)).encode(), **tables.right_files(task)}


def _tiny_recipe(task: str) -> dict[str, Any]:
    return {
        "task": task,
        "output_dir": "run",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": "1e-3",
        "max_tokens_per_micro_batch": 64,
        "use_cpu": True,
        "report_to": "none",
        **tables.options(task),
    }


def _as_yaml(random: Random, keys: Mapping[str, Any]) -> bytes:
    if random.randrange(2):
        return yaml.safe_dump(dict(keys), sort_keys=False).encode()
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in keys.items()).encode("utf-8", "surrogatepass")


@cache
def _options(task: str) -> list[str]:
    return [
        name
        for arguments in recipe_parser(task).dataclass_types
        for name in field_types(arguments)
        if name not in STARTS_PROCESSES
    ]


OF_COMMANDS = ("rows", "width", "target_width", "head", "device", "device_memory", "fsdp_ranks", "steps", "output")
"""Options that only some of the commands have."""

STARTS_PROCESSES = ("preprocessing_num_workers",)
"""Options that fork: a trial has one process."""


@contextlib.contextmanager
def before_work() -> Iterator[None]:
    """Trials end where weights would be loaded, models run, or other processes started; memory is predicted once."""
    with contextlib.ExitStack() as stack:
        for module in (plan_memory, estimate):
            stack.enter_context(mock.patch.object(module, "estimate_memory", _remembered(module.estimate_memory)))
        stack.enter_context(mock.patch.object(plan_plot, "plot_plan", _work_begins))
        stack.enter_context(mock.patch.object(check, "build_trainer", _work_begins))
        stack.enter_context(mock.patch.object(bench, "_in_own_process", _work_begins))
        stack.enter_context(mock.patch.object(finetune, "build_trainer", _work_begins))
        yield


_ESTIMATES: dict[Any, Any] = {}


def _remembered(estimate_memory: Callable[..., Any]) -> Callable[..., Any]:
    def remembered(model: Any, rows: int, width: int, **options: Any) -> Any:
        key = (type(model), rows, width, *sorted((name, str(value)) for name, value in options.items()))
        if key not in _ESTIMATES:
            _ESTIMATES[key] = estimate_memory(model, rows, width, **options)
        return _ESTIMATES[key]

    return remembered


# The command line


def make_command(random: Random) -> Input:
    """Words of one of the commands, with changes."""
    task = random.choice(list(tables.TASKS))
    words = _right_words(random.choice(list(COMMANDS)), task)
    for _ in range(random.randint(1, 3)):
        words = _spoiled_words(random, words, task)
    return Input(argv=tuple(words), files=right_recipe(task))


def _right_words(command: str, task: str) -> list[str]:
    own = {
        "train": ["--dry_run"],
        "plan": ["--steps", "2", "--output", "plan.png", "--device", "cpu"],
        "check": [],
        "estimate": ["--rows", "8", "--width", "16", "--device", "cpu", "--device_memory", "1GiB"],
        "bench": ["--steps", "2"],
    }[command]
    if command == "estimate":
        return [command, tables.options(task)["config_name"], "--head", "masked_lm", *own]
    return [command, "recipe.yaml", *own, "--seed", "3", "--learning_rate=1e-4"]


def _as_word(word: bytes) -> str:
    """As Python gets it; no system lets zeros into a command line."""
    return os.fsdecode(word.replace(b"\0", b""))


def _spoiled_words(random: Random, words: list[str], task: str) -> list[str]:
    index = random.randrange(len(words))
    odd = [_as_word(str(value).encode("utf-8", "surrogatepass")) for value in ODD_VALUES]
    way = random.randrange(7)
    if way == 0:
        return words[:index] + words[index + 1 :] or ["train"]
    if way == 1:
        return [*words[:index], words[index], *words[index:]]
    if way == 2:
        return [*words[:index], random.choice(odd), *words[index + 1 :]]
    if way == 3:
        spoiled = _as_word(spoiled_bytes(random, os.fsencode(words[index])))
        return [*words[:index], spoiled, *words[index + 1 :]]
    option = random.choice(_options(task))
    name = random.choice((f"--{option}", f"--{option.replace('_', '-')}", f"--no_{option}", f"--{option[:-1]}"))
    return [*words, name, random.choice(odd)] if way < 6 else [*words, f"{name}={random.choice(odd)}"]


# Data files


def make_data(random: Random) -> Input:
    """A right recipe for a file with broken or strange content."""
    task = random.choice(list(tables.TASKS))
    name, content = tables.spoiled_file(random, task)
    keys = {**_tiny_recipe(task), "train_file": name}
    if random.randrange(4) == 0:
        keys |= {"train_file": tables.right_name(task), "validation_file": name}
    recipe = yaml.safe_dump(keys).encode()
    return Input(
        argv=("train", "recipe.yaml", "--dry_run"),
        files={"recipe.yaml": recipe, **tables.right_files(task), name: content},
    )


KINDS: Mapping[str, Kind] = {
    "recipe": Kind(
        says="recipes: odd values of all options, broken YAML", make=make_recipe, run=_run_command, work=before_work
    ),
    "command": Kind(says="command lines of the five commands", make=make_command, run=_run_command, work=before_work),
    "data": Kind(
        says="data files: CSV, TSV, JSON, JSON lines, Parquet, text",
        make=make_data,
        run=_run_command,
        work=before_work,
    ),
    "entries": Kind(
        says="what this library keeps in checkpoints: budget and cost, spoiled as values",
        make=checkpoints.make_entries,
        run=checkpoints.resume_with_entries,
        may_write=("new",),
    ),
    "checkpoint": Kind(
        says="checkpoints with a file that is broken, cut off or missing",
        make=checkpoints.make_checkpoint,
        run=_run_command,
        work=checkpoints.before_first_step,
        may_write=("run",),
    ),
}


def is_clear(line: str, tried: Input) -> bool:
    """Whether a message names what has to be looked at: an option, a file, a split of the data, the command line."""
    told = re.search("command line|is not a command|no command|error: recipe|(train|validation) rows", line)
    if told or any(Path(name).name in line for name in tried.files):
        return True
    words = set(re.findall(r"\w+", line))
    return bool(words & _names())


@cache
def _names() -> frozenset[str]:
    tasks = (name for task in TASKS for name in _options(task))
    return frozenset((*tasks, *STARTS_PROCESSES, *OF_COMMANDS))
