"""The benchmark of a recipe: what it counts is what there was, and what cannot run is said."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_mbp.cli.bench import Meter, Result, as_text, main, measure
from hf_mbp.cli.recipe import read_recipe

STOCK = Result(name="Trainer", step_seconds=(1.0, 3.0), tokens=400, cells=800, passes=2, peak_bytes=2**30)
OURS = Result(name="MBPTrainer", step_seconds=(1.0, 1.0), tokens=400, cells=500, passes=6, peak_bytes=2**29)


def test_both_train_the_same_tokens_and_ours_with_less_padding(recipe: Callable[..., Path]) -> None:
    """40 rows in batches of 10: the three steps that are counted have the last three batches of an epoch."""
    words = [str(recipe(per_device_train_batch_size=10, max_tokens_per_micro_batch=64))]
    stock, ours = (measure(read_recipe(words), name, steps=3) for name in ("Trainer", "MBPTrainer"))
    assert stock.tokens == ours.tokens > 0
    assert stock.passes == 3 < ours.passes
    assert ours.cells < stock.cells
    assert len(stock.step_seconds) == len(ours.step_seconds) == 3
    assert min(stock.peak_bytes, ours.peak_bytes) > 0


def test_passes_before_the_end_of_the_first_step_do_not_count() -> None:
    meter = Meter(device=torch.device("cpu"))
    model = torch.nn.Identity()
    model.forward = lambda **inputs: inputs  # type: ignore[method-assign]
    meter.watch(model)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    model(input_ids=torch.ones(2, 3), attention_mask=mask)
    meter.on_step_end()
    model(input_ids=torch.ones(2, 3), attention_mask=mask)
    model(pixel_values=torch.ones(4, 3, 8, 8))
    meter.on_step_end()
    result = meter.result("x")
    assert (result.tokens, result.cells, result.passes, len(result.step_seconds)) == (5 + 4, 6 + 4, 2, 1)


def test_memory_that_runs_out_is_a_result(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train", run_out)
    result = measure(read_recipe([str(recipe())]), "Trainer", steps=1)
    assert result.failure == "ran out of memory"
    assert "Trainer ran out of memory." in as_text([result, OURS], 2)


def test_the_table() -> None:
    lines = as_text([STOCK, OURS], 2).splitlines()
    table = {line[:26].strip(): line[26:].split() for line in lines if len(line) == 54}
    assert table["useful tokens a second"] == ["100", "200"]
    assert table["seconds a step (median)"] == ["2", "1"]
    assert table["padding"] == ["50.0", "%", "20.0", "%"]
    assert table["passes a step"] == ["1", "3"]
    assert table["peak memory"] == ["1.0", "GiB", "512.0", "MiB"]
    assert lines[-1] == "MBPTrainer does 2.00 x the useful work of Trainer in the same time."


def started(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str = "", **results: Result) -> list[list[str]]:
    """In the place of the processes: they write what `results` has, or nothing."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        name, _, file = command[command.index("--one") + 1].partition(":")
        if name in results:
            Path(file).write_text(json.dumps(vars(results[name])))
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_each_has_a_process_of_its_own(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = started(monkeypatch, 0, Trainer=STOCK, MBPTrainer=OURS)
    assert main([str(recipe()), "--steps", "2"]) == 0
    assert "2.00 x the useful work" in capsys.readouterr().out
    assert [command[command.index("--one") + 1].split(":")[0] for command in commands] == ["Trainer", "MBPTrainer"]
    assert all(command[1:5] == ["-m", "hf_mbp.cli.bench", str(recipe()), "--steps"] for command in commands)


def test_one_that_was_killed_is_a_result(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, -9, MBPTrainer=OURS)
    assert main([str(recipe())]) == 0
    out = capsys.readouterr().out
    assert "Trainer was killed, most likely for its memory." in out
    assert "useful work" not in out


def test_mistakes_of_a_process_are_told(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, 2, stderr="noise\nerror: no file none.csv\n")
    assert main([str(recipe())]) == 2
    assert capsys.readouterr().err == "error: Trainer: no file none.csv\n"
    assert main([str(recipe()), "--steps", "0"]) == 2
    assert "--steps is '0'; write a whole number from 1" in capsys.readouterr().err


def test_a_process_that_fails_is_a_failure(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started(monkeypatch, 1, stderr="Traceback ...\nerror: the run failed: ValueError: a defect\n")
    assert main([str(recipe())]) == 1
    assert capsys.readouterr().err == "error: Trainer: the run failed: ValueError: a defect\n"
    assert main([str(recipe()), "--debug_traceback"]) == 1
    assert "Traceback ..." in capsys.readouterr().err


def test_what_the_stock_trainer_has_no_loss_for(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(task="embedding"))]) == 2
    assert "the stock Trainer, which has no loss for task embedding" in capsys.readouterr().err


def test_the_process_writes_its_result(recipe: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    assert main([str(recipe()), "--steps", "1", "--one", f"Trainer:{file}"]) == 0
    result = Result(**json.loads(file.read_text()))
    assert result.name == "Trainer"
    assert result.tokens > 0
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))
