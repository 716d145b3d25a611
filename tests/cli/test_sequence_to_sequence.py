"""Texts for texts: what is read and what is learned, two widths, and what evaluation generates."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, EvalPrediction, GenerationConfig

from hf_mbp.cli import check
from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.finetune import main
from hf_mbp.cli.models import length_limit, load_config, load_tokenizer
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.tasks import TASKS
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.sequence_to_sequence import metrics_with, tokens_or_sums
from hf_mbp.trainer import MBPSeq2SeqTrainer

END = 1
"""The end token of ByT5; byte b is token b + 3."""


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def rows(num_rows: int) -> list[dict[str, str]]:
    """A word several times, and what it means: sources and targets of unlike lengths."""
    pairs = [("ab", "y"), ("cd", "nopes")]
    return [{"source": " ".join([pairs[i % 2][0]] * (1 + i % 5)), "target": pairs[i % 2][1]} for i in range(num_rows)]


def prepare(model: Path, given: list[dict[str, Any]], *, name: str = "config_name", **options: Any) -> TaskSetup:
    arguments = ModelArguments(**{name: str(model)})
    config = load_config(arguments)
    splits = Splits(train=Dataset.from_list(given), validation=None, train_origin="train.x", validation_origin="")
    data = DataArguments(train_file="train.x", **options)
    return TASKS["sequence_to_sequence"](splits, load_tokenizer(arguments, config), config, arguments, data)


@pytest.fixture
def text_recipe(recipe: Callable[..., Path], byte_model: Path, write_rows: Any) -> Callable[..., Path]:
    train, test = write_rows("pairs.jsonl", rows(40)), write_rows("more.jsonl", rows(10))

    def write(**changes: Any) -> Path:
        keys = {
            "task": "sequence_to_sequence",
            "model_name_or_path": None,
            "config_name": str(byte_model),
            "train_file": str(train),
            "validation_file": str(test),
            "predict_with_generate": True,
        }
        return recipe(**{**keys, **changes})

    return write


class TestRows:
    def test_sources_with_their_prefix_and_targets_with_their_end(self, byte_model: Path) -> None:
        setup = prepare(byte_model, [{"a": "xy", "b": "z"}], source_column="a", target_column="b", source_prefix="tr: ")
        assert setup.train.column_names == ["input_ids", "labels"]
        assert setup.train[0] == {"input_ids": [*ids("tr: xy"), END], "labels": [*ids("z"), END]}

    def test_labels_are_padded_by_position_apart_from_the_sources(self, byte_model: Path) -> None:
        setup = prepare(byte_model, [{"source": "a", "target": "bcd"}, {"source": "abcde", "target": "b"}])
        batch = setup.collator([setup.train[0], setup.train[1]])
        assert batch["labels"].tolist() == [[*ids("bcd"), END], [*ids("b"), END, -100, -100]]
        assert batch["input_ids"].shape == (2, 6)
        assert batch["attention_mask"].sum(dim=1).tolist() == [2, 6]

    def test_both_sides_are_cut(self, byte_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = [{"source": "abcdef", "target": "x"}, {"source": "a", "target": "xyz"}, {"source": "a", "target": "b"}]
        setup = prepare(byte_model, given, max_source_length=4, max_target_length=3)
        assert [len(row) for row in setup.train["input_ids"]] == [4, 2, 2]
        assert [len(row) for row in setup.train["labels"]] == [2, 3, 2]
        out = capsys.readouterr().out
        # a tokenizer in Python does not say what it cut: a row that just fits counts
        assert (
            "2 rows cut after 4 tokens of the source or 3 of the target (max_source_length, max_target_length)" in out
        )
        assert "train: tokens a target: median 2, longest 3" in out

    def test_rows_without_a_target_are_left_out(self, byte_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
        setup = prepare(byte_model, [{"source": "a", "target": " "}, {"source": "b", "target": "c"}])
        assert setup.train["input_ids"][:] == [[*ids("b"), END]]
        assert "1 rows left out, which have nothing to learn from" in capsys.readouterr().out
        with pytest.raises(UserError, match="none of the 1 train rows has anything to learn from; look at the columns"):
            prepare(byte_model, [{"source": "a", "target": ""}])

    def test_columns_inside_a_column(self, byte_model: Path) -> None:
        """As the translations of OPUS have them."""
        given = [{"id": "0", "translation": {"de": "ja", "en": "yes"}}]
        setup = prepare(byte_model, given, source_column="translation.de", target_column="translation.en")
        assert setup.train[0] == {"input_ids": [*ids("ja"), END], "labels": [*ids("yes"), END]}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"source": "a"}, r"no column 'target' \(option target_column\); its columns are source"),
            ({"target": "a"}, r"no column 'source' \(option source_column\); its columns are target"),
            ({"source": "a", "target": 3}, "column 'target' must hold text, but has 3"),
            ({"source": None, "target": "a"}, r"column 'source' \(option source_column\): 1 of \d+ rows are empty"),
        ],
    )
    def test_mistakes(self, byte_model: Path, given: dict[str, Any], message: str) -> None:
        with pytest.raises(UserError, match=message):
            prepare(byte_model, [given])

    def test_one_length_for_two(self, byte_model: Path) -> None:
        with pytest.raises(UserError, match=r"max_length says nothing here.*; write max_source_length and max_target"):
            prepare(byte_model, rows(2), max_length=8)

    def test_only_models_with_places_for_tokens_limit_what_is_asked_for(self, byte_model: Path) -> None:
        """What T5's tokenizer says is what T5 was trained with; it reads longer sources, too."""
        model = ModelArguments(config_name=str(byte_model))
        tokenizer = load_tokenizer(model, load_config(model))
        tokenizer.model_max_length = 8
        assert length_limit(tokenizer, None, config=load_config(model)) == 8
        assert length_limit(tokenizer, 16, config=load_config(model)) == 16
        with pytest.raises(UserError, match="max_source_length is 16, but the model reads at most 8 tokens"):
            length_limit(tokenizer, 16, "max_source_length", config=BartConfig())

    def test_a_model_without_a_decoder(self, encoder: Path) -> None:
        with pytest.raises(UserError, match="has no encoder and decoder; use a model such as T5 or BART"):
            prepare(encoder, rows(2), name="model_name_or_path")


