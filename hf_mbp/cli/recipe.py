"""A recipe: one flat YAML file, every key of which is also an option of the command line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_mbp.cli.arguments import DataArguments, ModelArguments, RunArguments
from hf_mbp.cli.errors import UserError, user_errors
from hf_mbp.cli.sources import is_there, resolve_config, resolve_file
from hf_mbp.cli.task_options import refuse_options_of_others
from hf_mbp.cli.training_arguments import TRL_TASKS, check_training_arguments, training_arguments
from hf_mbp.config import MBPConfig

OWN_CLASSES = (RunArguments, ModelArguments, DataArguments, MBPConfig)
DEFAULT_TASK = RunArguments().task
SUFFIXES = (".yaml", ".yml")
"""Of a recipe's name."""
# Never written to recipe.yaml: a run's folder is made to be shared.
SECRETS = frozenset(("hub_token", "push_to_hub_token"))

Values = dict[str, Any]
Arguments = TypeVar("Arguments")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a run was asked to do.

    ``given`` holds the values that the YAML file or the command line named, ``folder`` is where relative data paths
    are looked up when they do not exist in the working directory. The path of ``config_name`` is looked up already.
    """

    run: RunArguments
    model: ModelArguments
    data: DataArguments
    mbp: MBPConfig
    train: TrainingArguments
    given: Values
    folder: Path


def read_recipe(argv: Sequence[str]) -> Recipe:
    """Read ``[RECIPE.yaml] [--option value ...]``; the command line wins.

    Raises:
        UserError: an unknown key, a value of the wrong type, or a combination that makes no sense.
    """
    task = find_task_name(argv)
    parser = recipe_parser(task)
    word, from_command_line = parse_options(parser, argv)
    file = None if word is None else Path(word)
    if word is not None and not word.endswith(SUFFIXES):  # by which its task was found
        raise UserError(f"command line: {word} is no recipe; give it a name that ends in {' or '.join(SUFFIXES)}")
    from_file = {} if file is None else read_yaml(parser, file)
    if from_file.get("trust_remote_code") and "trust_remote_code" not in from_command_line:
        raise UserError(
            f"recipe {file}: trust_remote_code would run code that comes with the model; if you trust it, type"
            " --trust_remote_code, for a recipe cannot say so"
        )
    given = {**from_file, **from_command_line}
    folder = Path.cwd() if file is None else file.parent
    if given.get("config_name") is not None:
        given["config_name"] = resolve_config(given["config_name"], folder)
    _check_together(task, given)
    with user_errors("bad option", (ValueError, TypeError, ImportError)):
        return Recipe(
            run=_fill(RunArguments, given),
            model=_fill(ModelArguments, given),
            data=_fill(DataArguments, given),
            mbp=_fill(MBPConfig, given),
            train=_fill_training(training_arguments(task), given),
            given=given,
            folder=folder,
        )


def _check_together(task: str, given: Values) -> None:
    """What no option can tell by itself.

    Raises:
        UserError: options that say nothing without another one, or with this task.
    """
    if given.get("packing") and given.get("max_length") is None:
        raise UserError("packing needs max_length: rows are put together up to so many tokens; write one, such as 1024")
    if given.get("eval_packing") and not given.get("packing"):
        raise UserError(
            "eval_packing goes with packing: TRL tells packed rows apart only where it packs those of training"
        )
    if given.get("use_peft") and task not in TRL_TASKS:
        raise UserError(f"use_peft: adapters are trained by {' and '.join(TRL_TASKS)}, not by task {task}")
    refuse_options_of_others(task, given)


def _fill_training(arguments: type[TrainingArguments], given: Values) -> TrainingArguments:
    """The arguments of a library, which looks at some values without saying whose they are."""
    try:
        return _made(arguments, given)
    except Exception as error:  # of any kind: a file that is missing, a text where a dictionary should be
        names = [name for name in given if name in field_types(arguments) and not _is_taken(arguments, given, name)]
        unnamed = [f"{name} is {given[name]!r:.60}" for name in names if name not in str(error)]
        raise UserError(f"bad option: {', '.join(unnamed)}{': ' if unnamed else ''}{error}") from error


def _made(arguments: type[TrainingArguments], given: Values) -> TrainingArguments:
    made = _fill(arguments, given)
    check_training_arguments(made)
    return made


def _is_taken(arguments: type[TrainingArguments], given: Values, name: str) -> bool:
    """Whether an option is taken alone, but for where to write and what to compute on."""
    try:
        _made(arguments, {key: given[key] for key in ("output_dir", "use_cpu", name) if key in given})
    except Exception:
        return False
    return True


def _fill(arguments: type[Arguments], given: Values) -> Arguments:
    names = field_types(arguments)
    return arguments(**{name: value for name, value in given.items() if name in names})


class _Parser(HfArgumentParser):
    """Reports mistakes as exceptions, so that the caller can say in which file they are."""

    def error(self, message: str) -> NoReturn:
        """Raise, with ``--max_length: ...`` instead of ``argument --max_length/--max-length: ...``."""
        raise UserError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


def find_task_name(argv: Sequence[str]) -> str:
    """Return the task, which says what the other options are: on the command line, in the recipe, or the default.

    Without the options it is not known which word is the recipe; it is taken to be one that ends like YAML.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--task")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    if known.task is not None:
        return str(known.task)
    files = [Path(word) for word in rest if word.endswith(SUFFIXES) and is_there(Path(word))]
    return str(_load_mapping(files[0]).get("task", DEFAULT_TASK)) if files else DEFAULT_TASK


