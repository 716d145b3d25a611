"""Deferred collation: rows travel unpadded from the data loader to the step, which groups them before it pads them."""

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

Inputs = dict[str, Any]
Collator = Callable[[list[Any]], Any]
Columns = dict[str, tuple[torch.Tensor, list[torch.Size]]]


class Batch:
    """What the data loader hands over, on the host.

    Opaque on purpose: neither a list, a mapping nor something with `.to`, so that Accelerate and the pinning thread
    leave it as it is. `in` is always false, for stock code that looks for a key in a batch.
    """

    def __contains__(self, key: object) -> bool:
        return False

    def unpack(self) -> list[Any]:
        """Its rows."""
        raise NotImplementedError


class Rows(Batch):
    """The rows of one data loader batch, not padded yet."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self._rows, self._pickled = list(rows), b""
        self._columns: Columns = {}
        if get_worker_info():
            rest, self._columns = _pack(self._rows)
            self._rows, self._pickled = [], pickle.dumps(rest)

    def unpack(self) -> list[Any]:
        """The rows as the data set gave them."""
        if not self._pickled:
            return self._rows
        return _unpack(pickle.loads(self._pickled), self._columns)  # noqa: S301 - by a worker of this process


class KeepRows:
    """A collator that does not collate, in place of another one.

    A class, because a lambda does not pickle under the spawn start method. It has the attributes of the other, because
    trainers ask for them (`valid_label_columns` in sentence-transformers).
    """

    def __init__(self, collator: Any = None) -> None:
        if not isinstance(collator, type):
            self.__dict__.update(getattr(collator, "__dict__", {}))

    def __call__(self, rows: list[Any]) -> Rows:
        return Rows(rows)


def _pack(rows: Sequence[Any]) -> tuple[list[Any], Columns]:
    """Joins the tensors of a column into one flat buffer.

    Each tensor that leaves a worker costs a file descriptor: 256 rows of 3 tensors exhaust the usual limit of 1,024
    and hang the loader.
    """
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        return list(rows), {}
    columns = {}
    for key in rows[0]:
        values = [row.get(key) for row in rows]
        if all(isinstance(value, torch.Tensor) for value in values) and len({value.dtype for value in values}) == 1:
            columns[key] = (torch.cat([value.reshape(-1) for value in values]), [value.shape for value in values])
    return [_replaced(row, dict.fromkeys(columns)) for row in rows], columns


def _unpack(packed: list[Any], columns: Columns) -> list[Any]:
    if not columns:
        return packed
    parts = {
        key: [
            part.view(shape)
            for part, shape in zip(torch.split(flat, [shape.numel() for shape in shapes]), shapes, strict=True)
        ]
        for key, (flat, shapes) in columns.items()
    }
    return [_replaced(row, {key: values[index] for key, values in parts.items()}) for index, row in enumerate(packed)]


def _replaced(row: Any, values: Mapping[str, Any]) -> Any:
    """A row of the same type and order of keys with some values replaced."""
    replaced = copy.copy(row)
    for key, value in values.items():
        replaced[key] = value
    return replaced


def row_length(row: Any, tokenizer: Any = None) -> int:
    """Tokens of a row, as its collator will lay them out; 1 where there are none.

    The length of `input_ids`, over all choices where it has several, or of all columns whose names end so
    (`query_input_ids`, `passage_input_ids`); both sides of a pair (`chosen_ids` and
    `rejected_ids`, after `prompt_ids`, as TRL has them), which are padded to the longer one; the frames of a sound
    (`input_features`, `[mels, frames]`, or `input_values`); else what `tokenizer` makes of its texts, for collators
    that tokenise.
    """
    length = _tokens_of(row) if isinstance(row, Mapping) else 1
    if length is None and hasattr(tokenizer, "model_max_length"):
        tokens = sum(len(tokenizer(text, verbose=False)["input_ids"]) for text in _texts(row))
        length = max(1, min(tokens, tokenizer.model_max_length))
    return 1 if length is None else length


def _tokens_of(row: Mapping[str, Any]) -> int | None:
    if row.get("input_ids") is not None:
        return _length(row["input_ids"])
    if row.get("chosen_ids") is not None and row.get("rejected_ids") is not None:
        prompt = row.get("prompt_ids")
        longer = max(_length(row["chosen_ids"]), _length(row["rejected_ids"]))
        return 2 * (longer + (0 if prompt is None else _length(prompt)))
    if row.get("input_features") is not None:
        return num_frames(row["input_features"])
    columns = [key for key in row if key.endswith("_input_ids") and key != "decoder_input_ids"]
    if columns:
        return sum(_length(row[key]) for key in columns)
    return None if row.get("input_values") is None else _length(row["input_values"])


def _texts(value: Any) -> Iterator[str]:
    """The strings in a row, as deep as they lie: the messages of a chat are dictionaries in a list."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def num_frames(features: Any) -> int:
    """Frames of sound features, the last dimension."""
    if isinstance(features, (torch.Tensor, np.ndarray)):
        return int(features.shape[-1])
    return (
        num_frames(features[0]) if len(features) and isinstance(features[0], (Sequence, np.ndarray)) else len(features)
    )


