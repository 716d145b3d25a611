"""Fine-tune a model as a recipe says, measure it before and after, save everything."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainerState, set_seed

from hf_mbp.cli.card import write_card
from hf_mbp.cli.command import run_command
from hf_mbp.cli.data import load_splits
from hf_mbp.cli.dry_run import rehearse
from hf_mbp.cli.errors import UserError, say
from hf_mbp.cli.models import load_config
from hf_mbp.cli.output import (
    BEFORE_RESULTS,
    RECIPE,
    TRAIN_RESULTS,
    delete_run,
    delete_start,
    find_checkpoint,
    is_of_run,
    refuse_other_run,
)
from hf_mbp.cli.padding import RESUMED_AT, PaddingTotals
from hf_mbp.cli.plots import plot_loss, plot_padding
from hf_mbp.cli.recipe import Recipe, Values, dump_recipe, find_task_name, read_recipe, recipe_parser
from hf_mbp.cli.resuming import checkpoint_error
from hf_mbp.cli.tasks import find_task, load_processor
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.turns import first_process_first
from hf_mbp.trainer import MBPMixin

Metrics = dict[str, Any]
# Speeds of the loops; they are in the saved results, and too many for the screen.
_UNREPORTED = ("_per_second", "_preparation_time")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code (2 after a user's mistake, 1 after a failure, told in one line)."""
    return run_command(argv, _main)


def _main(words: Sequence[str]) -> None:
    if "--help_all" in words:  # the options of transformers and TRL, too, as the task has them
        say(recipe_parser(find_task_name(words)).format_help())
    else:
        finetune(read_recipe(words))


def finetune(recipe: Recipe) -> None:
    """Do what the recipe says.

    Raises:
        UserError: it cannot be done; nothing was trained.
    """
    folder = Path(str(recipe.train.output_dir))
    checkpoint = find_checkpoint(recipe.train.resume_from_checkpoint, folder)
    goes_on = is_of_run(checkpoint, folder)
    refuse_other_run(folder, overwrite=recipe.run.overwrite_output_dir, resuming=goes_on)
    if recipe.run.dry_run:
        rehearse(recipe, prepare, make_trainer)
        return
    trainer = build_trainer(recipe)
    with _claimed_folder(recipe, folder, resuming=goes_on):
        before = _evaluate_before(trainer, recipe, folder, checkpoint)
        trained = _train(trainer, checkpoint)
    trainer.write_card = partial(write_card, trainer, recipe, metrics := {**before, **trained})
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", trained)
    metrics |= _evaluate(trainer, "eval")
    _draw(trainer, folder, before, trained)
    _publish(trainer)
    _report(metrics, folder)
    trainer.accelerator.end_training()  # as Trainer.end does, which transformers 5.17 has not


def build_trainer(recipe: Recipe) -> MBPMixin:
    """Load data and model as the recipe's task wants them, and put them into a trainer."""
    return make_trainer(recipe, *prepare(recipe))


def prepare(recipe: Recipe) -> tuple[Any, TaskSetup]:
    """Load the tokenizer, or what else prepares the rows, and what the task makes of data and model."""
    prepare_task = find_task(recipe.run.task)
    if recipe.train.device.type == "cpu" and "dataloader_pin_memory" not in recipe.given:
        recipe.train.dataloader_pin_memory = False  # nothing to pin for; torch would warn
    set_seed(recipe.train.seed)  # before the model is loaded: a new classification head is random
    with first_process_first():
        config = load_config(recipe.model)
        processor = load_processor(recipe.run.task, recipe.model, config)
        splits = load_splits(recipe.data, recipe.folder, recipe.train.seed)
    return processor, prepare_task(splits, processor, config, recipe.model, recipe.data)


def make_trainer(recipe: Recipe, processor: Any, setup: TaskSetup) -> MBPMixin:
    """Put what was prepared into the trainer of the task."""
    of_the_task = {
        "data_collator": setup.collator,
        "compute_metrics": setup.compute_metrics,
        "preprocess_logits_for_metrics": setup.preprocess_logits_for_metrics,
    }
    try:
        trainer: MBPMixin = setup.make_trainer(
            model=setup.model,
            args=recipe.train,
            mbp_config=recipe.mbp,
            train_dataset=setup.train,
            eval_dataset=setup.validation,
            processing_class=processor,
            **{name: value for name, value in of_the_task.items() if value is not None},
        )
    except UserError:
        raise
    # ImportError and RuntimeError: of what a report or an optimizer needs and is not installed
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        raise UserError(f"the trainer refuses{_quoted_options(recipe.given, error)}: {error}") from error
    return trainer


