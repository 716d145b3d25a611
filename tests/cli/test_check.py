"""The checking script from end to end, on tiny models: verdict, exit code, and nothing written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_mbp.cli.check import main
from hf_mbp.cli.trainers import FinetuneTrainer

ROOT = Path(__file__).parents[2]


def test_an_exact_recipe(recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.iterdir())
    assert main([str(recipe()), "--num_rows", "6"]) == 0
    out = capsys.readouterr().out
    assert "\nexact: micro-batches give the gradient of the whole batch\n" in out
    assert "  rows                    6, as one batch and as 3 micro-batches\n" in out
    assert "(up to 0.001 is rounding)" in out
    assert not (tmp_path / "run").exists()
    assert {path.name for path in tmp_path.iterdir()} - {path.name for path in before} <= {"recipe.yaml", "cache"}


def test_nothing_is_made_on_the_hub(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda *_, **__: made.append("a repository"))
    assert main([str(recipe(push_to_hub=True))]) == 0
    assert made == []


def test_language_modeling_in_half_precision(
    recipe: Callable[..., Path], tmp_path: Path, chat_model: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("qa.jsonl", [{"q": "a " * (1 + i % 7), "a": "b " * (1 + i % 5)} for i in range(24)])
    changes = {
        "task": "language_modeling",
        "model_name_or_path": str(chat_model),
        "train_file": str(rows),
        "validation_file": None,
        "prompt_column": "q",
        "answer_column": "a",
    }
    assert main([str(recipe(**changes)), "--dtype=bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "\nexact: " in out
    assert "half precision" not in out


def test_what_is_not_exact_is_explained(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class_weights = torch.tensor([0.2, 5.0])

    def weighted(self: Any, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=class_weights)
        return (loss, outputs) if return_outputs else loss

    assert FinetuneTrainer.compute_loss is Trainer.compute_loss
    monkeypatch.setattr(FinetuneTrainer, "compute_loss", weighted)
    assert main([str(recipe())]) == 1
    out = capsys.readouterr().out
    assert "\nNOT exact: micro-batches give another gradient" in out
    assert "\n- The loss is a mean over other items than num_items(micro_batch) counts" in out
    assert max(map(len, out.split("NOT exact")[1].splitlines())) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num_rows", "1"], "--num_rows is '1'; write a whole number from 2"),
        (["--num_rows", "many"], "--num_rows is 'many'"),
        (["--num_rows"], "command line: "),
        (["--num_row", "4"], "--num_row is not an option"),
        (["--text_column", "body"], "has no column 'body'"),
        (["--max_train_samples", "1", "--label_column", "text"], "nothing to tell apart"),
        (["--task", "chess"], "task is 'chess'"),
    ],
)
def test_mistakes_are_told_in_one_line(
    options: list[str], message: str, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe()), *options]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_nothing_to_compare_is_a_mistake(
    recipe: Callable[..., Path], tmp_path: Path, chat_model: Path, write_rows: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows("one.jsonl", [{"q": "a", "a": "b"}])
    changes = {"task": "language_modeling", "model_name_or_path": str(chat_model), "train_file": str(rows)}
    columns = {"prompt_column": "q", "answer_column": "a", "validation_file": None}
    assert main([str(recipe(**changes, **columns))]) == 2
    assert "error: the check refuses: a split needs 2 rows" in capsys.readouterr().err


def test_the_script_returns_the_exit_code(recipe: Callable[..., Path], tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "scripts" / "check.py"), str(recipe()), "--num_rows", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 2
    assert done.stderr.startswith("error: command line: --num_rows is '0'")
