"""Accuracy, F1, perplexity, exact match and ROUGE-L as ``evaluate`` metrics.

``evaluate.load("accuracy")`` would fetch the metric's code from the Hub; these need no network.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class _InMemoryMetric(evaluate.Metric):
    """A metric that keeps its inputs in memory.

    Every process holds all predictions already (the Trainer gathers them), so each computes by itself; on disk they
    would meet in one cache file.
    """

    description = ""
    kind = "int64"
    reference_kind = "int64"

    def __init__(self) -> None:
        super().__init__(keep_in_memory=True)

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"predictions": datasets.Value(self.kind), "references": datasets.Value(self.reference_kind)}
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=self.description,
            features=datasets.Features(kinds),
        )


class Accuracy(_InMemoryMetric):
    """Share of predictions that are right.

    >>> Accuracy().compute(predictions=[0, 1, 1], references=[0, 1, 0])["accuracy"]
    0.6666666666666666
    """

    description = "share of predicted class ids that equal the reference"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class MacroF1(_InMemoryMetric):
    """Mean of the classes' F1, the harmonic mean of precision and recall: a rare class counts as much as any.

    The classes are those among predictions and references; one that is never predicted rightly has F1 zero.

    >>> MacroF1().compute(predictions=[0, 1, 1], references=[0, 1, 0])["f1"]
    0.6666666666666666
    """

    description = "F1 of class ids, averaged over the classes"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predicted, expected = np.asarray(predictions), np.asarray(references)
        classes = np.union1d(predicted, expected)
        right = np.array([np.sum((predicted == c) & (expected == c)) for c in classes])
        # F1 = 2 * right / (predicted as c + really c); the sum is positive, since c occurs in one of them
        total = np.array([np.sum(predicted == c) + np.sum(expected == c) for c in classes])
        return {"f1": float(np.mean(2 * right / total))}


class Perplexity(_InMemoryMetric):
    """``exp`` of the mean negative log-likelihood of a token, over all tokens of all rows.

    ``predictions`` are the rows' summed negative log-likelihoods (in nats), ``references`` how many tokens each sum
    is over: a mean of the rows' or batches' means would give tokens of short rows more weight.

    >>> Perplexity().compute(predictions=[0.0, 4 * math.log(2)], references=[1, 3])["perplexity"]
    2.0
    """

    description = "exp of the token-weighted mean negative log-likelihood"
    kind = "float64"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        tokens = sum(references)
        loss = math.fsum(predictions) / tokens if tokens else math.nan
        try:
            return {"perplexity": math.exp(loss), "mean_loss": loss}
        except OverflowError:  # a model that has diverged
            return {"perplexity": math.inf, "mean_loss": loss}


class _TextMetric(_InMemoryMetric):
    """A metric of texts."""

    kind = reference_kind = "string"


class ExactMatch(_TextMetric):
    """Share of texts that are the reference, character by character.

    >>> ExactMatch().compute(predictions=["a b", "a  b"], references=["a b", "a b"])["exact_match"]
    0.5
    """

    description = "share of texts that equal the reference"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        same = [prediction == reference for prediction, reference in zip(predictions, references, strict=True)]
        return {"exact_match": float(np.mean(same))}


class RougeL(_TextMetric):
    """ROUGE-L (Lin, 2004): how much of two texts is common, in the same order; averaged over the texts.

    With the longest common subsequence of their words (runs of letters and digits, in lower case, not stemmed), of
    length n: the harmonic mean of n / words of the prediction and n / words of the reference. Zero if n is.

    >>> RougeL().compute(predictions=["the cat sat"], references=["The cat, it sat."])["rouge_l"]
    0.8571428571428571
    """

    description = "F-measure of the longest common subsequence of words"

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = [(_words(p), _words(r)) for p, r in zip(predictions, references, strict=True)]
        return {"rouge_l": float(np.mean([2 * _common(p, r) / max(1, len(p) + len(r)) for p, r in pairs]))}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(right) + 1)  # row[j]: of what was read of left, and the first j of right
    for word in left:
        before = row
        row = [0]
        for j, other in enumerate(right):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def cross_entropy(logits: Array, labels: Array) -> float:
    """Return the mean cross-entropy of ``logits`` [rows, classes] and class ids ``labels`` [rows], in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())
