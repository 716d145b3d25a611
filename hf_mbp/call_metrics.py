"""What the trainers of TRL note at each call of `compute_loss`, put together for the whole mini-batch.

They append token accuracy, entropy, rewards and the like to `_metrics["train"]`, already gathered over the ranks, and
average the entries when they log: right if every call is a batch of its own, wrong for micro-batches, of which some
have more tokens than others and some are fillers. Here each rank notes its own numbers, weighed by what they are means
over; the ranks then put them together once a step.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from hf_mbp import compat
from hf_mbp.collate import num_rows_of
from hf_mbp.distributed import Ranks
from hf_mbp.step import MicroBatch

TOKENS = "_total_train_tokens"
"""Where TRL keeps the number of tokens trained on so far, which it logs as `num_tokens`."""


class CallMetrics:
    """The metrics of one trainer, in `mode` "train" or "eval"; does nothing for a trainer that keeps none."""

    def __init__(self, trainer: Any, ranks: Ranks, mode: str = "train") -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._mode = mode
        self._noted: dict[str, list[tuple[float, float]]] = {}
        self._tokens = 0

    def restart(self) -> None:
        """Forgets what was noted since the last merge."""
        self._noted, self._tokens = {}, 0

    @contextmanager
    def call(self, micro_batch: MicroBatch, *, is_gathered: bool = False) -> Iterator[None]:
        """Around a call of `compute_loss`: takes out what it notes; of fillers, only the names.

        With `is_gathered`, around a whole batch that all ranks have a part of: what is noted are numbers of all ranks.
        """
        metrics = getattr(self._trainer, "_metrics", None)
        if not isinstance(metrics, dict) or self._mode not in metrics:
            yield
            return
        before, metrics[self._mode] = metrics[self._mode], defaultdict(list)
        tokens_before = getattr(self._trainer, TOKENS, 0)
        try:
            with nullcontext() if is_gathered else compat.local_gathers(self._trainer):
                yield
            metrics = self._trainer._metrics  # a copy by now, if something was tried meanwhile and put back
            self._note(metrics[self._mode], micro_batch)
            if micro_batch.num_rows:
                self._tokens += getattr(self._trainer, TOKENS, 0) - tokens_before
        finally:
            self._trainer._metrics[self._mode] = before
            if hasattr(self._trainer, TOKENS):
                setattr(self._trainer, TOKENS, tokens_before)

    def _note(self, entries: dict[str, list[float]], micro_batch: MicroBatch) -> None:
        weights = _weights(micro_batch) if micro_batch.num_rows else {}
        default = weights.get("", 0.0)
        for name, values in entries.items():
            pairs = self._noted.setdefault(name, [])
            pairs += [(float(value), weights.get(name, default)) for value in values]

    def idle(self, micro_batch: MicroBatch) -> None:
        """Counts the tokens of a micro-batch that is not run."""
        if hasattr(self._trainer, TOKENS):
            self._tokens += micro_batch.tokens

    def merge(self) -> None:
        """Appends one entry a metric for the mini-batch; to be called by all ranks once a step."""
        if not self._noted:
            return
        names = sorted(self._noted)
        merged = [_sums(self._noted[name]) for name in names]
        gathered = self._ranks.gather(float(self._tokens), *(number for numbers in merged for number in numbers))
        entries = self._trainer._metrics[self._mode]
        if hasattr(self._trainer, TOKENS):
            setattr(self._trainer, TOKENS, getattr(self._trainer, TOKENS) + int(sum(row[0] for row in gathered)))
        for position, name in enumerate(names):
            start = 1 + 4 * position
            entries[name].append(_value(name, [row[start : start + 4] for row in gathered]))
        if "num_tokens" in self._noted:
            entries["num_tokens"] = [getattr(self._trainer, TOKENS)]
        self.restart()


def _weights(micro_batch: MicroBatch) -> dict[str, float]:
    """What each metric of a micro-batch is a mean over; under `""` what those not named are.

    Preference pairs come as `completion_mask`, `[chosen rows + rejected rows, width]`; some of their metrics are means
    over completion tokens, the others over pairs.
    """
    mask = micro_batch.inputs.get("completion_mask")
    if not isinstance(mask, torch.Tensor):
        return {"": micro_batch.num_items}
    chosen, rejected = (float(part.sum()) for part in mask[:, 1:].chunk(2))
    return {
        "": num_rows_of(micro_batch.inputs) / 2,
        "loss": micro_batch.num_items,
        "entropy": chosen + rejected,
        "mean_token_accuracy": chosen,
        "logits/chosen": chosen,
        "logits/rejected": rejected,
    }


def _sums(pairs: list[tuple[float, float]]) -> tuple[float, float, float, float]:
    """Weighted sum, weights, smallest and largest of the entries that weigh something."""
    counted = [(value, weight) for value, weight in pairs if weight]
    values = [value for value, _ in counted]
    return (
        sum(value * weight for value, weight in counted),
        sum(weight for _, weight in counted),
        min(values, default=float("inf")),
        max(values, default=float("-inf")),
    )


def _value(name: str, rows: list[list[float]]) -> float:
    if name.startswith("min_"):
        return min(row[2] for row in rows)
    if name.startswith("max_"):
        return max(row[3] for row in rows)
    weight = sum(row[1] for row in rows)
    return sum(row[0] for row in rows) / weight if weight else 0.0
