"""Contestants of TRL, for language models: rows in one long row, instead of padded."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.rows import PADDING, Rows
from benchmarks.task import Stopwatch, Task
from benchmarks.with_trainer import TellSteps, arguments_of


def train_padding_free(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """The rows of a batch are one row, whose parts do not see each other."""
    _train(task, model, stopwatch, {"padding_free": True}, _dataset(task.rows()), task.steps)


def train_packed(task: Task, model: Any, stopwatch: Stopwatch) -> None:
    """Rows are put together once, before training; a step takes as many packs as make the number of steps the same.

    A pack is as long as the longest row, and runs by itself: without FlashAttention longer ones cost the square of
    their length. Where the packs do not divide by the steps, there may be fewer steps, never other rows.
    """
    from trl import pack_dataset

    lengths = task.workload.lengths()
    packs = pack_dataset(_dataset(task.rows()), max(lengths))
    steps_per_epoch = len(lengths) // task.shape.rows_per_step
    packs_per_step = -(-len(packs) // steps_per_epoch)
    options = {
        "packing": True,
        "max_length": max(lengths),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": packs_per_step,
    }
    epochs = task.steps // steps_per_epoch
    _train(task, model, stopwatch, options, packs, epochs * -(-len(packs) // packs_per_step))


def _train(
    task: Task, model: Any, stopwatch: Stopwatch, options: dict[str, Any], prepared: Dataset, steps: int
) -> None:
    """As `WithTrainer` does; time counts from when the rows are prepared."""
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**{**arguments_of(task), **no_recomputation(), "max_length": None, **options}),
        train_dataset=_dataset(task.warm_up_rows),
        processing_class=_tokenizer(),
        callbacks=[TellSteps(stopwatch)],
    )
    trainer.train()
    trainer.train_dataset = prepared
    trainer.args.max_steps = steps
    trainer.train()


def no_recomputation() -> dict[str, Any]:
    """TRL recomputes activations unless told otherwise, as no other contestant does; the option has got a new name."""
    from trl import SFTConfig

    names = ("activation_checkpointing", "gradient_checkpointing")
    return {next(name for name in names if hasattr(SFTConfig, name)): False}


def _dataset(rows: Rows) -> Dataset:
    return Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])


def _tokenizer() -> PreTrainedTokenizerFast:
    """SFTTrainer wants one, to know what pads."""
    words = Tokenizer(WordLevel({"[PAD]": PADDING}, unk_token="[PAD]"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[PAD]")  # noqa: S106
