"""A run up to its first step, without the weights: what would be refused is, and the plan is shown."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace

from hf_mbp.cli.arguments import TrainArguments
from hf_mbp.cli.errors import say
from hf_mbp.cli.models import described
from hf_mbp.cli.plan import as_text, lengths_of, plan_rows_of, without_weights
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.trainers import FinetuneTrainer


class _WrittenNowhere(TrainArguments):
    """Leaves the model where it is: parameters that have no memory cannot be moved to a device."""

    @property
    def place_model_on_device(self) -> bool:
        """Never."""
        return False


def rehearse(recipe: Recipe, build_trainer: Callable[[Recipe], FinetuneTrainer]) -> None:
    """Make the trainer around a model without weights, and say what it would do.

    Raises:
        UserError: what training would raise before its first step, but for what only weights can show.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            replace(recipe, model=without_weights(recipe.model), train=_written_to(folder, recipe.train))
        )
    say(f"{'model':<20} {described(trainer.model)}")
    device = recipe.train.device
    say(as_text(plan_rows_of(recipe, device, trainer.model, lengths_of(trainer.train_dataset)), device))
    say(
        f"dry run: nothing was trained, and nothing written into {recipe.train.output_dir}. Whether micro-batches are "
        "exact shows with the weights: when training starts, or in hf-mbp check."
    )


def _written_to(folder: str, train: TrainArguments) -> TrainArguments:
    """The arguments as they are, not made again, which would set up devices and processes once more."""
    changed = copy.copy(train)
    changed.__class__ = _WrittenNowhere
    changed.output_dir, changed.push_to_hub = folder, False
    return changed
