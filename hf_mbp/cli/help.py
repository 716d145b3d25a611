"""The help texts of the commands. Knows neither torch nor transformers: nobody waits for a help text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping

from hf_mbp.cli.arguments import DataArguments, ModelArguments, RunArguments
from hf_mbp.cli.errors import FAILED, MISTAKE
from hf_mbp.cli.heads import HEADS, USUAL_WIDTH
from hf_mbp.config import MBPConfig

_WIDTH = 110
_NAME_WIDTH = 28

_TRAIN = """\
usage: hf-mbp train [RECIPE.yaml] [--option value ...]

Fine-tune a model with micro-batches that fit the device and waste little on padding. A recipe is a flat YAML file of
the options below; what the command line says wins.

  hf-mbp train RECIPE.yaml --dry_run                    all but training: reads, loads, shows the plan
  hf-mbp train RECIPE.yaml                              one process
  accelerate launch -m hf_mbp.cli train RECIPE.yaml     as many as accelerate is configured for

The exit code is 0 if all went well, 1 if the run failed, 2 after a mistake in the recipe, the options or the data."""

_END_OF_TRAIN = """\
training
  Every field of transformers.Seq2SeqTrainingArguments is an option, too: --output_dir, --learning_rate,
  --num_train_epochs, --per_device_train_batch_size, --seed, --bf16, ... --help_all lists them.
  Tasks instruction_tuning and preference_tuning have those of trl.SFTConfig (--packing, --loss_type, ...) and
  trl.DPOConfig (--beta, --loss_type, ...), with TRL's defaults; --task instruction_tuning --help_all lists them.
  --resume_from_checkpoint last (or a folder) goes on with an interrupted run."""

_PLAN = f"""\
usage: hf-mbp plan RECIPE.yaml [--steps 3] [--output plan.png] [--device cuda] [--option value ...]

Show how a recipe would train, before it does: the lengths of its rows, the micro-batches of a few steps with what is
wasted on padding, and the predicted memory. Needs neither the weights of the model nor the device.

  hf-mbp plan recipes/text_classification/spam.yaml
  hf-mbp plan my.yaml --device cuda --memory_limit 24GiB --bf16

The exit code is {MISTAKE} after a mistake in the recipe or the options.

plan
  --steps                   steps to draw [3]
  --output                  where to draw them [plan.png]
  --device                  what to plan for, cpu or cuda; it need not be there [the one that is]"""

_CHECK = f"""\
usage: hf-mbp check RECIPE.yaml [--num_rows 8] [--option value ...]

Check, without training, whether micro-batches give the gradient of the whole batch for a recipe's model, loss and data,
and say why if they do not. The recipe is one that hf-mbp train runs; nothing is written into its output_dir.

  hf-mbp check recipes/text_classification/spam.yaml
  hf-mbp check my.yaml --num_rows 16 --dtype bfloat16

The exit code is 0 if it is exact, {FAILED} if it is not or the check failed, {MISTAKE} after a mistake of the
user's: in the recipe, the options or the data.

check
  --num_rows                rows to compare, whole and split: short ones, of unlike lengths and labels [8]"""

_INDENT = " " * _NAME_WIDTH
_LISTED_HEADS = f"\n{textwrap.fill(', '.join(HEADS), _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)}"

_ESTIMATE = f"""\
usage: hf-mbp estimate MODEL|RECIPE.yaml [--rows 8] [--width 512] [--device_memory 24GiB] [--option value ...]

Predict the memory of a training step, part by part, and the largest budget that fits a device. Counted on tensors that
have shapes and no memory: needs neither weights nor device. MODEL is a name on the Hub or a folder, of which only the
configuration is read (a folder with a config.json does without network); of a recipe, model, data and options are.

  hf-mbp estimate path/to/config --head causal_lm --width 2048 --bf16
  hf-mbp estimate recipes/text_classification/spam.yaml --device_memory 8GiB,24GiB,80GiB

estimate
  --rows                    rows of a micro-batch, or pairs for preference_tuning [8]
  --width                   tokens that they are padded to [longest row of the recipe; {USUAL_WIDTH} for a model]
  --target_width            sequence to sequence: tokens of the labels [longest of the recipe; width for a model]
  --device                  whose kernels are counted, cuda or cpu; it need not be there [cuda]
  --device_memory           memory of the device, or several, with commas between them [24GiB]
  --fsdp_ranks              devices that FSDP shards over [1]
  --head                    of a model, that of the checkpoint if it is left out:{_LISTED_HEADS}

of the model and of training
  --dtype --attn_implementation --model_revision --gguf_file --trust_remote_code
  --optim --bf16 --fp16 --gradient_checkpointing
                            as in hf-mbp train; with a recipe, all of its options"""

_BENCH = """\
usage: hf-mbp bench RECIPE.yaml [--steps 5] [--option value ...]

Train a few steps of a recipe twice, each time in a process of its own: with the stock Trainer, which runs the batches
as they are, and with MBPTrainer. The rows of the steps are the same. The first step of each, which has checks and
sizing or warms the device up, is not timed. One device, and neither evaluation nor saving.

  hf-mbp bench recipes/text_classification/spam.yaml
  hf-mbp bench my.yaml --per_device_train_batch_size 8 --gradient_accumulation_steps 8

It is one short measurement: run it twice to see how far the numbers can be trusted, with nothing else on the machine.
Where batches of the plain Trainer do not fit, that is said; so choose what would be run without hf_mbp. Its gradient
with several accumulation steps is another one (README.md), which is not what is compared here.

bench
  --steps                   steps that are timed, after a first one [5]"""

_SECTIONS: tuple[tuple[str, type], ...] = (
    ("run", RunArguments),
    ("model", ModelArguments),
    ("data", DataArguments),
    ("micro-batches", MBPConfig),
)


def command_help(command: str) -> str:
    """Return the help text of a command: its options, our own in full, transformers' by name of their class."""
    return "\n\n".join(_TEXTS[command]())


def _option_sections() -> list[str]:
    """Our own options under the headings of their classes, for every command that reads recipes."""
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


_TEXTS: Mapping[str, Callable[[], list[str]]] = {
    "train": lambda: [_TRAIN, *_option_sections(), _END_OF_TRAIN],
    "plan": lambda: [_PLAN, *_option_sections()],
    "check": lambda: [_CHECK, *_option_sections()],
    "estimate": lambda: [_ESTIMATE],
    "bench": lambda: [_BENCH, *_option_sections()],
}