def has_targets(model: Any) -> bool:
    """Whether rows have two parts that are padded separately: those of an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def target_length(row: Any) -> int:
    """Tokens of the target that an encoder-decoder pads separately: the length of `labels`."""
    labels = row.get("labels") if isinstance(row, Mapping) else None
    return 0 if labels is None else _length(labels)


def _length(values: Any) -> int:
    if isinstance(values, (torch.Tensor, np.ndarray)):
        return int(np.prod(values.shape))
    if not isinstance(values, Sequence):
        return 1
    if len(values) > 0 and isinstance(values[0], (Sequence, torch.Tensor, np.ndarray)):
        return len(values) * max(_length(value) for value in values)
    return len(values)


def need_one_width(row: Any) -> bool:
    """Whether the loss of such rows depends on the padded width, so that all of a mini-batch must have the same.

    Extractive question answering takes a softmax over all columns, padding included.
    """
    return isinstance(row, Mapping) and "start_positions" in row


def collated(collator: Collator, groups: list[list[Any]]) -> list[Inputs]:
    """Each group of rows, padded by the user's collator; all to one width where the loss needs that."""
    if len(groups) == 1 or not need_one_width(groups[0][0]):
        return [_padded(collator, group) for group in groups]
    whole = _padded(collator, chain.from_iterable(groups))
    ends = accumulate(map(len, groups), initial=0)
    return [select_rows(whole, list(range(start, end))) for start, end in pairwise(ends)]


def _padded(collator: Collator, rows: Iterable[Any]) -> Inputs:
    """One group; of copies of its rows, because collators may take things out of them."""
    return as_inputs(collator([copy.copy(row) for row in rows]))


def as_inputs(collated: Any) -> Inputs:
    """What a collator returned, as a dictionary.

    Raises:
        TypeError: it is no mapping.
    """
    if not isinstance(collated, Mapping):
        raise TypeError(
            f"The data collator returned a {type(collated).__name__}, and must return a dictionary of model inputs."
        )
    return dict(collated)


def num_rows_of(inputs: Mapping[str, Any]) -> int:
    """Rows of collated inputs: the first dimension of the first tensor that has one."""
    return next((value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), 1)


def has_entry_for_each_row(inputs: Mapping[str, Any], num_rows: int) -> bool:
    """Whether rows can be taken out: not of sequences laid end to end, pairs, or images packed into patches."""
    return all(len(value) == num_rows for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim)


def count_cells(inputs: Mapping[str, Any], *, with_targets: bool) -> int | None:
    """Padded tokens (frames of a sound) of collated inputs; `None` where there are none to be counted.

    Tokens of all columns where there are several (`sentence_0_input_ids`, ...), and of `labels` for an encoder-decoder.
    """
    columns = [value for key, value in inputs.items() if key.endswith("input_ids") and key != "decoder_input_ids"]
    cells = sum(value.numel() for value in columns if isinstance(value, torch.Tensor)) or _sound_cells(inputs)
    if cells is None:
        return None
    labels = inputs.get("labels") if with_targets else None
    return cells + (labels.numel() if isinstance(labels, torch.Tensor) else 0)


def _sound_cells(inputs: Mapping[str, Any]) -> int | None:
    mask = inputs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and ("input_features" in inputs or "input_values" in inputs):
        return mask.numel()  # features may be [mels, frames] or [frames, mels]
    sounds = (inputs[key] for key in ("input_features", "input_values") if isinstance(inputs.get(key), torch.Tensor))
    return next((len(sound) * num_frames(sound) for sound in sounds), None)


def rows_of_examples(examples: Iterable[int], num_examples: int, rows_each: int) -> list[int]:
    """Indices of the rows of some examples, where the parts of all lie one after the other.

    Example:
        >>> rows_of_examples([0, 2], num_examples=3, rows_each=2)  # pairs: all chosen rows, then all rejected ones
        [0, 2, 3, 5]
    """
    chosen = list(examples)
    return [part * num_examples + example for part in range(rows_each) for example in chosen]


def select_rows(inputs: Mapping[str, Any], indices: list[int]) -> Inputs:
    """Some rows of collated inputs, at the width they have; what has no dimension of rows is kept."""
    num_rows = num_rows_of(inputs)
    return {
        key: value[indices] if isinstance(value, torch.Tensor) and value.ndim and len(value) == num_rows else value
        for key, value in inputs.items()
    }
