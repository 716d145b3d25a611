"""The model card of a run: what was trained, on what, how, with which result; its head is what the Hub reads.

Trainer's own card knows none of micro-batches, of the result before training, of the recipe.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from hf_mbp import __version__
from hf_mbp.cli.arguments import ModelArguments
from hf_mbp.cli.errors import say
from hf_mbp.cli.models import described
from hf_mbp.cli.output import CARD, CARD_MARK, PLOTS, RECIPE, has_own_card
from hf_mbp.cli.padding import RESUMED_AT, PaddingTotals, part_of_run
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.trainers import FinetuneTrainer

Metrics = Mapping[str, Any]

PIPELINE_TAGS: Mapping[str, str] = {
    "embedding": "sentence-similarity",
    "image_classification": "image-classification",
    "instruction_tuning": "text-generation",
    "language_modeling": "text-generation",
    "masked_language_modeling": "fill-mask",
    "preference_tuning": "text-generation",
    "question_answering": "question-answering",
    "text_classification": "text-classification",
    "token_classification": "token-classification",
}
"""What the Hub calls a task. For sequence to sequence it has several names, and only the user knows which."""

_VERSIONS = ("transformers", "torch", "accelerate", "datasets", "tokenizers")
_COMMAND = f"```bash\nhf-mbp train {RECIPE} --output_dir again\n```"
# Of an evaluation: what it took, and not how good the model is.
_NO_RESULT = ("runtime", "per_second", "preparation_time")


def write_card(trainer: FinetuneTrainer, recipe: Recipe, metrics: Metrics) -> None:
    """Write the card into the output folder, unless the user has a README.md there."""
    folder = Path(str(recipe.train.output_dir))
    if (folder / CARD).exists() and not has_own_card(folder):
        say(f"{folder / CARD} is not of a run, so no model card is written over it")
        return
    head = card_data(recipe, metrics, is_adapter=hasattr(trainer.model, "peft_config")).to_yaml()
    (folder / CARD).write_text(f"---\n{head}\n---\n\n{_body(trainer, recipe, metrics, folder)}", encoding="utf-8")


def card_data(recipe: Recipe, metrics: Metrics, *, is_adapter: bool) -> ModelCardData:
    """Return what the Hub reads. Names of folders and files of the user are none of its business."""
    base, data = recipe.model.model_name_or_path, recipe.data.dataset_name
    is_on_hub = base is not None and _is_on_hub(base)
    return ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAGS.get(recipe.run.task),
        base_model=base if is_on_hub else None,
        datasets=[data] if data is not None and _is_on_hub(data) else None,
        license=_license(base, recipe.model.model_revision) if base is not None else None,
        metrics=[name for name in _results(metrics) if name != "loss"] or None,
        tags=["hf_mbp", "generated_from_trainer", recipe.run.task.replace("_", "-")],
    )


def _is_on_hub(name: str) -> bool:
    return "://" not in name and not Path(name).exists() and name.count("/") <= 1


def _license(base: str, revision: str) -> str | None:
    """What the card of the base model says, where that is at hand; nothing is looked up in the network for it."""
    cached = try_to_load_from_cache(base, CARD, revision=revision) if _is_on_hub(base) else None
    file = Path(cached) if isinstance(cached, str) else Path(base) / CARD
    if not file.is_file():
        return None
    stated: str | None = ModelCard.load(file, ignore_metadata_errors=True).data.get("license")
    return stated


def _results(metrics: Metrics, prefix: str = "eval_") -> dict[str, float]:
    """The results of an evaluation by their names; `eval_before_` is another one than `eval_`."""
    named = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {
        name: value
        for name, value in named.items()
        if isinstance(value, (int, float)) and not name.startswith("before_") and not name.endswith(_NO_RESULT)
    }


def _body(trainer: FinetuneTrainer, recipe: Recipe, metrics: Metrics, folder: Path) -> str:
    parts = [
        CARD_MARK,
        f"# {_plain(folder.resolve().name)}",
        f"{_base(recipe.model)}, trained for {_in_words(recipe.run.task)} on "
        f"{_data(recipe)} with hf_mbp: each mini-batch runs in micro-batches that fit the device, with the gradient of "
        "the whole.",
        *_result_section(metrics),
        "## Training",
        _table(("", ""), _training(trainer, recipe, metrics).items()),
        *(f"![{name.removesuffix('.png')}]({name})" for name in PLOTS if (folder / name).is_file()),
        "## Again",
        f"[{RECIPE}]({RECIPE}) has every option:",
        _COMMAND,
        "## Versions",
        ", ".join([f"Python {platform.python_version()}", f"hf_mbp {__version__}", *_versions()]),
    ]
    return "\n\n".join(parts) + "\n"


def _result_section(metrics: Metrics) -> list[str]:
    before, after = _results(metrics, "eval_before_"), _results(metrics)
    if not after:
        return []
    rows = [(name, f"{before[name]:.4g}" if name in before else "", f"{value:.4g}") for name, value in after.items()]
    return ["## Results", _table(("on the evaluation data", "before", "after"), rows)]


def _training(trainer: FinetuneTrainer, recipe: Recipe, metrics: Metrics) -> dict[str, str]:
    """The names and values of what matters, those that are known."""
    args, totals = trainer.args, PaddingTotals.from_metrics(metrics)
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    devices = f"{args.world_size} x {args.device.type}"
    known: dict[str, str | None] = {
        "base model": _base(recipe.model),
        "model": described(trainer.model),
        "data": f"{_data(recipe)}, {len(trainer.train_dataset):,} rows",
        "evaluated on": _evaluation_rows(trainer, recipe),
        "mini-batch": f"{rows:,} rows, on {devices}",
        "optimizer steps": f"{trainer.state.global_step:,} ({_epochs(trainer.state.epoch or 0)})",
        "weights": _weights(trainer),
        "optimizer": f"{getattr(args.optim, 'value', args.optim)}, learning rate {args.learning_rate:g}, "
        f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)} schedule",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else None,
        "seed": str(args.seed),
        "micro-batches": f"{metrics['mbp_micro_batches']:.3g} a step on average" if totals else None,
        "budget": _budget(trainer),
        "padding": str(totals).removeprefix("padding ") if totals else None,
        "exactness": trainer.mbp_feed.check.outcome,
        "training time": _time(metrics),
    }
    return {name: value for name, value in known.items() if value}


def _weights(trainer: FinetuneTrainer) -> str | None:
    """Of which step the weights are, if they need not be those of the last."""
    state, measure = trainer.state, trainer.args.metric_for_best_model
    if not trainer.args.load_best_model_at_end or state.best_metric is None:
        return None
    return f"of step {state.best_global_step:,}, the best of those evaluated by {measure} ({state.best_metric:.4g})"


def _time(metrics: Metrics) -> str | None:
    if "train_runtime" not in metrics:
        return None
    return f"{metrics['train_runtime']:,.0f} s{part_of_run(metrics.get(RESUMED_AT, 0))}"


def _epochs(number: float) -> str:
    return f"{number:.3g} epoch{'' if number == 1 else 's'}"


def _evaluation_rows(trainer: FinetuneTrainer, recipe: Recipe) -> str | None:
    if trainer.eval_dataset is None:
        return None
    is_share = recipe.data.validation_fraction is not None
    return f"{len(trainer.eval_dataset):,} rows" + (
        " of the same data, chosen at random and held out" if is_share else ""
    )


def _budget(trainer: FinetuneTrainer) -> str | None:
    tokens = [int(log["mbp_max_tokens"]) for log in trainer.state.log_history if "mbp_max_tokens" in log]
    if not tokens:
        return None
    return trainer.mbp_feed.budget.describe(tokens[-1]).replace(" each", " a micro-batch").replace("%", " %")


def _data(recipe: Recipe) -> str:
    """The data set on the Hub, or the name of the file without its folder: cards are made to be shared."""
    data = recipe.data
    named = data.dataset_name or Path(str(data.train_file)).name
    return _plain(f"{named} ({data.dataset_config_name})" if data.dataset_config_name else named)


def _base(model: ModelArguments) -> str:
    """What training began with."""
    if model.model_name_or_path is not None:
        return _short_name(model.model_name_or_path)
    return f"{_short_name(str(model.config_name))} with random weights"


def _short_name(name: str) -> str:
    """A name on the Hub as it is, of a folder its last part."""
    return _plain(name if "://" in name or _is_on_hub(name) else Path(name).resolve().name)


def _plain(name: str) -> str:
    """A name in one line, as it reads: what would be markup is escaped, for cards are shown on pages of the Hub."""
    return re.sub(r"[\\`*\[\]<>&]", lambda mark: f"&#{ord(mark[0])};", " ".join(name.split()))


def _in_words(task: str) -> str:
    return task.replace("_", " ")


def _versions() -> Iterable[str]:
    return (f"{package} {version(package)}" for package in _VERSIONS)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
