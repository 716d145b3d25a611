"""The walk-throughs of docs/guides run as they are written; only what is on the Hub is a tiny one on the disk."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertModel, TrainingArguments, set_seed

from hf_mbp import InexactError, MBPConfig
from tests.cli.conftest import WORDS, word_tokenizer
from tests.documents import DOCS, ROOT, blocks

GUIDES = DOCS / "guides"
HUB_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
SECONDS = 240
"""Several times what a command needs."""

QUIET = {
    "use_cpu": True,
    "max_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
}
Names = dict[str, Any]


def one_block(page: str, language: str) -> str:
    (block,) = blocks(GUIDES / page, language)
    return block


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model without a head and its tokenizer, in the place of one of the Hub."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = word_tokenizer(pad_token="[PAD]", model_max_length=64)
    tokenizer.save_pretrained(folder)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **no_dropout)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def checkout(tmp_path: Path, tiny_model: Path) -> Path:
    """A folder that looks like a checkout of the repository with the files of "your own CSV"."""
    for name in ("scripts", "recipes", "hf_mbp"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "reviews.csv").write_text(one_block("own_csv.md", "csv"))
    recipe = one_block("own_csv.md", "yaml")
    assert HUB_MODEL in recipe
    (tmp_path / "reviews.yaml").write_text(recipe.replace(HUB_MODEL, str(tiny_model)))
    return tmp_path


@pytest.fixture
def in_checkout(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(checkout / "cache"))
    return checkout


def run_commands(page: str, folder: Path) -> str:
    """Runs the commands of a page in a shell, as they are written; what they print."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {
        **os.environ,
        **{"PATH": programs, "PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"},
        **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    }
    done = subprocess.run(  # noqa: S603
        ["/bin/bash", "-e", "-c", one_block(page, "bash")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def prepared(in_checkout: Path, tiny_model: Path) -> Names:
    """What the shorter pieces of code take for granted: a model, a tokenizer, rows, and arguments that are quiet."""
    tokenizer = word_tokenizer(pad_token="[PAD]", model_max_length=64)
    texts = [" ".join(WORDS[: 1 + index % 20]) for index in range(32)]
    rows = [{**tokenizer(text), "labels": index % 2} for index, text in enumerate(texts)]
    model = BertForSequenceClassification.from_pretrained(tiny_model)
    return {"model": model, "tokenizer": tokenizer, "rows": rows}


def execute(program: str, names: Names) -> None:
    """The program, whose training arguments are quiet ones of one step."""
    assert "from transformers import TrainingArguments\n" in program or "TrainingArguments" in names
    program = program.replace("from transformers import TrainingArguments\n", "")
    names.setdefault("TrainingArguments", partial(TrainingArguments, **QUIET))
    exec(program, names)  # noqa: S102


def test_replace_trainer(in_checkout: Path, tiny_model: Path) -> None:
    folder = in_checkout / "pairs"
    folder.mkdir()
    for split, count in (("train", 40), ("validation", 10)):
        texts = [" ".join(WORDS[: 1 + index % 20]) for index in range(count)]
        pairs = [{"sentence1": text, "sentence2": "good", "label": i % 2} for i, text in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    program = one_block("replace_trainer.md", "python")
    local = {
        '"distilbert/distilbert-base-uncased"': repr(str(tiny_model)),
        '"nyu-mll/glue", "mrpc"': repr(str(folder)),
        "AutoTokenizer, TrainingArguments": "AutoTokenizer",
    }
    for name, other in local.items():
        assert program.count(name) == 1
        program = program.replace(name, other)
    names: Names = {"TrainingArguments": partial(TrainingArguments, **QUIET)}
    execute(program, names)
    log = names["trainer"].state.log_history[0]
    told = re.findall(r"`(mbp_\w+)`", (GUIDES / "replace_trainer.md").read_text())
    assert len(told) == 3
    assert log.keys() >= set(told)


def test_own_csv(checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    told = run_commands("own_csv.md", checkout)
    for metric in ("eval_before_loss", "eval_before_accuracy", "train_loss", "eval_loss", "eval_accuracy"):
        assert f"{metric} " in told
    monkeypatch.chdir(checkout)
    exec(one_block("own_csv.md", "python"), {})  # noqa: S102
    assert re.search(r"'label': '(good|bad)'", capsys.readouterr().out)


def test_too_little_memory(prepared: Names, capsys: pytest.CaptureFixture[str]) -> None:
    train, estimate = blocks(GUIDES / "too_little_memory.md", "python")
    execute(train, prepared)
    assert prepared["trainer"].state.global_step == 1
    assert re.search(r"^\d+ tokens a micro-batch$", capsys.readouterr().out, flags=re.MULTILINE)
    execute(estimate, prepared)
    assert "activations" in capsys.readouterr().out
    size = r"[\d.]+ [KMGT]?i?B"
    refusal = size.join(map(re.escape, re.split(size, one_block("too_little_memory.md", "text").strip())))
    prepared["trainer"].mbp_config = MBPConfig(memory_limit="1MB")
    with pytest.raises(ValueError, match=refusal):
        prepared["trainer"].train()


def test_the_plan_of_too_little_memory(checkout: Path) -> None:
    assert "micro-batch" in run_commands("too_little_memory.md", checkout)


def test_two_processes(checkout: Path, tiny_model: Path) -> None:
    program = one_block("two_processes.md", "python")
    assert HUB_MODEL in program
    (checkout / "train.py").write_text(program.replace(HUB_MODEL, str(tiny_model)))
    told = run_commands("two_processes.md", checkout)
    one, two = map(float, re.findall(r"^train_loss (\S+)$", told, flags=re.MULTILINE))
    assert one == pytest.approx(two, rel=1e-5)


def test_refused_loss(prepared: Names, capsys: pytest.CaptureFixture[str]) -> None:
    refused, counted, two_means, one_mean = blocks(GUIDES / "refused_loss.md", "python")
    said, found = (block.strip() for block in blocks(GUIDES / "refused_loss.md", "text"))
    with pytest.raises(InexactError, match=re.escape(said)):
        execute(refused, prepared)
    execute(counted, prepared)
    assert prepared["trainer"].state.global_step == 1
    capsys.readouterr()
    execute(two_means, prepared)
    told = capsys.readouterr().out
    assert "exact                     no" in told
    assert found in told
    execute(one_mean, prepared)
    assert prepared["trainer"].state.global_step == 1