def _quoted_options(given: Values, error: Exception) -> str:
    """The options whose values a message quotes, which seldom says whose they are."""
    message = str(error).lower()  # some name of a choice in capitals what was written in small letters
    names = [name for name, value in given.items() if repr(str(value)).lower() in message]
    return f" ({', '.join(names)})" if names else ""


@contextmanager
def _claimed_folder(recipe: Recipe, folder: Path, *, resuming: bool) -> Iterator[None]:
    """Make the folder this run's own, once every process has seen that it may be; not if its start is refused."""
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        if recipe.run.overwrite_output_dir and not resuming:
            delete_run(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE).write_text(dump_recipe(recipe), encoding="utf-8")
    PartialState().wait_for_everyone()
    try:
        yield
    except UserError:  # before the first step; the next try, with the mistake mended, needs the folder
        if PartialState().is_main_process and not resuming:
            delete_start(folder)
        raise


def _evaluate_before(trainer: MBPMixin, recipe: Recipe, folder: Path, checkpoint: Path | None) -> Metrics:
    if not recipe.run.eval_before_training:
        return {}
    if checkpoint is None:
        if _evaluates_before_training(trainer):
            return _evaluate(trainer, "eval_before")
        say("not evaluated before training: under DeepSpeed that needs ZeRO-3")
        return {}
    # The untrained model was evaluated when the run began, maybe in another folder.
    before = _saved(checkpoint.parent / BEFORE_RESULTS)
    if before and not is_of_run(checkpoint, folder):
        trainer.save_metrics("eval_before", before)
    return before


def _evaluates_before_training(trainer: MBPMixin) -> bool:
    """Whether Trainer can evaluate a model that was not trained; of DeepSpeed it wants ZeRO-3 then."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is None or int(plugin.zero_stage) == 3


def _saved(file: Path) -> Metrics:
    """What the run had saved before it was interrupted; nothing if it had not come so far."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _evaluate(trainer: MBPMixin, prefix: str) -> Metrics:
    if trainer.eval_dataset is None:
        return {}
    metrics: Metrics = trainer.evaluate(metric_key_prefix=prefix)
    trainer.save_metrics(prefix, metrics)
    return metrics


class _Progress(TrainerCallback):
    """Notes how far training has come: whether a checkpoint was read, and whether the first step has begun."""

    is_loaded = has_begun = False
    resumed_at = 0

    def on_train_begin(self, _args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """All of a checkpoint was read, but for the states of random numbers."""
        self.is_loaded = True
        self.resumed_at = state.global_step

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The first step is planned."""
        self.has_begun = True


def _train(trainer: MBPMixin, checkpoint: Path | None) -> Metrics:
    progress = _Progress()
    trainer.add_callback(progress)
    try:
        metrics: Metrics = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint)).metrics
    except Exception as error:
        if progress.has_begun:
            raise
        if checkpoint is not None and (told := checkpoint_error(checkpoint, error, is_loaded=progress.is_loaded)):
            raise told from error
        # Before the first step it is the set-up that is refused: no memory left, a loss that cannot be split.
        if isinstance(error, ValueError):
            raise UserError(f"training cannot start: {error}") from error
        raise
    if progress.has_begun or checkpoint is None:
        return {**metrics, RESUMED_AT: progress.resumed_at} if progress.resumed_at else metrics
    # It was trained to its end, and perhaps interrupted after that: what is still due is done, and its figures stay.
    done, wanted = trainer.state.global_step, trainer.state.max_steps
    say(f"{checkpoint} is at step {done:,} of {wanted:,}: nothing was left to train")
    return _saved(checkpoint.parent / TRAIN_RESULTS)


def _draw(trainer: MBPMixin, folder: Path, before: Metrics, trained: Metrics) -> None:
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed, so nothing is drawn; pip install 'hf-mbp[recipes]' brings it")
    elif trainer.is_world_process_zero():
        plot_loss(trainer.state.log_history, before, folder / "loss.png")
        plot_padding(trainer.state.log_history, PaddingTotals.from_metrics(trained), folder / "padding.png")


def _publish(trainer: MBPMixin) -> None:
    """Write the model card, and upload it where the model went when it was saved."""
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub(commit_message="Results, pictures and model card")


def _report(metrics: Metrics, folder: Path) -> None:
    for name, value in metrics.items():
        if name.startswith(("eval_", "train_")) and not name.endswith(_UNREPORTED):
            say(f"{name} {value:.4g}")
    totals = PaddingTotals.from_metrics(metrics)
    if totals is not None:
        say(str(totals))
    say(f"saved in {folder}")
