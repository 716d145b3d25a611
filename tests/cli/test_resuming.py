"""Going on from a checkpoint that is broken: the file is named, and nothing else is taken for it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_mbp.cli.finetune import main
from hf_mbp.cli.resuming import broken_file


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run is kept that was made once."""
    return tmp_path_factory.mktemp("first") / "run"


@pytest.fixture
def checkpoint(recipe: Callable[..., Path], tmp_path: Path, first_run: Path) -> Path:
    """Of one step."""
    if not first_run.exists():
        assert main([str(recipe(max_steps=1, save_strategy="steps", save_steps=1, validation_file=None))]) == 0
        (tmp_path / "run").rename(first_run)
    shutil.copytree(first_run, tmp_path / "run")
    return tmp_path / "run" / "checkpoint-1"


@pytest.fixture
def go_on(recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Goes on from the last checkpoint; returns the exit code and the line that told an error."""

    def go_on(**changes: Any) -> tuple[int, str]:
        file = recipe(max_steps=2, validation_file=None, **changes)
        code = main([str(file), "--resume_from_checkpoint", "last"])
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return code, "".join(lines)

    return go_on


def cut_off(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_a_right_one(checkpoint: Path, go_on: Callable[..., tuple[int, str]]) -> None:
    assert broken_file(checkpoint) is None
    assert go_on() == (0, "")


def test_it_may_go_on_in_another_folder_but_not_over_another_run(
    checkpoint: Path, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint.parent / "eval_before_results.json").write_text('{"eval_before_loss": 0.25}')
    other = tmp_path / "other"
    (other / "checkpoint-99").mkdir(parents=True)
    (other / "eval_before_results.json").write_text('{"eval_before_loss": 0.75}')
    file = str(recipe(max_steps=2, validation_file=None, output_dir=str(other)))
    argv = [file, "--resume_from_checkpoint", str(checkpoint)]
    assert main(argv) == 2
    assert f"{other} holds an earlier run" in capsys.readouterr().err
    assert main([*argv, "--overwrite_output_dir"]) == 0
    assert not (other / "checkpoint-99").exists()
    assert checkpoint.is_dir()
    assert json.loads((other / "all_results.json").read_text())["eval_before_loss"] == 0.25


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_file_that_was_cut_off_is_named(name: str, checkpoint: Path, go_on: Callable[..., tuple[int, str]]) -> None:
    cut_off(checkpoint / name)
    code, line = go_on()
    assert code == 2
    told = f"error: training cannot go on from {checkpoint} (resume_from_checkpoint): {name} cannot be read: "
    assert line.startswith(told)
    assert line.endswith("name an earlier checkpoint, or leave the option out to start anew")


def test_a_damaged_byte(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.pt"
    content = bytearray(file.read_bytes())
    content[content.index(b"PK", 100) - 8] ^= 1  # in the first file of the archive
    file.write_bytes(content)
    assert str(broken_file(checkpoint)).startswith("optimizer.pt cannot be read: ")


def test_what_can_be_read_and_holds_something_else(checkpoint: Path, go_on: Callable[..., tuple[int, str]]) -> None:
    (checkpoint / "trainer_state.json").write_text('{"steps": 7}')
    code, line = go_on()
    assert code == 2
    assert f"cannot go on from {checkpoint} (resume_from_checkpoint): TypeError: " in line


def test_other_mistakes_are_not_taken_for_the_checkpoint(
    checkpoint: Path, go_on: Callable[..., tuple[int, str]]
) -> None:
    code, line = go_on(memory_limit="1KiB")
    assert code == 2
    assert line.startswith("error: training cannot start: memory_limit")


def test_what_fails_later_is_no_mistake(
    checkpoint: Path,
    go_on: Callable[..., tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("hf_mbp.trainer.MBPMixin.training_step", fail)
    code, line = go_on()
    assert code == 1
    assert line.startswith("error: the run failed: ValueError: a defect; the traceback is in ")
