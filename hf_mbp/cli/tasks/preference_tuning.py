"""The better of two answers, learned by TRL's DPOTrainer."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.models import length_limit, load_model, with_adapters
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.language_modeling import Messages, encode_piece, split_conversation
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, encode_splits
from hf_mbp.estimate import default_inputs

# Of the rows sorted by length, how far away the other row is at most.
NEIGHBOURS = 5
# A column of ours beside the user's; the name must not be one of theirs.
_OTHER = "hf_mbp_other_answer"


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,  # noqa: ARG001 - every task has the same signature
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize both conversations of each row, load a causal language model."""
    from hf_mbp.cli.trl_trainers import lora_config

    _check_columns(splits, data_arguments)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {model_arguments.model_name_or_path} has no chat template for conversations;"
            " use an instruction-tuned model"
        )
    train, validation = encode_splits(splits, partial(_encode, tokenizer=tokenizer, arguments=data_arguments))
    adapters = lora_config(model_arguments)

    def load() -> PreTrainedModel:
        model = load_model(AutoModelForCausalLM, model_arguments)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    reference = load if adapters is None else None  # else it is the model without its adapters
    model = with_adapters(load(), model_arguments, adapters)
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        make_trainer=partial(make_trainer, reference=reference, peft_config=adapters),
        reference=reference,
        inputs_of=partial(_inputs, model),
    )


def _inputs(model: Any, pairs: int, width: int) -> dict[str, torch.Tensor]:
    """Inputs without data of so many pairs, whose sides have half of the width."""
    side = math.ceil(width / 2)
    return default_inputs(model, 2 * pairs, side, side)


def make_trainer(*, model: Any, args: Any, reference: Any, **options: Any) -> Any:
    """Return the trainer; the model that it compares with is loaded if it will be needed during training."""
    from hf_mbp.cli.trl_trainers import PreferenceTrainer, without_adapters

    needs_it = reference is not None and not args.precompute_ref_log_probs
    reference_model = reference() if needs_it else None
    return PreferenceTrainer(model=without_adapters(model), args=args, ref_model=reference_model, **options)


def _check_columns(splits: Splits, arguments: DataArguments) -> None:
    if arguments.chosen_column is None:
        raise UserError("chosen_column is missing: the column with the better answer, or the conversation that has it")
    if (arguments.rejected_column is None) != arguments.rejected_from_other_rows:
        raise UserError(
            "write either rejected_column, the column with the worse answer, or rejected_from_other_rows: true,"
            " which takes the chosen answer of another row for it"
        )
    if arguments.rejected_from_other_rows and arguments.prompt_column is None:
        raise UserError("rejected_from_other_rows needs prompt_column: the answer of another row is put after it")
    options = ("prompt_column", "chosen_column", "rejected_column")
    require_columns(splits, {option: getattr(arguments, option) for option in options})


def _encode(part: Part, *, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    rows, origin = part.rows, part.origin
    if arguments.rejected_from_other_rows:
        answers = rows[str(arguments.chosen_column)][:]
        rows = rows.add_column(_OTHER, other_answers(answers, origin))

    def encode(batch: Batch) -> Batch:
        result: Batch = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": [], CUT: []}
        for chosen, rejected in _conversations(batch, arguments, origin):
            prompt, better, worse = encode_pair(tokenizer, chosen, rejected, origin)
            room = len(better) + len(worse) if limit is None else limit - len(prompt)
            if room > 0 and better[:room] != worse[:room]:
                result["prompt_ids"].append(prompt)
                result["chosen_ids"].append(better[:room])
                result["rejected_ids"].append(worse[:room])
                result[CUT].append(max(len(better), len(worse)) > room)
        return result

    return encode_rows(replace(part, rows=rows), encode, limit=limit, workers=arguments.preprocessing_num_workers)


def other_answers(answers: list[str], origin: str) -> list[str]:
    """Return for each answer that of another row, which is about as long: length alone must not tell them apart.

    The same for the same rows, whatever the seed of the run.

    Raises:
        UserError: an answer is no text, or there is no other.
    """
    if not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{origin}: rejected_from_other_rows needs texts in chosen_column")
    different = sorted(set(answers), key=lambda answer: (len(answer), answer))
    if len(different) < 2:
        raise UserError(f"{origin}: rejected_from_other_rows needs two rows with different answers in chosen_column")
    position = {answer: i for i, answer in enumerate(different)}
    generator = random.Random(0)  # noqa: S311 - reproducible, not secret
    return [different[_neighbour(position[answer], len(different), generator)] for answer in answers]


def _neighbour(position: int, count: int, generator: random.Random) -> int:
    near = range(max(0, position - NEIGHBOURS), min(count, position + NEIGHBOURS + 1))
    return generator.choice([other for other in near if other != position])


def _conversations(batch: Batch, arguments: DataArguments, origin: str) -> Iterator[tuple[Messages, Messages]]:
    """Yield the chosen and the rejected conversation of each row."""
    chosen = batch[str(arguments.chosen_column)]
    rejected = batch[arguments.rejected_column or _OTHER]
    prompts = [None] * len(chosen) if arguments.prompt_column is None else batch[arguments.prompt_column]
    for prompt, better, worse in zip(prompts, chosen, rejected, strict=True):
        yield _whole(prompt, better, origin), _whole(prompt, worse, origin)


def _whole(prompt: Any, answer: Any, origin: str) -> Messages:
    """A conversation from its beginning to the answer.

    Raises:
        UserError: an answer without a prompt, or what is neither text nor a conversation.
    """
    messages = _messages(answer, "assistant", origin)
    if messages and messages[0]["role"] != "assistant":
        return messages  # it has the prompt
    if prompt is None:
        raise UserError(
            f"{origin}: an answer in chosen_column or rejected_column has no question before it; write prompt_column"
        )
    return [*_messages(prompt, "user", origin), *messages]


def _messages(value: Any, role: str, origin: str) -> Messages:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, list) and all(isinstance(part, dict) and {"role", "content"} <= part.keys() for part in value):
        return value
    raise UserError(
        f"{origin}: prompt_column, chosen_column and rejected_column must hold texts, or conversations as lists of"
        f" {{role, content}}, but one has {value!r}"
    )


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, chosen: Messages, rejected: Messages, origin: str
) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens of what two conversations begin with, and of the answer in which each ends.

    Raises:
        UserError: they differ before the last message, or that is not the assistant's.
    """
    if chosen[:-1] != rejected[:-1] or not all(c and c[-1]["role"] == "assistant" for c in (chosen, rejected)):
        raise UserError(
            f"{origin}: the conversations of chosen_column and rejected_column must be alike up to the last message,"
            f" which must be the assistant's; these are not: {chosen!r} and {rejected!r}"
        )
    *before, (better, _) = split_conversation(tokenizer, chosen)
    *_, (worse, _) = split_conversation(tokenizer, rejected)
    pieces = ["", *(text for text, _ in before)]
    prompt = [token for previous, text in pairwise(pieces) for token in encode_piece(tokenizer, text, previous)]
    return prompt, encode_piece(tokenizer, better, pieces[-1]), encode_piece(tokenizer, worse, pieces[-1])