def recipe_parser(task: str = DEFAULT_TASK) -> argparse.ArgumentParser:
    """Return the parser of a task's options. Abbreviations are off: a new option could change what they mean."""
    classes = (*OWN_CLASSES, training_arguments(task))
    parser: argparse.ArgumentParser = _Parser(classes, prog="hf-mbp train", allow_abbrev=False)
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="flat YAML file with any of the options below")
    return parser


def field_types(arguments: type) -> dict[str, tuple[type, ...]]:
    """Return the fields that can be set, and the types each may have: ``X | None`` gives ``X`` and ``NoneType``."""
    hints = get_type_hints(arguments)
    return {field.name: _members(hints[field.name]) for field in dataclasses.fields(arguments) if field.init}


def _members(hint: Any) -> tuple[type, ...]:
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(member for part in get_args(hint) for member in _members(part))
    return (get_origin(hint) or hint,)


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[str | None, Values]:
    """Return the word that is no option, if there is one, and the values of the options that are given.

    Raises:
        UserError: an option that is not known, or has a value of the wrong type.
    """
    with user_errors("command line", UserError):
        given, unknown = _parse_given(parser, argv)
    if unknown:
        raise UserError(
            f"command line: {unknown[0]} is not an option{_close_matches(parser, unknown[0].lstrip('-').split('=')[0])}"
        )
    return given.pop("recipe", None), given


def _parse_given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[Values, list[str]]:
    """Parse without filling in defaults: what is in the result was really written."""
    missing = object()
    names = ("recipe", *_kinds(parser))
    namespace, unknown = parser.parse_known_args(list(argv), argparse.Namespace(**dict.fromkeys(names, missing)))
    return {name: value for name, value in vars(namespace).items() if value is not missing}, unknown


def read_yaml(parser: argparse.ArgumentParser, file: Path) -> Values:
    """Return the values of a YAML file, each as the type that its field has.

    Raises:
        UserError: naming the file, and the key that is unknown, written twice or of the wrong type.
    """
    kinds = _kinds(parser)
    values: Values = {}
    for key, value in _load_mapping(file).items():
        if key not in kinds:
            raise UserError(f"recipe {file}: {key!r} is not a known key{_close_matches(parser, str(key))}")
        with user_errors(f"recipe {file}: key {key!r}", UserError):
            values[key] = _convert(parser, key, value, kinds[key])
    return values


def _load_mapping(file: Path) -> Mapping[Any, Any]:
    with user_errors(f"recipe {file}", Exception):  # of dates, numbers and depths PyYAML lets through what is raised
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    if not isinstance(root, yaml.MappingNode) or not isinstance(content, dict):
        raise UserError(f"recipe {file}: it must be a mapping of keys to values, such as 'learning_rate: 3e-5'")
    keys = [key.value for key, _ in root.value]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise UserError(f"recipe {file}: {twice!r} is written twice")
    return content


def _convert(parser: argparse.ArgumentParser, key: str, value: Any, kinds: tuple[type, ...]) -> Any:
    """Return a YAML value as the field's type, by the command line's rules: YAML itself reads 3e-5 as text."""
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return "true" if value else None
    if type(value) in kinds and not isinstance(value, str):
        return value
    if value is None or isinstance(value, (bool, list, dict)):
        raise UserError(_wrong_kind(value, kinds))
    given, _ = _parse_given(parser, [f"--{key}={value}"])
    return given[key]


def _wrong_kind(value: Any, kinds: tuple[type, ...]) -> str:
    if isinstance(value, bool) and not {int, float} & set(kinds):
        return "YAML reads yes, no, on and off as true and false; write the value in quotes"
    wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds if kind is not type(None))
    return f"it is {'empty' if value is None else f'a {type(value).__name__}'}, but must be {wanted}"


def _kinds(parser: Any) -> dict[str, tuple[type, ...]]:
    """The types of all options of a parser."""
    return {name: kind for arguments in parser.dataclass_types for name, kind in field_types(arguments).items()}


def _close_matches(parser: argparse.ArgumentParser, name: str) -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), list(_kinds(parser)), n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def dump_recipe(recipe: Recipe) -> str:
    """Return YAML that repeats the run: what was given, and every option of ours with the value it had."""
    values = {k: v for k, v in recipe.given.items() if k not in SECRETS}
    for arguments in (recipe.run, recipe.model, recipe.data, recipe.mbp):
        values.update(dataclasses.asdict(arguments))
    for key in ("train_file", "validation_file"):
        if values[key] is not None:  # the file that was read, wherever the saved recipe is used
            values[key] = str(resolve_file(values[key], recipe.folder))
    for key in ("overwrite_output_dir", "resume_from_checkpoint", "debug_traceback", "dry_run"):
        values.pop(key, None)  # they are about one start of the script, not about the run
    return str(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False, allow_unicode=True))
