"""Where in a text the answer to a question is; long texts are read in windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    DataCollatorWithPadding,
    EvalPrediction,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.answers import answer_f1, exact_match
from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError, say
from hf_mbp.cli.metrics import cross_entropy
from hf_mbp.cli.models import length_limit, load_model, require_offsets, tell_new_head
from hf_mbp.cli.splits import Part, Splits, require_columns
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import CUT, Batch, encode_rows, encode_splits, texts

# Columns of ours beside the user's and the model's: which question a window is of, and where its tokens are in the
# context, -1 for those that are not in it.
_ROW, _STARTS, _ENDS = "hf_mbp_row", "hf_mbp_starts", "hf_mbp_ends"

Array = npt.NDArray[Any]


def prepare(
    splits: Splits,
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
) -> TaskSetup:
    """Cut contexts into windows, mark the answers in them, load a model that tells start and end."""
    columns = ("question_column", "context_column", "answers_column")
    require_columns(splits, {column: getattr(data_arguments, column) for column in columns})
    require_offsets(tokenizer)
    tell_new_head(model_arguments, config, ("ForQuestionAnswering",), "tells where an answer is")
    tokenizer.padding_side = "right"  # the answer's place is counted from the left
    train, windows = encode_splits(splits, partial(_encode, tokenizer=tokenizer, arguments=data_arguments))
    validation, metrics = None, AnswerMetrics.of_nothing()
    if windows is not None:
        validation = _for_the_model(windows)
        metrics = AnswerMetrics.of(windows, splits.validation, data_arguments)
    return TaskSetup(
        model=load_model(AutoModelForQuestionAnswering, model_arguments),
        train=_for_the_model(train),
        validation=validation,
        collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=start_and_end_logits,
    )


def _for_the_model(windows: Dataset) -> Dataset:
    return windows.remove_columns([_ROW, _STARTS, _ENDS])


# Rows to windows


def _encode(part: Part, *, tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Dataset:
    limit = length_limit(tokenizer, arguments.max_length)
    rows, origin = part.rows, part.origin
    rows = rows.select_columns([arguments.question_column, arguments.context_column, arguments.answers_column])
    rows = rows.add_column(_ROW, list(range(len(rows))))

    def encode(batch: Batch) -> Batch:
        # Some questions begin with blanks, which the tokenizer would count
        questions = [question.strip() for question in texts(batch, arguments.question_column)]
        contexts = texts(batch, arguments.context_column)
        answers = [
            find_answer(answer, context, f"{origin}, column {arguments.answers_column!r}: row {row}")
            for row, answer, context in zip(batch[_ROW], batch[arguments.answers_column], contexts, strict=True)
        ]
        if limit is not None:
            _check_room(questions, tokenizer, limit, arguments.doc_stride)
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second" if limit is not None else False,
            max_length=limit,
            stride=arguments.doc_stride if limit is not None else 0,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,  # without padding it is all ones; the collator makes it
        )
        return _as_windows(encoded, answers, batch[_ROW], tokenizer)

    windows = encode_rows(replace(part, rows=rows), encode, limit=limit, workers=arguments.preprocessing_num_workers)
    say(f"{part.name}: the {len(windows):,} rows are windows on the contexts of {len(rows):,} questions")
    return windows


def find_answer(answers: Any, context: str, where: str) -> tuple[int, int]:
    """Return where in the context the first of the answers starts and ends.

    Where ``answer_start`` is off by some characters, as in some data sets, the nearest place that has the text is
    taken.

    Raises:
        UserError: there is no answer, or it is not in the context.
    """
    try:
        found = list(zip(answers["text"], answers["answer_start"], strict=True))
        is_right = all(isinstance(text, str) and isinstance(start, int) for text, start in found)
    except (TypeError, KeyError, ValueError):
        found, is_right = [], False
    if not is_right:
        raise UserError(
            f"{where} is {answers!r:.80}, but must be {{text: [...], answer_start: [...]}}: texts, and as many numbers"
        )
    if not found or not found[0][0]:
        raise UserError(
            f"{where} has no answer; leave out questions without one: a model that tells where the answer is cannot"
            " say that there is none"
        )
    text, start = found[0]
    places = _places(text, context)
    if not places:
        raise UserError(f"{where}: the answer {text!r:.60} is not in the context; answers have to be copied from it")
    nearest = min(places, key=lambda place: abs(place - start))
    return nearest, nearest + len(text)


def _places(text: str, context: str) -> list[int]:
    places, place = [], context.find(text)
    while place >= 0:
        places.append(place)
        place = context.find(text, place + 1)
    return places


def _check_room(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, limit: int, doc_stride: int) -> None:
    """Check that windows move on: a question may be too long to leave room for new tokens of the context."""
    encoded = tokenizer(list(questions), add_special_tokens=False, truncation=False, verbose=False)
    longest = max(len(ids) for ids in encoded["input_ids"])
    room = limit - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room <= doc_stride:
        raise UserError(
            f"a question of {longest} tokens leaves {max(0, room)} of {limit} (max_length) for the context, and"
            f" doc_stride is {doc_stride}; write a smaller doc_stride or a larger max_length"
        )


def _as_windows(
    encoded: Any, answers: Sequence[tuple[int, int]], rows: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Batch:
    questions = encoded.pop("overflow_to_sample_mapping")
    offsets = encoded.pop("offset_mapping")
    windows: Batch = {**encoded, "start_positions": [], "end_positions": [], _ROW: [], _STARTS: [], _ENDS: []}
    for index, (question, places) in enumerate(zip(questions, offsets, strict=True)):
        of_context = [part == 1 for part in encoded.sequence_ids(index)]
        starts = [start if inside else -1 for (start, _), inside in zip(places, of_context, strict=True)]
        ends = [end if inside else -1 for (_, end), inside in zip(places, of_context, strict=True)]
        ids = encoded["input_ids"][index]
        nowhere = ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0
        first, last = find_tokens(starts, ends, *answers[question]) or (nowhere, nowhere)
        windows["start_positions"].append(first)
        windows["end_positions"].append(last)
        windows[_ROW].append(rows[question])
        windows[_STARTS].append(starts)
        windows[_ENDS].append(ends)
    windows[CUT] = [False] * len(questions)  # nothing is lost: what is behind a window is in the next
    return windows


def find_tokens(starts: Sequence[int], ends: Sequence[int], start: int, end: int) -> tuple[int, int] | None:
    """Return the first and the last token of an answer, or ``None`` if not all of it is in the window.

    Args:
        starts: where in the context each token starts, -1 for a token that is not in it.
        ends: where each token ends.
        start: where the answer starts.
        end: where it ends.

    >>> find_tokens([-1, 0, 2, 5], [-1, 1, 4, 8], 2, 8), find_tokens([-1, 0, 2], [-1, 1, 4], 2, 8)
    ((2, 3), None)
    """
    inside = [index for index, place in enumerate(starts) if place >= 0]
    if not inside or starts[inside[0]] > start or ends[inside[-1]] < end:
        return None
    tokens = [index for index in inside if starts[index] < end and ends[index] > start]
    return (tokens[0], tokens[-1]) if tokens else None


# Logits to answers


def start_and_end_logits(logits: Any, _labels: Any) -> Any:
    """Return the two kinds of logits; some models return hidden states with them, which evaluation would pile up."""
    return tuple(logits[:2])


@dataclass(frozen=True, kw_only=True)
class AnswerMetrics:
    """Measures answers as texts: the best one of all windows of a question, against all references.

    ``exact_match`` and ``f1`` are means over the questions, of :func:`~hf_mbp.cli.answers.exact_match` and
    :func:`~hf_mbp.cli.answers.answer_f1`, from 0 to 1.
    """

    rows: tuple[int, ...]  # the question of each window
    starts: tuple[tuple[int, ...], ...]
    ends: tuple[tuple[int, ...], ...]
    contexts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    max_answer_length: int

    @classmethod
    def of(cls, windows: Dataset, questions: Dataset, arguments: DataArguments) -> AnswerMetrics:
        """Keep what is needed of windows and questions."""
        return cls(
            rows=tuple(windows[_ROW]),
            starts=tuple(map(tuple, windows[_STARTS])),
            ends=tuple(map(tuple, windows[_ENDS])),
            contexts=tuple(questions[arguments.context_column]),
            references=tuple(tuple(answers["text"]) for answers in questions[arguments.answers_column]),
            max_answer_length=arguments.max_answer_length,
        )

    @classmethod
    def of_nothing(cls) -> AnswerMetrics:
        """For a run that does not evaluate."""
        return cls(rows=(), starts=(), ends=(), contexts=(), references=(), max_answer_length=1)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metrics and the mean loss of ``predictions``, two arrays [windows, width].

        The loss here is over the tokens of a window, so that it does not change with the batches. That of the model is
        over padding, too.
        """
        start_logits, end_logits = (np.asarray(logits) for logits in prediction.predictions)
        answers = self.answers(start_logits, end_logits)
        pairs = list(zip(answers, self.references, strict=True))
        losses = [
            (cross_entropy(logits[None, : len(starts)], label[None]))
            for logits_of_all, labels in zip((start_logits, end_logits), prediction.label_ids, strict=True)
            for logits, starts, label in zip(logits_of_all, self.starts, np.asarray(labels), strict=True)
        ]
        return {
            "exact_match": float(np.mean([exact_match(*pair) for pair in pairs])),
            "f1": float(np.mean([answer_f1(*pair) for pair in pairs])),
            "mean_loss": float(np.mean(losses)),
        }

    def answers(self, start_logits: Array, end_logits: Array) -> list[str]:
        """Return the text of the best answer to each question."""
        best = [(-np.inf, "")] * len(self.contexts)
        for row, starts, ends, start, end in zip(
            self.rows, self.starts, self.ends, start_logits, end_logits, strict=True
        ):
            inside = [index for index, place in enumerate(starts) if place >= 0]
            if not inside:
                continue
            context = slice(inside[0], inside[-1] + 1)
            score, first, last = best_span(start[context], end[context], self.max_answer_length)
            if score > best[row][0]:
                text = self.contexts[row][starts[inside[0] + first] : ends[inside[0] + last]]
                best[row] = (score, text)
        return [text for _, text in best]


def best_span(start_logits: Array, end_logits: Array, max_length: int) -> tuple[float, int, int]:
    """Return the highest sum of a start and an end logit, and the two tokens, of all spans of at most ``max_length``.

    >>> best_span(np.array([0.0, 3.0, 1.0]), np.array([4.0, 0.0, 2.0]), 2)
    (5.0, 1, 2)
    """
    tokens = np.arange(len(start_logits))
    length = tokens[None, :] - tokens[:, None] + 1
    scores = start_logits[:, None].astype(np.float64) + end_logits[None, :]
    scores = np.where((length >= 1) & (length <= max_length), scores, -np.inf)
    first, last = np.unravel_index(scores.argmax(), scores.shape)
    return float(scores[first, last]), int(first), int(last)
