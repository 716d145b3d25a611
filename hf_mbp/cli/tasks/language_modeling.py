"""The next token: of plain text, or of the answers in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from transformers import (
    AutoModelForCausalLM,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.metrics import Perplexity
from hf_mbp.cli.models import length_limit, load_model
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import CUT, Batch, RowError, encode_rows, encode_splits, texts

# What the loss of transformers leaves out.
IGNORED = -100

Messages = list[dict[str, str]]
Encoded = tuple[list[int], list[int]]  # token ids, labels


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,  # noqa: ARG001 - every task has the same signature
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Tokenize, mark what the loss is on, load a causal language model."""
    require_columns(splits, _columns(data_arguments))
    if "text_column" not in _columns(data_arguments) and tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {model_arguments.model_name_or_path} has no chat template for conversations;"
            " use an instruction-tuned model, or plain text (text_column)"
        )
    train, validation = encode_splits(splits, partial(_encode, tokenizer=tokenizer, arguments=data_arguments))
    model = load_model(AutoModelForCausalLM, model_arguments)
    model.config.pad_token_id = tokenizer.pad_token_id
    return TaskSetup(
        model=model,
        train=train,
        validation=validation,
        # Pads labels with -100 by position. Masking labels by token would also mask every end-of-text token, where
        # that pads.
        collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=sum_log_likelihoods,
    )


def _columns(arguments: DataArguments) -> dict[str, str | None]:
    if arguments.messages_column is not None:
        return {"messages_column": arguments.messages_column}
    if arguments.prompt_column is not None:
        return {"prompt_column": arguments.prompt_column, "answer_column": arguments.answer_column}
    return {"text_column": arguments.text_column}


def _encode(part: Part, *, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    encode_batch = _encoder(tokenizer, arguments)

    def encode(batch: Batch) -> Batch:
        result: Batch = {"input_ids": [], "labels": [], CUT: []}
        for ids, labels in encode_batch(batch):
            if any(label != IGNORED for label in labels[1:limit]):  # the first token is nobody's next token
                result["input_ids"].append(ids[:limit])
                result["labels"].append(labels[:limit])
                result[CUT].append(limit is not None and len(ids) > limit)
        return result

    return encode_rows(part, encode, limit=limit, workers=arguments.preprocessing_num_workers)


def _encoder(tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Callable[[Batch], Iterator[Encoded]]:
    """Return the function that gives token ids and labels of each row of a batch."""
    if arguments.messages_column is None and arguments.prompt_column is None:
        return lambda batch: (encode_text(tokenizer, text) for text in texts(batch, arguments.text_column))
    return lambda batch: (
        encode_conversation(tokenizer, messages, assistant_only=arguments.assistant_only_loss)
        for messages in _conversations(batch, arguments)
    )


def _conversations(batch: Batch, arguments: DataArguments) -> list[Messages]:
    if arguments.messages_column is not None:
        return batch[arguments.messages_column]
    prompts, answers = texts(batch, str(arguments.prompt_column)), texts(batch, str(arguments.answer_column))
    return [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Return the tokens of a text with an end token; every one is a label."""
    if not text.strip():
        return [], []  # empty lines of a text file
    ids: list[int] = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids, ids.copy()


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, assistant_only: bool = True
) -> Encoded:
    """Return a conversation's tokens in the tokenizer's chat template; labels are on what the assistant says, or all.

    Each piece has tokens of its own, as at generation time, when the answer does not exist yet: no token spans the
    border.
    """
    ids: list[int] = []
    labels: list[int] = []
    before = ""
    for text, is_answer in split_conversation(tokenizer, messages):
        piece = encode_piece(tokenizer, text, before)
        ids += piece
        labels += piece if is_answer or not assistant_only else [IGNORED] * len(piece)
        before = text
    return ids, labels


def encode_piece(tokenizer: PreTrainedTokenizerBase, text: str, before: str) -> list[int]:
    """Return the tokens of what the template has written after ``before``, without any that begins in there.

    They are those that the text has where it stands: tokenizers like Llama's put a blank in front of whatever they are
    given by itself, and the model would learn to begin its answers with it.
    """
    known, together = _tokens(tokenizer, before), _tokens(tokenizer, before + text)
    if together[: len(known)] == known:
        return together[len(known) :]
    return _tokens(tokenizer, text)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text in which the template has put all there are."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    return ids


def split_conversation(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation as the template writes them, each with whether the assistant says it.

    Raises:
        RowError: these are no messages, or the template does not take them.
        UserError: it writes earlier messages differently once later ones follow, so there are no such pieces.
    """
    _check_messages(messages)
    written = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        question = _render(tokenizer, messages[:i], to_be_answered=True)
        answered = _render(tokenizer, messages[: i + 1], to_be_answered=False)
        if not (question.startswith(written) and answered.startswith(question)):
            raise UserError(
                "the tokenizer's chat template rewrites earlier messages; train on one question and answer a row"
            )
        yield question[len(written) :], False
        yield answered[len(question) :], True
        written = answered


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not all(isinstance(part, dict) and "role" in part for part in messages):
        raise RowError(f"a conversation must be a list of {{role, content}}, but one is {messages!r:.80}")
    if messages and messages[0]["role"] == "assistant":
        raise RowError(
            f"a conversation begins with the assistant: {messages!r:.80}; put what it answers before it, or leave out"
            " such rows"
        )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, to_be_answered: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_be_answered))
    except (TypeError, ValueError, TemplateError) as error:
        refused = f"the tokenizer's chat template does not take the conversation {messages!r:.80}"
        raise RowError(f"{refused}: {error}") from error


def sum_log_likelihoods(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Reduce ``logits`` [rows, width, vocabulary] to [rows, 2]: negative log-likelihood and number of tokens.

    Evaluation would otherwise keep the logits of the whole evaluation set: 50,000 numbers a token.
    """
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack([sum_row(row[:-1], row_labels[1:]) for row, row_labels in zip(logits, labels, strict=True)])


def sum_row(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return negative log-likelihood and number of the ``targets`` [width] of a row, by ``logits`` [width, ...]."""
    counted = targets != IGNORED  # row by row and only where there are labels: float32 logits of a batch are large
    loss = torch.nn.functional.cross_entropy(logits[counted].float(), targets[counted], reduction="sum")
    return torch.stack([loss, counted.sum().to(loss)])


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return perplexity and mean loss from the sums of each row."""
    sums = np.asarray(prediction.predictions)
    result: dict[str, float] = Perplexity().compute(predictions=sums[:, 0], references=sums[:, 1].astype(np.int64))
    return result
