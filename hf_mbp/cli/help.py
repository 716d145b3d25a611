"""The short help of the fine-tuning script."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable

from hf_mbp.cli.arguments import DataArguments, ModelArguments, RunArguments
from hf_mbp.config import MBPConfig

_WIDTH = 110
_NAME_WIDTH = 28

_INTRODUCTION = """\
usage: finetune.py [RECIPE.yaml] [--option value ...]

Fine-tune a model with micro-batches that fit the device and waste almost nothing on padding. A recipe is a flat YAML
file of the options below; what the command line says wins.

  python scripts/finetune.py RECIPE.yaml                one process
  accelerate launch scripts/finetune.py RECIPE.yaml     as many as accelerate is configured for"""

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
