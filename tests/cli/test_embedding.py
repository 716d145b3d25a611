"""Pairs of texts: how they are tokenized and padded, what is measured, and that training finds the right ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, EvalPrediction

from hf_mbp.cli import check, finetune
from hf_mbp.cli.embedding_trainer import PairCollator, retrieval_metrics
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run
from tests.cli.conftest import WORDS
from tests.cli.test_tasks import prepare

ROWS = [{"query": WORDS[i], "passage": " ".join([WORDS[i], *WORDS[: 1 + i % 7]])} for i in range(20)]


def test_both_sides_are_cut_and_padded_by_themselves(encoder: Path) -> None:
    setup = prepare("embedding", encoder, ROWS, ROWS[:4], max_length=6)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    assert setup.train[0]["query_input_ids"] == tokenizer(ROWS[0]["query"])["input_ids"]
    assert max(map(len, setup.train["passage_input_ids"])) == 6
    batch = PairCollator(tokenizer)([setup.train[index] for index in (0, 6)])
    assert batch["query_input_ids"].shape == (2, len(tokenizer("a")["input_ids"]))
    assert batch["passage_input_ids"].shape == batch["passage_attention_mask"].shape == (2, 6)
    assert not batch["passage_attention_mask"][0].all()
    assert all(not parameter.requires_grad for parameter in setup.model.pooler.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_a_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, passages = random.normal(size=(2, 9, 4))
    places = []
    for row, query in enumerate(queries):
        scores = [float(query @ passage) for passage in passages]
        places.append(1 + sum(score > scores[row] for score in scores))
    metrics = retrieval_metrics(EvalPrediction(predictions=(queries, passages), label_ids=None))
    assert metrics["recall_at_1"] == pytest.approx(sum(place == 1 for place in places) / 9)
    assert metrics["mrr"] == pytest.approx(sum(1 / place for place in places) / 9)


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    alike = np.ones((5, 3))
    assert retrieval_metrics(EvalPrediction(predictions=(alike, alike), label_ids=None))["recall_at_1"] == 0


def test_a_model_that_has_diverged_finds_nothing() -> None:
    nothing = np.full((5, 3), np.nan)
    metrics = retrieval_metrics(EvalPrediction(predictions=(nothing, nothing), label_ids=None))
    assert metrics == {"recall_at_1": 0, "mrr": pytest.approx(1 / 5)}


def test_training_finds_passages(
    recipe: Callable[..., Path], write_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_rows("pairs.jsonl", ROWS))
    changes = {"task": "embedding", "train_file": file, "validation_file": file, "max_steps": 12}
    path = str(recipe(**changes, per_device_train_batch_size=20, max_tokens_per_micro_batch=40))
    assert finetune.main([path]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_recall_at_1"] > results["eval_before_recall_at_1"] + 0.2
    out = capsys.readouterr().out
    assert "Checked to be exact" in out
    assert "20 rows a step run as" in out
    assert results["eval_loss"] == pytest.approx(_loss_of_whole(tmp_path / "run"), rel=0.05)


def _loss_of_whole(folder: Path) -> float:
    """Of the saved model: the mean over batches of 8, which is what is evaluated at a time."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)

    def embed(texts: list[str]) -> torch.Tensor:
        means = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(dim=1)[0].detach() for text in texts
        ]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    losses = []
    for start in range(0, len(ROWS), 8):
        part = ROWS[start : start + 8]
        scores = 20 * embed([row["query"] for row in part]) @ embed([row["passage"] for row in part]).T
        losses.append((float(torch.nn.functional.cross_entropy(scores, torch.arange(len(part)))), len(part)))
    return sum(loss * count for loss, count in losses) / len(ROWS)


def test_it_can_be_planned_and_checked(recipe: Callable[..., Path], write_rows: Callable[..., Path]) -> None:
    file = str(write_rows("pairs.jsonl", ROWS))
    path = str(recipe(task="embedding", train_file=file, validation_file=None))
    plan = plan_run(read_recipe([path]), torch.device("cpu"))
    assert len(plan.steps[0].split) >= 1
    assert check.main([path]) == 0


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"query": "a", "text": "b"}], {}, "no column 'passage'"),
        ([{"query": "a", "passage": 3}], {}, "column 'passage' must hold text, but has 3"),
        (ROWS, {"similarity_scale": 0.0}, "similarity_scale is 0.0; write a number above 0, such as 20"),
    ],
)
def test_mistakes_are_told(rows: list[dict[str, Any]], options: dict[str, Any], message: str, encoder: Path) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        prepare("embedding", encoder, rows, **options)
