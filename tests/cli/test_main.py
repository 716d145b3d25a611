"""The console command: what it says without importing much, which command it runs, and its exit codes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hf_mbp
from hf_mbp.cli import main as main_module
from hf_mbp.cli.errors import UserError, run_reporting_errors
from hf_mbp.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)  # noqa: S603


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys; from hf_mbp.cli.main import COMMANDS, main;"
        "codes = [main(words) for words in (['--help'], *([name, '--help'] for name in COMMANDS))];"
        "print(sorted({'torch', 'transformers', 'datasets', 'yaml'} & set(sys.modules))); sys.exit(sum(codes))"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


def test_names_of_the_package_are_there_when_they_are_asked_for() -> None:
    assert sorted(name for names in hf_mbp._HOMES.values() for name in names) == sorted(hf_mbp.__all__)
    assert all(getattr(hf_mbp, name).__name__ == name for name in hf_mbp.__all__)
    assert set(hf_mbp.__all__) <= set(dir(hf_mbp))
    with pytest.raises(AttributeError, match="has no attribute 'MBPTrainner'"):
        hf_mbp.MBPTrainner  # noqa: B018


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: hf-mbp {name} ")
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "named", "not_named"),
    [
        ("train", ("task", "gguf_file", "validation_fraction", "memory_limit", "beta", "help_all"), ("weight_decay",)),
        ("plan", ("steps", "output", "device", "model_name_or_path", "memory_limit"), ("weight_decay",)),
        ("check", ("num_rows", "model_name_or_path", "train_file", "dtype"), ("weight_decay",)),
        ("estimate", ("rows", "width", "device_memory", "head", "bf16"), ("train_file",)),
        ("bench", ("steps", "train_file", "memory_limit"), ("weight_decay",)),
    ],
)
def test_help_names_the_options_of_ours(
    name: str, named: tuple[str, ...], not_named: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "recipe.yaml", "-h"]) == 0
    options = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert set(named) <= options
    assert not set(not_named) & options


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-mbp {hf_mbp.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "trian is not a command; write one of train, plan, check, estimate, bench; did you mean train?"),
        (["my.yaml"], "my.yaml is a recipe, and no command; write hf-mbp train my.yaml"),
        (["--steps"], "--steps is not a command; write one of train, plan, check, estimate, bench"),
    ],
)
def test_other_words_are_mistakes(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_nothing_to_do_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: hf-mbp COMMAND")


def test_the_command_gets_the_words_behind_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def import_module(name: str) -> Any:
        return SimpleNamespace(main=lambda argv: asked.append((name, argv)) or 7)

    monkeypatch.setattr(main_module, "import_module", import_module)
    assert main(["check", "my.yaml", "--num_rows", "4"]) == 7
    assert asked == [("hf_mbp.cli.check", ["my.yaml", "--num_rows", "4"])]


def test_the_module_is_the_command(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """As a launcher starts it, with the exit code for its caller."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-m", "hf_mbp.cli", "train", str(recipe(task="chess"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)  # noqa: S603
    assert done.returncode == 2
    assert done.stderr.startswith("error: task is 'chess'")


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise UserError("no  file\nx.csv")

    assert run_reporting_errors(lambda: None, []) == 0
    assert run_reporting_errors(lambda: 1, []) == 1

    def interruption() -> None:
        raise KeyboardInterrupt

    assert run_reporting_errors(mistake, []) == 2
    assert capsys.readouterr().err == "error: no file x.csv\n"
    assert run_reporting_errors(interruption, []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(
    ("local_rank", "expected"), [("0", "error: no file x.csv in process 8\n"), ("1", "")], ids=["speaks", "is quiet"]
)
def test_a_mistake_on_another_machine_is_told_once_there(
    local_rank: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may lack the file that the first machine has."""

    def mistake() -> None:
        raise UserError("no file x.csv")

    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert run_reporting_errors(mistake, []) == 2
    assert capsys.readouterr().err == expected


def test_a_failure_is_one_line_and_its_traceback_is_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("RANK", "1")  # whichever process fails says so

    def failure() -> None:
        raise RuntimeError("the device\nis gone")

    assert run_reporting_errors(failure, []) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the run failed in process 1: RuntimeError: the device is gone; the traceback is in ")
    (kept,) = tmp_path.glob("hf-mbp-*.log")
    assert str(kept) in line
    assert "in failure" in kept.read_text()


def test_a_long_word_does_not_hide_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    def mistake() -> None:
        raise UserError(f"recipe {'x' * 5000}: no such file")

    assert run_reporting_errors(mistake, []) == 2
    error = capsys.readouterr().err
    assert error.endswith("xxx...: no such file\n") or error.endswith("xxx... no such file\n")
    assert len(error) < 800


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have no notes")
def test_notes_of_a_failure_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In them stands which process began it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def failure() -> None:
        error = RuntimeError("connection closed")
        error.add_note("hf_mbp: rank 1 ended.")
        raise error

    assert run_reporting_errors(failure, []) == 1
    assert "RuntimeError: connection closed hf_mbp: rank 1 ended.; the traceback" in capsys.readouterr().err


def test_a_traceback_that_is_shown_is_not_kept(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_reporting_errors(lambda: 1 // 0, ["x.yaml", "--debug_traceback"]) == 1
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.splitlines()[-1].startswith("error: the run failed: ZeroDivisionError: ")
    assert not list(tmp_path.glob("hf-mbp-*"))
