"""The plan of a recipe, on tiny models; what it counts is counted anew here."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_mbp.cli import plan as plan_module
from hf_mbp.cli.arguments import ModelShape
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.models import load_model
from hf_mbp.cli.plan import main
from hf_mbp.cli.plan_groups import Group
from hf_mbp.cli.plan_text import as_text
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import RunPlan, plan_run
from hf_mbp.cli.training_arguments import TrainArguments

CPU = torch.device("cpu")


@pytest.fixture
def plan(recipe: Callable[..., Path]) -> RunPlan:
    changes = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    words = ["--gradient_accumulation_steps", "2", "--max_tokens_per_micro_batch", "64"]
    return plan_run(read_recipe([str(recipe(**changes)), *words]), CPU)


def test_lengths_are_those_of_the_tokenized_rows(plan: RunPlan) -> None:
    expected = [2 + 1 + 1 + index % 20 for index in range(40)]  # [CLS] and [SEP], the label's word, the others
    assert plan.lengths.tolist() == expected


def test_steps_are_those_of_the_trainer(plan: RunPlan) -> None:
    """40 rows are 5 batches of 8, in 3 steps of at most 2, twice."""
    assert plan.num_steps == 6
    assert [sum(group.rows for group in step.split) for step in plan.steps] == [16, 16, 8]
    assert [len(step.plain) for step in plan.steps] == [2, 2, 1]
    rows = [length for group in plan.groups() for length in group.lengths]
    assert sorted(rows) == sorted(plan.lengths.tolist())
    for step in plan.steps:
        assert sorted(length for group in step.split for length in group.lengths) == sorted(
            length for group in step.plain for length in group.lengths
        )


def test_processes_share_the_batches(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """40 rows are 3 batches of 8 for each of two processes, in 2 steps of at most 2, twice."""
    monkeypatch.setattr(TrainArguments, "world_size", 2)
    changes = {"max_steps": None, "num_train_epochs": 2, "per_device_train_batch_size": 8}
    words = ["--gradient_accumulation_steps", "2", "--max_tokens_per_micro_batch", "64"]
    plan = plan_run(read_recipe([str(recipe(**changes)), *words]), CPU)
    assert plan.num_steps == 4


def test_the_budget_holds_and_padding_is_less(plan: RunPlan) -> None:
    assert max(group.cells for group in plan.groups()) <= 64 < max(group.cells for group in plan.groups(plain=True))
    for plain in (False, True):
        cells = sum(len(group.lengths) * max(group.lengths) for group in plan.groups(plain=plain))
        assert plan.padding(plain=plain) == pytest.approx(1 - plan.lengths.sum() / cells)
    assert plan.padding() < plan.padding(plain=True)


def test_modelled_speed_is_the_cost_of_the_planner(plan: RunPlan) -> None:
    def time(groups: list[Group]) -> float:
        cost = plan.cost
        return sum(cost.overhead + group.cells * (cost.cell + cost.attention * group.width) for group in groups)

    assert plan.speedup == pytest.approx(time(plan.groups(plain=True)) / time(plan.groups()))


def test_on_a_cpu_the_limit_counts_what_the_process_holds(
    recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training, where the limit is of all that the process holds: else a plan would fit that does not run."""
    monkeypatch.setattr("hf_mbp.device_memory.used_memory", lambda device: 10**9)
    with pytest.raises(UserError, match=r"memory_limit is 900\.0 MiB, but .* and libraries alone take 9"):
        plan_run(read_recipe([str(recipe()), "--memory_limit", "900MiB"]), CPU)


def test_memory_limit_makes_the_budget(recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_mbp.device_memory.used_memory", lambda device: 0)
    file = str(recipe(per_device_train_batch_size=40))
    wide = plan_run(read_recipe([file, "--memory_limit", "64MiB"]), CPU)
    resident = wide.memory.resident_bytes
    tight_limit = resident + 400_000
    tight = plan_run(read_recipe([file, "--memory_limit", f"{tight_limit / 2**20}MiB"]), CPU)
    assert len(tight.steps[0].split) > len(wide.steps[0].split)
    assert max(tight.memory.peak(group) for group in tight.groups()) <= tight_limit
    group, estimate = tight.largest
    assert estimate.peak_bytes <= tight_limit < tight.largest_plain[1].peak_bytes
    assert "does NOT fit" in as_text(tight, CPU)
    assert tight.memory.peak(group) == pytest.approx(resident + estimate.activation_bytes, rel=0.5)


def test_text_and_picture(recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = pytest.importorskip("matplotlib.image")
    file = str(recipe())
    assert main([file, "--device", "cuda", "--memory_limit", "8GiB", "--steps", "2", "--output", "two.png"]) == 0
    out = capsys.readouterr().out
    assert "tokens a row" in out
    assert "for cuda, 8.0 GiB" in out
    assert "optimizer steps      4; 3 of them are planned here" in out
    assert "drawn in two.png" in out
    assert main([file, "--output", "three.png"]) == 0
    two, three = (pixels.imread(tmp_path / name) for name in ("two.png", "three.png"))
    blue = np.array([0x00, 0x72, 0xB2]) / 255
    assert (np.abs(two[..., :3] - blue).max(axis=-1) < 0.01).mean() > 0.05
    assert two.shape != three.shape or (two != three).any()
    assert not (tmp_path / "run").exists()


def test_no_weights_are_read(recipe: Callable[..., Path], encoder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    arguments = read_recipe([str(recipe())]).model
    shape = ModelShape(model_name_or_path=str(encoder))
    model = load_model(AutoModelForSequenceClassification, shape, num_labels=3)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    loaded = load_model(AutoModelForSequenceClassification, arguments, num_labels=3)
    shapes = {name: (parameter.shape, parameter.dtype) for name, parameter in loaded.named_parameters()}
    assert {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()} == shapes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "none"], "--steps is 'none'; write a whole number from 1"),
        (["--device", "tpu"], "--device is 'tpu'; write cpu or cuda"),
        (["--output", "plan.txt"], "--output is 'plan.txt'; write a name that ends in .png"),
        (["--output", "nowhere/plan.png"], "nowhere/plan.png"),
        (["--memory_limit", "1kiB"], "weights, gradients, optimizer states and libraries alone take"),
        (["--memory_limits", "1GiB"], "did you mean memory_limit"),
        (["--device", "cuda"], "write the size of the one to plan for, such as --memory_limit 24GiB"),
    ],
)
def test_mistakes_are_told_in_one_line(
    recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(plan_module.torch.cuda, "is_available", lambda: False)
    assert main([str(recipe()), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
