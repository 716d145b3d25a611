"""What a recipe trains, without weights: the shape of its model, and the sizes of its rows."""

from __future__ import annotations

from dataclasses import fields

import numpy as np

from hf_mbp.arrays import Ints
from hf_mbp.cli.arguments import ModelArguments, ModelShape
from hf_mbp.cli.data import load_splits
from hf_mbp.cli.images import PIXELS
from hf_mbp.cli.models import load_config
from hf_mbp.cli.recipe import Recipe
from hf_mbp.cli.tasks import find_task, load_processor
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import column_lengths, row_lengths
from hf_mbp.collate import has_targets
from hf_mbp.plan import as_sizes


def set_up(recipe: Recipe) -> TaskSetup:
    """What the task makes of model and data, but without weights."""
    prepare_task = find_task(recipe.run.task)
    shape = without_weights(recipe.model)
    config = load_config(shape)
    processor = load_processor(recipe.run.task, shape, config)
    splits = load_splits(recipe.data, recipe.folder, recipe.train.seed)
    return prepare_task(splits, processor, config, shape, recipe.data)


def without_weights(model: ModelArguments) -> ModelShape:
    """The arguments for the same model without its weights."""
    return ModelShape(**{field.name: getattr(model, field.name) for field in fields(model)})


def row_sizes(recipe: Recipe, setup: TaskSetup) -> Ints:
    """Tokens of each row that the trainer will have, `[rows, parts]`; an image counts as one.

    Source and target of an encoder-decoder are two parts. Packed rows are those that the trainer will put together.
    """
    rows = setup.train
    if PIXELS in rows.column_names:
        return np.ones((len(rows), 1), dtype=np.int64)
    if getattr(recipe.train, "packing", False):
        from trl import pack_dataset

        rows = pack_dataset(rows, recipe.data.max_length, recipe.train.packing_strategy)
    lengths = row_lengths(rows)
    if not (has_targets(setup.model) and isinstance(rows[0]["labels"], list)):
        return as_sizes(lengths)
    return as_sizes(list(zip(lengths, column_lengths(rows, "labels"), strict=True)))
