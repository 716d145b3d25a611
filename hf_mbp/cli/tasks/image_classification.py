"""One label for each image."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForImageClassification, DefaultDataCollator, PreTrainedConfig, PreTrainedModel

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError, say
from hf_mbp.cli.images import PIXELS, PixelTransform, in_words
from hf_mbp.cli.splits import Part, Splits, require_columns
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
    if data_arguments.max_length is not None:
        raise UserError("max_length says nothing of images, which the processor makes of one size; leave it out")
    require_columns(splits, {"image_column": data_arguments.image_column, "label_column": data_arguments.label_column})
    labels = find_labels(
        splits, data_arguments.label_column, config, head=_HEAD, new_head=model_arguments.starts_new_head
    )
    say(str(labels))

    model = load_classifier(AutoModelForImageClassification, labels, model_arguments)

    def encode(part: Part) -> Dataset:
        column = data_arguments.image_column
        transform = PixelTransform(
            processor=processor,
            num_channels=int(getattr(config, "num_channels", _COLOURS)),
            origin=f"{part.origin}, column {column!r},",
        )
        # Named as the model names its inputs: the Trainer drops other columns before the images are read.
        encoded = part.rows.select_columns(column).rename_column(column, PIXELS)
        encoded = encoded.add_column("labels", labels.ids_of_rows(part.rows, data_arguments.label_column, part.origin))
        first = encoded.with_transform(transform)[0][PIXELS]
        _try(model, first, transform.origin)
        say(f"{part.name}: {len(encoded):,} images of {in_words(first.shape)}")
        return encoded.with_transform(replace(transform, shape=first.shape))

    train, validation = splits.encoded(encode)
    return TaskSetup(
        train=train,
        validation=validation,
        model=model,
        collator=DefaultDataCollator(),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=only_logits,
        inputs_of=partial(_inputs, train[0][PIXELS].shape),
    )


@torch.no_grad()
def _try(model: PreTrainedModel, pixels: torch.Tensor, origin: str) -> None:
    """Run the model on an image: some read images of one size only, and only they know which.

    Raises:
        UserError: it does not take it.
    """
    was_training = model.training
    try:
        model.eval()(**{PIXELS: pixels[None].to(model.device, model.dtype)})
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"{origin} has images that become {in_words(pixels.shape)}, which {type(model).__name__} does not take: "
            f"{str(error).rstrip('.')}. Write a size for it, and do_resize: true, into the model's "
            "preprocessor_config.json; of a new model (config_name), image_size in its config.json can be that of the "
            "images"
        ) from error
    finally:
        model.train(was_training)


def _inputs(shape: torch.Size, rows: int, _width: int) -> dict[str, torch.Tensor]:
    """Inputs without data, with images as large as the first of the data is."""
    labels = torch.empty(rows, dtype=torch.long, device="meta")
    return {PIXELS: torch.empty((rows, *shape), device="meta"), "labels": labels}
