"""The metrics against plain, slow computations of the same."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_mbp.cli.metrics import Accuracy, ExactMatch, MacroF1, Perplexity, RougeL, cross_entropy
from hf_mbp.cli.tasks.language_modeling import sum_log_likelihoods


def plain_f1(predictions: list[int], references: list[int]) -> float:
    scores = []
    for wanted in set(predictions) | set(references):
        pairs = [(p == wanted, r == wanted) for p, r in zip(predictions, references, strict=True)]
        right = pairs.count((True, True))
        precision = right / max(1, right + pairs.count((True, False)))
        recall = right / max(1, right + pairs.count((False, True)))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    return sum(scores) / len(scores)


@pytest.mark.parametrize("seed", range(5))
def test_accuracy_and_f1(seed: int) -> None:
    generator = random.Random(seed)
    predictions = [generator.randrange(4) for _ in range(30)]
    references = [generator.choice([p, generator.randrange(3)]) for p in predictions]  # class 3 is predicted only
    agree = [p == r for p, r in zip(predictions, references, strict=True)]
    assert Accuracy().compute(predictions=predictions, references=references)["accuracy"] == pytest.approx(
        sum(agree) / 30
    )
    assert MacroF1().compute(predictions=predictions, references=references)["f1"] == pytest.approx(
        plain_f1(predictions, references)
    )


def test_perplexity_weighs_every_token_the_same() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 6, 11)
    labels = torch.randint(11, (3, 6))
    labels[0, :5] = -100
    labels[1, 3:] = -100
    labels[2, 0] = -100
    sums = sum_log_likelihoods((logits, "hidden states"), labels)
    total, count = 0.0, 0
    for row, row_labels in zip(logits.double(), labels.tolist(), strict=True):
        for position, label in enumerate(row_labels[1:]):
            if label != -100:
                total -= math.log(torch.softmax(row[position], -1)[label])
                count += 1
    result = Perplexity().compute(predictions=sums[:, 0].tolist(), references=sums[:, 1].long().tolist())
    assert sums[:, 1].tolist() == [1, 2, 5]
    assert result["mean_loss"] == pytest.approx(total / count, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-6)


def test_perplexity_of_a_diverged_model_and_of_nothing() -> None:
    assert Perplexity().compute(predictions=[1e9], references=[1])["perplexity"] == math.inf
    assert math.isnan(Perplexity().compute(predictions=[0.0], references=[0])["perplexity"])


def test_cross_entropy_is_that_of_torch() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(7, 3)) * 50, np.array([0, 1, 2, 2, 1, 0, 0])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert cross_entropy(logits, labels) == pytest.approx(expected.item())


def test_metrics_write_no_files(tmp_path: Path) -> None:
    """Several processes compute at once; files in a shared cache would collide."""
    metrics = [Accuracy(), Accuracy()]
    for metric in metrics:
        metric.add_batch(predictions=[0, 1], references=[0, 0])
    assert [metric.compute()["accuracy"] for metric in metrics] == [0.5, 0.5]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def plain_common(left: list[str], right: list[str]) -> int:
    """The longest common subsequence, by trying."""
    if not left or not right:
        return 0
    if left[0] == right[0]:
        return 1 + plain_common(left[1:], right[1:])
    return max(plain_common(left[1:], right), plain_common(left, right[1:]))


@pytest.mark.parametrize("seed", range(5))
def test_rouge_l_and_exact_match(seed: int) -> None:
    generator = random.Random(seed)
    texts = [[generator.choice("abc") for _ in range(generator.randrange(8))] for _ in range(20)]
    predictions, references = texts[:10], [*texts[10:19], texts[9]]
    scores = []
    for p, r in zip(predictions, references, strict=True):
        common = plain_common(p, r)
        precision, recall = common / max(1, len(p)), common / max(1, len(r))
        scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
    written = {"predictions": [" ".join(p) for p in predictions], "references": [" ".join(r) for r in references]}
    assert RougeL().compute(**written)["rouge_l"] == pytest.approx(sum(scores) / 10)
    same = sum(p == r for p, r in zip(predictions, references, strict=True))
    assert ExactMatch().compute(**written)["exact_match"] == same / 10 >= 0.1


def test_rouge_l_reads_words_of_any_script_in_any_case() -> None:
    score = RougeL().compute(predictions=["Ünter_den, LINDEN!", ""], references=["ünter den linden", ""])
    assert score["rouge_l"] == 0.5
