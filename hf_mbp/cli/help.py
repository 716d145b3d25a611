"""The short help of the command that trains."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable

from hf_mbp.cli.arguments import DataArguments, ModelArguments, RunArguments
from hf_mbp.config import MBPConfig

_WIDTH = 110
_NAME_WIDTH = 28

_INTRODUCTION = """\
usage: hf-mbp train [RECIPE.yaml] [--option value ...]

Fine-tune a model with micro-batches that fit the device and waste almost nothing on padding. A recipe is a flat YAML
file of the options below; what the command line says wins.

  hf-mbp train RECIPE.yaml --dry_run                    all but training: reads, loads, shows the plan
  hf-mbp train RECIPE.yaml                              one process
  accelerate launch -m hf_mbp.cli train RECIPE.yaml     as many as accelerate is configured for

The exit code is 0 if all went well, 1 if the run failed, 2 after a mistake in the recipe, the options or the data."""

_END = """\
training
  Every field of transformers.Seq2SeqTrainingArguments is an option, too: --output_dir, --learning_rate,
  --num_train_epochs, --per_device_train_batch_size, --seed, --bf16, ... --help_all lists them.
  Tasks instruction_tuning and preference_tuning have those of trl.SFTConfig (--packing, --loss_type, ...) and
  trl.DPOConfig (--beta, --loss_type, ...), with TRL's defaults; --task instruction_tuning --help_all lists them.
  --resume_from_checkpoint last (or a folder) goes on with an interrupted run."""

_SECTIONS: tuple[tuple[str, type], ...] = (
    ("run", RunArguments),
    ("model", ModelArguments),
    ("data", DataArguments),
    ("micro-batches", MBPConfig),
)


def short_help() -> str:
    """Return the help text: our own options in full, transformers' by name of their class."""
    return "\n\n".join((_INTRODUCTION, *option_sections(), _END))


def option_sections() -> list[str]:
    """Return our own options under the headings of their classes, for every script that reads recipes."""
    return ["\n".join((title, *_options(arguments))) for title, arguments in _SECTIONS]


def _options(arguments: type) -> Iterable[str]:
    for field in dataclasses.fields(arguments):
        text = str(field.metadata.get("help", ""))
        if field.default not in (None, dataclasses.MISSING):
            text += f" [{field.default}]"
        name = f"  --{field.name}"
        # A long name has the line to itself.
        first, rest = (name.ljust(_NAME_WIDTH), "") if len(name) < _NAME_WIDTH else (name, "\n" + " " * _NAME_WIDTH)
        lines = textwrap.wrap(text, _WIDTH - _NAME_WIDTH) or [""]
        yield first + rest + ("\n" + " " * _NAME_WIDTH).join(lines)
