"""The command that estimates: the numbers of the functions, for a model and for a recipe, without weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_mbp import estimate_max_tokens, estimate_memory
from hf_mbp.cli.estimate import main

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIG = LlamaConfig(vocab_size=500, max_position_embeddings=256, architectures=["LlamaForCausalLM"], **SIZES)


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A folder with a configuration and nothing else."""
    CONFIG.save_pretrained(tmp_path / "config")
    return str(tmp_path / "config")


def test_a_model(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [config, "--rows", "3", "--width", "100", "--bf16", "--optim", "sgd", "--device-memory", "1GiB,2GiB"]
    assert main(words) == 0
    out = capsys.readouterr().out
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    options = {"bf16": True, "optimizer": "sgd", "device": "cuda"}
    assert str(estimate_memory(model, 3, 100, **options)) in out
    assert "3 rows x 100 tokens, bf16 autocast, sgd, cuda" in out
    for size in ("1GiB", "2GiB"):
        tokens = estimate_max_tokens(model, 100, size, **options)
        assert f"{size}: at most {tokens:,} tokens a micro-batch, {tokens // 100:,} rows of 100 " in out
        assert f"(max_tokens_per_micro_batch: {tokens})" in out


def test_another_dtype_takes_less(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "parameters in bfloat16" in out
    assert "8 rows x 256 tokens" in out, "more than the model can read would be no estimate"


def test_a_recipe(recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model with its head, its longest row, its options."""
    assert main([str(recipe(optim="sgd")), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "BertForSequenceClassification" in out
    assert "8 rows x 23 tokens, no autocast, sgd, cpu" in out
    assert "optimizer states                     0 B" in out
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_too_small(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config, "--device_memory", "33MiB"]) == 0
    assert "33MiB: too small; a row of 256 tokens needs " in capsys.readouterr().out


def test_a_checkpoint_without_a_head(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(config, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["LlamaModel"]}))
    assert main([config]) == 2
    assert "is saved as LlamaModel, which has no head to train; write --head with one of" in capsys.readouterr().err
    assert main([config, "--head", "token_classification"]) == 0
    assert "LlamaForTokenClassification" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "none"], "--rows is 'none'; write a whole number from 1"),
        (["--width", "0"], "--width is '0'; write a whole number from 1"),
        (["--device", "tpu"], "--device is 'tpu'; write cpu or cuda"),
        (["--device_memory", "much"], "--device_memory has 'much'; write sizes such as 24GiB"),
        (["--device_memory", "0.5"], "--device_memory has '0.5'"),
        (["--head", "hydra"], "--head is 'hydra'; write one of causal_lm"),
        (["--config_name", "x"], "command line: write either model_name_or_path"),
        (["--head", "seq2seq_lm"], "command line: --head seq2seq_lm: model "),
        (["--learning_rate", "1"], "--learning_rate is an option of recipes; with a model, leave it out"),
        (["--optim", "lomo"], "optimizer='lomo' is not known"),
        (["--bf16", "--fp16"], "bf16=True and fp16=True exclude each other"),
    ],
)
def test_mistakes_are_told_in_one_line(
    config: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config, *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_nothing_to_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--rows", "3"]) == 2
    assert "name a model or a recipe" in capsys.readouterr().err


def test_a_recipe_has_its_own_head(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe()), "--head", "causal_lm"]) == 2
    assert "--head goes with a model" in capsys.readouterr().err
