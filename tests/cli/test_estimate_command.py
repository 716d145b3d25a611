"""The command that estimates: the numbers of the functions, for a model and for a recipe, without weights."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig

from hf_mbp import estimate_max_tokens, estimate_memory
from hf_mbp.cli.estimate import main
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.shapes import row_sizes, set_up

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


def peak_of(out: str) -> str:
    return re.findall(r"^peak +(.+)$", out, flags=re.MULTILINE)[0]


def test_source_and_target_are_as_wide_as_they_are(
    recipe: Callable[..., Path], byte_model: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes and an end token: at most 25 + 1 of a source, 3 + 1 of a target."""
    rows = str(write_rows("rows.jsonl", [{"source": "a" * (i % 26), "target": "abc"} for i in range(27)]))
    task = {"task": "sequence_to_sequence", "model_name_or_path": None, "config_name": str(byte_model)}
    words = ["--device", "cpu", "--device_memory", "20MiB"]
    assert main([str(recipe(train_file=rows, validation_file=None, **task)), *words]) == 0
    out = capsys.readouterr().out
    assert "8 rows x 26 tokens of the source and 4 of the target" in out
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(byte_model), dtype=torch.float32)
    options = {"target_width": 4, "optimizer": "adamw_torch_fused", "device": "cpu"}
    assert peak_of(out) == peak_of(str(estimate_memory(model, 8, 26, **options)))
    rows, tokens = re.findall(r"([\d,]+) rows of 26 .* \(max_tokens_per_micro_batch: (\d+)\)", out)[0]
    assert int(rows) * (26 + 4) == int(tokens), "as the budget counts in training"
    peaks = [estimate_memory(model, int(rows) + more, 26, **options).peak_bytes for more in (0, 1)]
    assert peaks[0] <= 0.9 * 20 * 2**20 < peaks[1]


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}], ids=["reference", "precomputed"])
def test_preferences_are_pairs_with_a_reference(
    recipe: Callable[..., Path],
    chat_model: Path,
    write_rows: Any,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
) -> None:
    """As in a plan of the same recipe: 2 rows for each pair, and a second model."""
    rows = str(write_rows("pairs.jsonl", [{"q": "a", "yes": "good " * (1 + i), "no": "bad"} for i in range(9)]))
    task = {"task": "preference_tuning", "prompt_column": "q", "chosen_column": "yes", "rejected_column": "no"}
    files = {"model_name_or_path": str(chat_model), "train_file": rows, "validation_file": None}
    file = str(recipe(**task, **files, **options, bf16=False, gradient_checkpointing=False))
    assert main([file, "--device", "cpu", "--rows", "3", "--device_memory", "20MiB"]) == 0
    out = capsys.readouterr().out
    read = read_recipe([file])
    setup = set_up(read)
    width = int(row_sizes(read, setup).max())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(chat_model), dtype=torch.float32)
    alone = estimate_memory(model, 2 * 3, width // 2, optimizer="adamw_torch_fused", device="cpu")
    second = 0 if options else sum(parameter.nbytes for parameter in model.parameters())
    expected = replace(alone, parameter_bytes=alone.parameter_bytes + second)
    assert f"3 rows x {width} tokens" in out
    assert peak_of(out) == peak_of(str(expected))
    assert ("with the reference model" in out) is not bool(options)


def test_what_is_no_usual_model(
    recipe: Callable[..., Path], image_model: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Images are as large as they are, a row each; a model without a loss has one put around it."""
    images = str(write_rows("images.jsonl", [{"image": [[9 * i] * 8] * 8, "label": i % 2} for i in range(6)]))
    task = {"task": "image_classification", "model_name_or_path": None, "config_name": str(image_model)}
    file = str(recipe(train_file=images, validation_file=None, **task))
    assert main([file, "--device_memory", "1MiB"]) == 0
    assert "ViTForImageClassification" in capsys.readouterr().out
    assert main([file, "--width", "8"]) == 2
    assert "--width is of texts" in capsys.readouterr().err
    pairs = str(write_rows("texts.jsonl", [{"query": "a b", "passage": "b c d"} for _ in range(6)]))
    assert main([str(recipe(task="embedding", train_file=pairs, validation_file=None)), "--device_memory", "1MiB"]) == 0
    assert "BertModel, " in capsys.readouterr().out


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
