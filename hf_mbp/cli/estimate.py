"""Predict the memory that training takes, and the budget that fits a device, from a model's configuration alone."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from hf_mbp.byte_sizes import parse_memory_limit
from hf_mbp.cli.arguments import ModelShape
from hf_mbp.cli.command import run_command
from hf_mbp.cli.errors import UserError, say, user_errors
from hf_mbp.cli.heads import HEADS, USUAL_WIDTH
from hf_mbp.cli.images import PIXELS
from hf_mbp.cli.models import described, load_config, load_model
from hf_mbp.cli.plan_memory import reference_bytes
from hf_mbp.cli.recipe import SUFFIXES, Values, parse_options, read_recipe, recipe_parser
from hf_mbp.cli.shapes import row_sizes, set_up
from hf_mbp.cli.training_arguments import TrainArguments
from hf_mbp.collate import has_targets
from hf_mbp.estimate import MemoryEstimate, estimate_max_tokens, estimate_memory
from hf_mbp.memory import DEFAULT_FRACTION

_OF_TRAINING = ("bf16", "fp16", "gradient_checkpointing", "optim")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is this command's own."""

    rows: int
    width: int | None
    target_width: int | None
    device: str
    device_memory: tuple[str, ...]
    fsdp_ranks: int
    head: str | None


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model without weights, and how it is trained: `options` are those of `estimate_memory`.

    `width` is that of its rows, of their source if they have a target, too. `counted` is what the memory is
    predicted by, the model itself or one around it, and `reference_bytes` of a second model that is kept beside it.
    """

    model: PreTrainedModel
    counted: Any
    width: int
    options: dict[str, Any]
    reference_bytes: int = 0

    def estimate(self, rows: int) -> MemoryEstimate:
        """Predict the memory of a micro-batch of so many rows."""
        estimate = estimate_memory(self.counted, rows, self.width, **self.options)
        return replace(estimate, parameter_bytes=estimate.parameter_bytes + self.reference_bytes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, _estimate)


def _estimate(argv: Sequence[str]) -> None:
    options, rest = _take_options(argv)
    source, given = parse_options(recipe_parser(), rest)
    if source is None:
        raise UserError("command line: name a model or a recipe: hf-mbp estimate MODEL|RECIPE.yaml")
    subject = _of_recipe(rest, options) if source.endswith(SUFFIXES) else _of_model(source, given, options)
    with user_errors("the memory cannot be predicted", (ValueError, ImportError)):
        estimate = subject.estimate(options.rows)
    say(as_text(subject, options.rows, estimate))
    for device_memory in options.device_memory:
        say(_fitting(subject, device_memory))


def _take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that are this command's own, and the others."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    for name, default in (("rows", "8"), ("width", None), ("target_width", None), ("fsdp_ranks", "1")):
        parser.add_argument(f"--{name}", f"--{name}".replace("_", "-"), default=default)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--device_memory", "--device-memory", default="24GiB")
    parser.add_argument("--head")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    numbers = {name: _number(name, getattr(known, name)) for name in ("rows", "width", "target_width", "fsdp_ranks")}
    if known.device not in ("cpu", "cuda"):
        raise UserError(f"command line: --device is {known.device!r}; write cpu or cuda")
    if known.head is not None and known.head not in HEADS:
        raise UserError(f"command line: --head is {known.head!r}; write one of {', '.join(HEADS)}")
    sizes = tuple(_size(size) for size in known.device_memory.split(","))
    return Options(**{**vars(known), **numbers, "device_memory": sizes}), rest


def _number(name: str, word: str | None) -> int | None:
    if word is not None and not (word.isdecimal() and int(word) > 0):
        raise UserError(f"command line: --{name} is {word!r}; write a whole number from 1")
    return None if word is None else int(word)


def _size(word: str) -> str:
    try:
        is_size = isinstance(parse_memory_limit(word), int)
    except ValueError:
        is_size = False
    if not is_size:
        raise UserError(f"command line: --device_memory has {word!r}; write sizes such as 24GiB, or 24GiB,80GiB")
    return word


def _of_recipe(argv: Sequence[str], options: Options) -> Subject:
    if options.head is not None:
        raise UserError("command line: --head goes with a model; a recipe's task says which head it is")
    recipe = read_recipe(argv)
    setup = set_up(recipe)
    if options.width is not None and PIXELS in setup.train.column_names:
        raise UserError("command line: --width is of texts; the images of a recipe are as large as they are")
    width, *target_width = (int(longest) for longest in row_sizes(recipe, setup).max(axis=0))
    given = {name: getattr(recipe.train, name) for name in _OF_TRAINING}
    return Subject(
        model=setup.model,
        counted=setup.model_with_loss or setup.model,
        width=options.width or width,
        options={
            **_training(given, recipe.model.attn_implementation, options),
            "target_width": options.target_width or next(iter(target_width), None),
            "inputs": setup.inputs_of,
        },
        reference_bytes=reference_bytes(recipe, setup),
    )


def _of_model(name: str, given: Values, options: Options) -> Subject:
    shape = {f.name for f in fields(ModelShape)} - {"model_name_or_path"}
    for option in given:
        if option not in shape | {*_OF_TRAINING, "debug_traceback"}:
            raise UserError(f"command line: --{option} is an option of recipes; with a model, leave it out")
    with user_errors("command line"):
        arguments = ModelShape(model_name_or_path=name, **{key: given[key] for key in given if key in shape})
    config = load_config(arguments)
    head = options.head or _head_of(config, name)
    with user_errors(f"command line: --head {head}", UserError):
        model = load_model(getattr(transformers, HEADS[head][0]), arguments)
    defaults = {option: getattr(TrainArguments, option) for option in _OF_TRAINING}
    return Subject(
        model=model,
        counted=model,
        width=options.width or min(USUAL_WIDTH, getattr(config, "max_position_embeddings", None) or USUAL_WIDTH),
        options=_training({**defaults, **given}, arguments.attn_implementation, options),
    )


def _head_of(config: PreTrainedConfig, name: str) -> str:
    """The head that the checkpoint has."""
    (architecture, *_) = getattr(config, "architectures", None) or ("no class",)
    for head, (_, ends) in HEADS.items():
        if architecture.endswith(ends):
            return head
    raise UserError(
        f"model {name} is saved as {architecture}, which has no head to train; write --head with one of "
        f"{', '.join(HEADS)}"
    )


def _training(given: Mapping[str, Any], attn_implementation: str | None, options: Options) -> dict[str, Any]:
    """How it is trained, and on what, as `estimate_memory` takes it."""
    optim = given["optim"]
    return {
        "optimizer": str(getattr(optim, "value", optim)),
        "bf16": bool(given["bf16"]),
        "fp16": bool(given["fp16"]),
        "gradient_checkpointing": bool(given["gradient_checkpointing"]),
        "attn_implementation": attn_implementation,
        "target_width": options.target_width,
        "device": options.device,
        "fsdp_ranks": options.fsdp_ranks,
    }


def as_text(subject: Subject, rows: int, estimate: MemoryEstimate) -> str:
    """Return what was estimated, and the table of its parts."""
    options = subject.options
    precision = "bf16 autocast" if options["bf16"] else "fp16 autocast" if options["fp16"] else "no autocast"
    how = [precision, options["optimizer"], options["device"]]
    how += ["activation checkpointing"] if options["gradient_checkpointing"] else []
    how += ["with the reference model"] if subject.reference_bytes else []
    return f"{described(subject.model)}\n{rows:,} rows x {_widths(subject)}, {', '.join(how)}\n\n{estimate}\n"


def _widths(subject: Subject) -> str:
    if not has_targets(subject.model):
        return f"{subject.width:,} tokens"
    return f"{subject.width:,} tokens of the source and {_target_width(subject):,} of the target"


def _target_width(subject: Subject) -> int:
    return int(subject.options["target_width"] or subject.width) if has_targets(subject.model) else 0


def _fitting(subject: Subject, device_memory: str) -> str:
    """The largest budget of a device, or that there is none."""
    limit = int(parse_memory_limit(device_memory) or 0) - int(subject.reference_bytes / DEFAULT_FRACTION)
    try:
        tokens = estimate_max_tokens(subject.counted, subject.width, f"{max(1, limit)} B", **subject.options)
    except ValueError as error:
        reason = str(error).splitlines()[0].partition(": ")[2] or str(error)
        return f"{device_memory}: too small; {reason}"
    rows = tokens // (subject.width + _target_width(subject))
    return (
        f"{device_memory}: at most {tokens:,} tokens a micro-batch, {rows:,} rows of {_widths(subject)} "
        f"(max_tokens_per_micro_batch: {tokens})"
    )
