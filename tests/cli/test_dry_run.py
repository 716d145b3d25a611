"""A dry run refuses what training would refuse, shows the plan, and neither reads weights nor writes anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_mbp.cli import dry_run as dry_run_module
from hf_mbp.cli.finetune import finetune, main, make_trainer, prepare
from hf_mbp.cli.recipe import dump_recipe, read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.trainers import FinetuneTrainer


def test_the_plan_is_shown_and_nothing_written(
    recipe: Callable[..., Path], tmp_path: Path, encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(recipe(max_tokens_per_micro_batch=64))
    before = {path.name for path in tmp_path.iterdir()}
    assert main([file, "--dry_run"]) == 0
    out = capsys.readouterr().out
    steps = plan_run(read_recipe([file]), torch.device("cpu")).steps
    assert f"first step           16 rows in {len(steps[0].split)} micro-batches" in out
    assert "model                BertForSequenceClassification, " in out
    assert "parameters in float32" in out
    assert f"dry run: nothing was trained, and nothing written into {tmp_path / 'run'}" in out
    assert {path.name for path in tmp_path.iterdir()} - before <= {"cache"}


def test_weights_are_not_read_and_not_trained(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FinetuneTrainer] = []

    def make(*args: Any) -> FinetuneTrainer:
        made.append(make_trainer(*args))
        return made[0]

    dry_run_module.rehearse(read_recipe([str(recipe())]), prepare, make)
    assert {parameter.device.type for parameter in made[0].model.parameters()} == {"meta"}
    assert made[0].state.global_step == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_column": "body"}, "has no column 'body'"),
        ({"eval_strategy": "steps", "validation_file": None}, "the trainer refuses: "),
        ({"memory_limit": "1KiB"}, "weights, gradients, optimizer states and libraries alone take"),
        ({"resume_from_checkpoint": True}, "has no whole checkpoint-* folder"),
    ],
)
def test_mistakes_are_found(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main([str(recipe(**changes)), "--dry_run"]) == 2
    assert message in capsys.readouterr().err


def test_an_earlier_run_is_found(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    assert main([str(recipe()), "--dry_run"]) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert main([str(recipe()), "--dry_run", "--overwrite_output_dir"]) == 0
    assert (tmp_path / "run" / "checkpoint-3").exists()


def test_it_is_about_one_start_and_changes_no_later_one(recipe: Callable[..., Path], tmp_path: Path) -> None:
    read = read_recipe([str(recipe(max_steps=1, push_to_hub=False)), "--dry_run"])
    assert "dry_run" not in dump_recipe(read)
    finetune(read)
    assert read.train.output_dir == str(tmp_path / "run")
    assert main([str(recipe(max_steps=1))]) == 0
