"""What every task returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.trainers import FinetuneTrainer


@dataclass(frozen=True, kw_only=True)
class TaskSetup:
    """A model with the tokenized rows to train and evaluate it on, and how to measure it.

    ``compute_metrics`` should return ``mean_loss``, too: the loss averaged over all that the evaluation set has of
    what the loss counts. ``make_trainer`` takes what Trainer takes, and ``mbp_config``; it may have a collator and
    metrics of its own, which are then ``None`` here. ``reference`` loads a frozen model that training needs beside the
    one that is trained. ``model_with_loss`` is what the memory of training is predicted by, if the model itself returns
    no loss, and ``inputs_of`` makes its inputs of so many rows of the data set of a width, if they are not those of a
    usual model.
    """

    model: PreTrainedModel
    train: Dataset
    validation: Dataset | None
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None
    compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None
    make_trainer: Callable[..., Any] = FinetuneTrainer
    reference: Callable[[], PreTrainedModel] | None = None
    model_with_loss: Any = None
    inputs_of: Callable[[int, int], dict[str, torch.Tensor]] | None = None


class Prepare(Protocol):
    """The signature of a task.

    ``tokenizer`` is what ``load_processor`` loads for it: of images, the image processor.
    """

    def __call__(
        self,
        splits: Splits,
        tokenizer: Any,
        config: PreTrainedConfig,
        model_arguments: ModelArguments,
        data_arguments: DataArguments,
        /,
    ) -> TaskSetup:
        """Check columns, tokenize, load the model.

        Raises:
            UserError: the data do not fit the task.
        """
