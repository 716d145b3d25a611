"""Answers in a conversation, trained by TRL's SFTTrainer: with LoRA, packing and its losses."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.models import with_adapters
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.tasks import language_modeling
from hf_mbp.cli.tasks.base import TaskSetup


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize and mark what the loss is on, as for language modeling; the rest is TRL's."""
    from hf_mbp.cli.trl_trainers import lora_config

    setup = language_modeling.prepare(splits, tokenizer, config, model_arguments, data_arguments)
    adapters = lora_config(model_arguments)
    return replace(
        setup,
        model=with_adapters(setup.model, model_arguments, adapters),
        collator=None,
        compute_metrics=None,
        preprocess_logits_for_metrics=None,
        make_trainer=partial(make_trainer, max_length=data_arguments.max_length, peft_config=adapters),
    )


def make_trainer(*, model: Any, args: Any, max_length: int | None, **options: Any) -> Any:
    """Return the trainer."""
    from hf_mbp.cli.trl_trainers import InstructionTrainer, without_adapters

    args.max_length = max_length if args.packing else None  # rows are cut already
    return InstructionTrainer(model=without_adapters(model), args=args, **options)
