"""One label for each image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, DefaultDataCollator, PreTrainedConfig

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.data import Splits, require_columns
from hf_mbp.cli.errors import say
from hf_mbp.cli.images import PIXELS, PixelTransform
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.classification import compute_metrics, find_labels, load_classifier, only_logits

_HEAD = "ForImageClassification"
_COLOURS = 3


def prepare(
    splits: Splits,
    processor: Any,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Map labels to ids, have images turned into pixel values when they are read, load a model with an output a class.

    ``processor`` is the image processor of the model.
    """
    require_columns(splits, {"image_column": data_arguments.image_column, "label_column": data_arguments.label_column})
    labels = find_labels(
        splits, data_arguments.label_column, config, head=_HEAD, new_head=model_arguments.starts_new_head
    )
    say(str(labels))

    def encode(rows: Dataset, name: str, origin: str) -> Dataset:
        column = data_arguments.image_column
        transform = PixelTransform(
            processor=processor,
            num_channels=int(getattr(config, "num_channels", _COLOURS)),
            origin=f"{origin}, column {column!r},",
        )
        # Named as the model names its inputs: the Trainer drops other columns before the images are read.
        encoded = rows.select_columns(column).rename_column(column, PIXELS)
        encoded = encoded.add_column("labels", labels.ids_of_rows(rows, data_arguments.label_column, origin))
        encoded = encoded.with_transform(transform)
        say(f"{name}: {len(encoded):,} images of {' x '.join(map(str, encoded[0][PIXELS].shape))}")
        return encoded

    train = encode(splits.train, "train", splits.train_origin)
    return TaskSetup(
        train=train,
        validation=splits.validation and encode(splits.validation, "validation", splits.validation_origin),
        model=load_classifier(AutoModelForImageClassification, labels, model_arguments),
        collator=DefaultDataCollator(),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=only_logits,
        inputs_of=partial(_inputs, train[0][PIXELS].shape),
    )


def _inputs(shape: torch.Size, rows: int, _width: int) -> dict[str, torch.Tensor]:
    """Inputs without data, with images as large as the first of the data is."""
    labels = torch.empty(rows, dtype=torch.long, device="meta")
    return {PIXELS: torch.empty((rows, *shape), device="meta"), "labels": labels}
