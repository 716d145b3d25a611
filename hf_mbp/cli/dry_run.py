"""A run up to its first step, without the weights: what would be refused is, and the plan is shown."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accelerate import Accelerator

from hf_mbp.cli.errors import say
from hf_mbp.cli.models import described
from hf_mbp.cli.plan_text import as_text
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.run_plan import plan_of
from hf_mbp.cli.shapes import without_weights
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.training_arguments import TrainArguments
from hf_mbp.compat import replaced


class _InNoMemory:
    """Leaves the model where it is: parameters that have no memory cannot be moved to a device."""

    @property
    def place_model_on_device(self) -> bool:
        """Never."""
        return False


def rehearse(
    recipe: Recipe,
    prepare: Callable[[Recipe], tuple[Any, TaskSetup]],
    make_trainer: Callable[[Recipe, Any, TaskSetup], Any],
) -> None:
    """Make the trainer around a model without weights, and say what it would do.

    Raises:
        UserError: what training would raise before its first step, but for what only weights can show.
    """
    with tempfile.TemporaryDirectory() as folder, replaced(Accelerator, prepare_model=_where_it_is):
        tried = replace(recipe, model=without_weights(recipe.model), train=_written_to(folder, recipe.train))
        processor, setup = prepare(tried)
        # Before there is a trainer, which may change the model: other adapters, another way to compute its loss
        plan = plan_of(recipe, recipe.train.device, setup)
        model = described(setup.model)
        make_trainer(tried, processor, setup)
    say(f"{'model':<20} {model}")
    say(as_text(plan, recipe.train.device))
    say(
        f"dry run: nothing was trained, and nothing written into {recipe.train.output_dir}. Whether micro-batches are "
        "exact shows with the weights: when training starts, or in hf-mbp check."
    )


def _where_it_is(_: Any, model: Any, **__: Any) -> Any:
    """In the place of Accelerate's: TRL has the reference model moved as soon as a trainer is made."""
    return model


def _written_to(folder: str, train: TrainArguments) -> TrainArguments:
    """The arguments as they are, not made again, which would set up devices and processes once more."""
    changed = copy.copy(train)
    changed.__class__ = type("DryRunArguments", (_InNoMemory, type(train)), {})
    changed.output_dir, changed.push_to_hub = folder, False
    return changed