class TestGenerationLength:
    """Stock generates 20 tokens, the start of the decoder included."""

    def test_is_that_of_the_longest_target(self, byte_model: Path) -> None:
        assert prepare(byte_model, rows(40)).model.generation_config.max_length == 1 + 6

    def test_is_the_limit_of_targets_if_there_is_one(self, byte_model: Path) -> None:
        assert prepare(byte_model, rows(40), max_target_length=30).model.generation_config.max_length == 1 + 30

    def test_is_the_model_s_own_if_it_has_one(self, byte_model: Path, tmp_path: Path) -> None:
        model = AutoModelForSeq2SeqLM.from_config(load_config(ModelArguments(config_name=str(byte_model))))
        model.generation_config = GenerationConfig(
            max_length=9, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
        )
        model.save_pretrained(tmp_path)
        AutoTokenizer.from_pretrained(byte_model).save_pretrained(tmp_path)
        own, limited = (
            prepare(tmp_path, rows(40), name="model_name_or_path", **o) for o in ({}, {"max_target_length": 5})
        )
        assert own.model.generation_config.max_length == 9
        assert limited.model.generation_config.max_length == 1 + 5


class TestMetrics:
    def test_of_generated_texts(self, byte_model: Path) -> None:
        compute = metrics_with(AutoTokenizer.from_pretrained(byte_model))
        predictions = np.array([[0, *ids("a b"), END, 0], [0, *ids("a c"), END, -100]])
        labels = np.array([[*ids("a b"), END, -100], [*ids("a b"), END, 0]])
        metrics = compute(EvalPrediction(predictions=predictions, label_ids=labels))
        assert metrics == {"exact_match": 0.5, "rouge_l": 0.75}

    def test_without_generation_they_are_of_the_logits(self, byte_model: Path) -> None:
        logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
        labels = torch.tensor([[1, 2, -100], [3, 1, 2]])
        sums = tokens_or_sums((logits, "encoder states"), labels)
        compute = metrics_with(AutoTokenizer.from_pretrained(byte_model))
        metrics = compute(EvalPrediction(predictions=sums.numpy(), label_ids=labels.numpy()))
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        assert metrics["mean_loss"] == pytest.approx(expected.item(), rel=1e-6)
        assert metrics["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-6)
        assert torch.equal(tokens_or_sums(labels, labels), labels)


def test_learns_and_generates(text_recipe: Callable[..., Path], tmp_path: Path) -> None:
    changes = {"max_steps": 30, "max_tokens_per_micro_batch": 64, "learning_rate": "2e-2", "logging_steps": 10}
    assert main([str(text_recipe(**changes))]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["eval_before_exact_match"] == 0
    assert results["eval_exact_match"] == 1
    assert results["mbp_padding_fraction"] < results["mbp_padding_fraction_unsplit"]
    tokens = sum(len(row["source"]) + 1 + len(row["target"]) + 1 for row in rows(40))
    assert results["mbp_tokens"] == 10 * tokens  # of both sides; 30 steps of 16, 16 and 8 rows are 10 epochs


def test_without_generation_the_loss_is_a_mean_over_tokens(text_recipe: Callable[..., Path], tmp_path: Path) -> None:
    results = []
    for batch in (3, 10):
        changes = {"predict_with_generate": False, "per_device_eval_batch_size": batch, "max_steps": 1}
        folder = tmp_path / str(batch)
        assert main([str(text_recipe(output_dir=str(folder), **changes))]) == 0
        results.append(json.loads((folder / "all_results.json").read_text()))
    for key in ("eval_loss", "eval_perplexity"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-6)


def test_the_trainer_is_the_one_that_generates(byte_model: Path) -> None:
    assert issubclass(prepare(byte_model, rows(2)).make_trainer, MBPSeq2SeqTrainer)


def test_plan_has_two_widths(text_recipe: Callable[..., Path]) -> None:
    words = ["--max_tokens_per_micro_batch", "40"]
    plan = plan_run(read_recipe([str(text_recipe(per_device_train_batch_size=20)), *words]), torch.device("cpu"))
    sizes = [(len(row["source"]) + 1, len(row["target"]) + 1) for row in rows(40)]
    assert sorted(plan.lengths.tolist()) == sorted(map(sum, sizes))
    assert max(group.cells for group in plan.groups()) <= 40
    by_length = {sum(size): size for size in sizes}
    for group in plan.groups():
        parts = [by_length[length] for length in group.lengths]
        assert group.widths == tuple(max(part) for part in zip(*parts, strict=True))
        assert group.cells == group.rows * sum(group.widths)


def test_check(text_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(text_recipe())]) == 0
    assert "\nexact: " in capsys.readouterr().out
