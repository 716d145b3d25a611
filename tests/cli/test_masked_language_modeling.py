"""Hidden tokens: which, in training anew, in evaluation always the same; and what is measured of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    EvalPrediction,
    set_seed,
)

from hf_mbp.cli import check, finetune
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.tasks.masked_language_modeling import choose_hidden, compute_metrics, sum_hidden
from tests.cli.test_tasks import prepare

TASK = "masked_language_modeling"
ROWS = [{"text": "a b c d e f g h i j k l m n o p q r s t"}, {"text": "a"}, {"text": "x y z"}]


@pytest.fixture(scope="session")
def masker(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with a mask token, without a head for it."""
    folder = tmp_path_factory.mktemp("masker")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.add_special_tokens({"mask_token": "[MASK]"})
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


class TestEvaluationRows:
    def test_the_same_tokens_are_hidden_whatever_the_seed(self, masker: Path) -> None:
        setups = []
        for seed in (1, 2):
            set_seed(seed)
            setups.append(prepare(TASK, masker, ROWS, ROWS, mlm_probability=0.25).validation)
        first, second = setups
        assert first is not None
        assert second is not None
        assert first["input_ids"][:] == second["input_ids"][:]
        assert first["labels"][:] == second["labels"][:]

    def test_a_share_is_hidden_and_nothing_else_is_changed(self, masker: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(masker)
        validation = prepare(TASK, masker, ROWS, ROWS, mlm_probability=0.25).validation
        assert validation is not None
        assert [len(ids) for ids in validation["input_ids"]] == [22, 5, 3]  # longest first
        for row, text, hidden in zip(validation, (ROWS[0], ROWS[2], ROWS[1]), (5, 1, 1), strict=True):
            original = tokenizer(text["text"])["input_ids"]
            pairs = list(zip(row["input_ids"], row["labels"], original, strict=True))
            assert sum(token == tokenizer.mask_token_id for token, *_ in pairs) == hidden
            assert all(
                label == real if token == tokenizer.mask_token_id else (label == -100 and token == real)
                for token, label, real in pairs
            )
            assert row["labels"][0] == row["labels"][-1] == -100

    @pytest.mark.parametrize("seed", range(5))
    def test_which_are_chosen(self, seed: int) -> None:
        chosen = choose_hidden([1, *[0] * 40, 1, 1], 0.15, seed)
        assert len(chosen) == 6
        assert chosen <= set(range(1, 41))
        assert chosen == choose_hidden([1, *[0] * 40, 1, 1], 0.15, seed)
        assert len({frozenset(choose_hidden([0] * 40, 0.15, other)) for other in range(10)}) == 10
        assert choose_hidden([1, 1], 0.15, seed) == set()


class TestCollator:
    def test_training_rows_are_hidden_anew(self, masker: Path) -> None:
        setup = prepare(TASK, masker, ROWS)
        assert setup.train.column_names == ["input_ids"]
        set_seed(0)
        batches = [setup.collator([setup.train[0], setup.train[2]]) for _ in range(20)]
        labels = torch.stack([batch["labels"] for batch in batches])
        assert not (labels == labels[0]).all()
        assert 0.05 < (labels != -100).float().sum() / (20 * 23) < 0.3
        for batch in batches:
            assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
            kept = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
            assert batch["input_ids"][1][kept[1]].tolist() == [
                token
                for token, is_kept in zip(setup.train[2]["input_ids"], kept[1][:5].tolist(), strict=True)
                if is_kept
            ]

    def test_evaluation_rows_are_only_padded(self, masker: Path) -> None:
        setup = prepare(TASK, masker, ROWS, ROWS)
        assert setup.validation is not None
        rows = [setup.validation[1], setup.validation[2]]
        batch = setup.collator(rows)
        assert batch["input_ids"].tolist() == [rows[0]["input_ids"], [*rows[1]["input_ids"], 0, 0]]
        assert batch["labels"].tolist() == [rows[0]["labels"], [*rows[1]["labels"], -100, -100]]
        assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


class TestHead:
    SAID = "the model has no head that predicts masked tokens; a new one is trained"

    def test_a_new_one_is_told(self, masker: Path, capsys: pytest.CaptureFixture[str]) -> None:
        prepare(TASK, masker, ROWS)
        assert self.SAID in capsys.readouterr().out
        prepare(TASK, masker, ROWS, random_weights=True)
        assert self.SAID not in capsys.readouterr().out

    def test_one_that_is_there_is_kept(self, masker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        head = BertForMaskedLM(BertConfig.from_pretrained(masker))
        head.save_pretrained(tmp_path / "head")
        AutoTokenizer.from_pretrained(masker).save_pretrained(tmp_path / "head")
        model = prepare(TASK, tmp_path / "head", ROWS).model
        assert self.SAID not in capsys.readouterr().out
        weight = "cls.predictions.transform.dense.weight"
        assert torch.equal(model.get_parameter(weight), head.get_parameter(weight))


class TestMistakes:
    def test_a_model_without_a_mask_token(self, chat_model: Path) -> None:
        with pytest.raises(UserError, match="has no mask token; use an encoder such as BERT, or task language_model"):
            prepare(TASK, chat_model, ROWS)

    def test_columns_and_texts(self, masker: Path) -> None:
        with pytest.raises(UserError, match=r"has no column 'body' \(option text_column\)"):
            prepare(TASK, masker, ROWS, text_column="body")
        with pytest.raises(UserError, match="column 'text' must hold text, but has 3"):
            prepare(TASK, masker, [{"text": 3}])
        with pytest.raises(UserError, match="none of the 1 train rows has anything to learn from"):
            prepare(TASK, masker, [{"text": " "}])

    @pytest.mark.parametrize("share", [0, 1, 15])
    def test_the_share(self, masker: Path, share: float) -> None:
        with pytest.raises(ValueError, match=f"mlm_probability is {share}; write a number between 0 and 1"):
            prepare(TASK, masker, ROWS, mlm_probability=share)


def test_empty_lines_are_left_out(masker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(prepare(TASK, masker, [*ROWS, {"text": ""}, {"text": " "}]).train) == 3
    assert "2 rows left out" in capsys.readouterr().out


def test_metrics_weigh_every_hidden_token_the_same() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 6, 11), torch.randint(11, (3, 6))
    labels[0, 1:], labels[1, 3:], labels[2] = -100, -100, -100
    labels[1, 2] = logits[1, 2].argmax()
    sums = sum_hidden((logits, "hidden states"), labels)
    assert sums[:, 1].tolist() == [1, 3, 0]
    counted = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[counted].double(), labels[counted]).item()
    right = (logits.argmax(dim=-1) == labels)[counted].double().mean().item()
    assert right > 0
    metrics = compute_metrics(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
    assert metrics == pytest.approx({"pseudo_perplexity": np.exp(loss), "accuracy": right, "mean_loss": loss}, rel=1e-5)


@pytest.fixture
def masked_recipe(recipe: Callable[..., Path], masker: Path, write_rows: Any) -> Callable[..., Path]:
    """The words of a text are all alike, so that each tells the others."""
    rows = [{"text": " ".join("abcd"[i % 4] * (2 + i % 17))} for i in range(48)]
    train, test = write_rows("texts.jsonl", rows), write_rows("more.jsonl", rows[5:18])
    keys = {"model_name_or_path": str(masker), "train_file": str(train), "validation_file": str(test)}
    return lambda **changes: recipe(task=TASK, **keys, **changes)


def test_a_run_learns_and_its_numbers_are_those_of_single_rows(
    masked_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    argv = [str(masked_recipe(max_steps=30, per_device_eval_batch_size=4)), "--max_tokens_per_micro_batch", "64"]
    assert finetune.main(argv) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_pseudo_perplexity"] < 0.5 * results["eval_before_pseudo_perplexity"]
    assert results["eval_pseudo_perplexity"] == pytest.approx(np.exp(results["eval_loss"]))

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    losses: list[float] = []
    for index, line in enumerate((tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines()):
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
        hidden = sorted(choose_hidden([1, *[0] * (ids.shape[1] - 2), 1], 0.15, seed=index))
        targets = ids[0, hidden].clone()
        ids[0, hidden] = tokenizer.mask_token_id
        with torch.no_grad():
            logits = model(ids).logits[0, hidden]
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
    assert results["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_check_and_plan_know_the_task(masked_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = str(masked_recipe())
    assert check.main([file, "--mlm_probability", "0.5"]) == 0
    assert "\nexact: " in capsys.readouterr().out
    plan = plan_run(read_recipe([file, "--max_tokens_per_micro_batch", "64"]), torch.device("cpu"))
    assert sorted(plan.lengths) == sorted(4 + index % 17 for index in range(48))
    assert plan.padding() < plan.padding(plain=True)
