"""Checkpoints are those of `Trainer`: which are kept, what is in them, and that a run goes on from them unharmed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from tests.contract.scenario import (
    Side,
    StopAt,
    assert_same_weights,
    assert_trained,
    class_rows,
    classifier,
    compared,
    files_below,
    weights,
    without_measurements,
)

EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
KEEPS_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss"}


def history(state: TrainerState) -> list[Any]:
    return [pytest.approx(without_measurements(entry), rel=1e-6) for entry in state.log_history]


def assert_same_state(folder: Path, expected: Path) -> None:
    """The states are alike but for clock times, saved operations and what micro-batching adds of its own."""
    ours, stock = (TrainerState.load_from_json(str(path / "trainer_state.json")) for path in (folder, expected))
    assert ours.stateful_callbacks.pop("hf_mbp")["options"]["max_tokens"] == 80
    assert [without_measurements(entry) for entry in ours.log_history] == history(stock)
    different = {"log_history", "total_flos", "best_model_checkpoint", "best_metric"}
    assert {name: value for name, value in vars(ours).items() if name not in different} == {
        name: value for name, value in vars(stock).items() if name not in different
    }
    assert ours.best_metric == pytest.approx(stock.best_metric)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[int, str, dict[str, torch.Tensor]]:
        trainer = side.trainer(eval_dataset=class_rows(12, seed=5), learning_rate=0.03, **EACH_STEP, **KEEPS_BEST)
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert_same_weights(weights(trainer), load_file(best / "model.safetensors"), within=0)
        return trainer.state.best_global_step, best.name, weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert ours[:2] == stock[:2]
    assert 0 < stock[0] < 6
    assert_same_weights(ours[2], stock[2])


@pytest.mark.parametrize("keeps_best", [False, True])
def test_rotation_leaves_the_same_folders_with_the_same_files(keeps_best: bool, tmp_path: Path) -> None:
    def scenario(side: Side) -> Path:
        trainer = side.trainer(
            eval_dataset=class_rows(12, seed=5),
            learning_rate=0.03,
            save_total_limit=2,
            **EACH_STEP,
            **(KEEPS_BEST if keeps_best else {}),
        )
        trainer.train()
        return side.folder

    stock, ours = compared(tmp_path, scenario)
    assert files_below(ours) == files_below(stock)
    left = sorted(path.name for path in ours.iterdir() if path.is_dir())
    assert left == sorted(path.name for path in stock.iterdir() if path.is_dir())
    assert len(left) == 2
    assert left[-1] == "checkpoint-6"
    assert (left[0] == "checkpoint-5") == (not keeps_best)
    for name in left:
        assert_same_state(ours / name, stock / name)


def nothing(model: Any) -> None:
    """Leaves the model as it is."""


def freeze(model: Any) -> None:
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)


def keep(model: Any, checkpoint: Path) -> None:
    """Leaves the checkpoint as it is."""


def shard(model: Any, checkpoint: Path) -> None:
    model.save_pretrained(checkpoint, max_shard_size="10KB")
    (checkpoint / "model.safetensors").unlink()
    assert (checkpoint / "model.safetensors.index.json").is_file()


@dataclass(kw_only=True)
class Resumption:
    """A run that is cut after a step and goes on, perhaps with other arguments."""

    step: int = 2
    arguments: dict[str, Any] = field(default_factory=dict)
    later: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = nothing
    change: Callable[[Any, Path], None] = keep
    repeats: bool = True


HALVES = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}

RESUMPTIONS = {
    "mid-epoch": Resumption(),
    "between epochs": Resumption(step=3),
    "accumulation": Resumption(arguments=HALVES, step=4),
    "frozen parameters": Resumption(prepare=freeze),
    "sharded checkpoint": Resumption(change=shard),
    "same rows in other batches": Resumption(later=HALVES),
    "another batch size": Resumption(later={"per_device_train_batch_size": 8}, repeats=False),
}


def run_on(case: Resumption, side: Side, **model_changes: Any) -> tuple[Any, Any, Any]:
    """The run that was never cut, the one that was, and the one that goes on from its checkpoint; all are trained."""

    def trainer(*, seed: int = 0, **changes: Any) -> Any:
        model = classifier(seed=seed, **model_changes)
        case.prepare(model)
        return side.trainer(model=model, lr_scheduler_type="linear", **{**case.arguments, **changes})

    whole = trainer()
    whole.metrics = whole.train().metrics
    cut = trainer(callbacks=[StopAt(case.step)])
    cut.metrics = cut.train().metrics
    checkpoint = side.folder / f"checkpoint-{case.step}"
    case.change(cut.model, checkpoint)
    resumed = trainer(seed=1, **case.later)
    resumed.metrics = resumed.train(resume_from_checkpoint=str(checkpoint)).metrics
    return whole, cut, resumed


@pytest.mark.parametrize("name", RESUMPTIONS)
def test_a_resumed_run_ends_where_it_would_have(name: str, tmp_path: Path) -> None:
    case = RESUMPTIONS[name]
    (_, _, stock), (whole, cut, ours) = compared(tmp_path, lambda side: run_on(case, side))
    assert cut.state.global_step == case.step < ours.state.global_step
    assert_trained(weights(ours))
    assert_same_weights(weights(ours), weights(stock))
    assert [without_measurements(entry) for entry in ours.state.log_history] == history(stock.state)
    if case.repeats:
        assert_same_weights(weights(ours), weights(whole), within=0)
        assert cut.metrics["mbp_tokens"] + ours.metrics["mbp_tokens"] == whole.metrics["mbp_tokens"]


@pytest.mark.parametrize("name", ["mid-epoch", "between epochs", "accumulation"])
def test_a_resumed_run_draws_the_same_dropout(name: str, tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        whole, _, resumed = run_on(RESUMPTIONS[name], side, hidden_dropout_prob=0.3)
        return weights(whole), weights(resumed)

    stock, ours = compared(tmp_path, scenario)
    assert_same_weights(stock[1], stock[0], within=0)
    assert_same_weights(ours[1], ours[0], within=0)


def test_resuming_logs_the_warnings_of_stock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def scenario(side: Side) -> list[str]:
        caplog.clear()
        run_on(RESUMPTIONS["mid-epoch"], side)
        return [record.getMessage() for record in caplog.records if record.levelname in ("WARNING", "ERROR")]

    stock, ours = compared(tmp_path, scenario)
    assert ours == stock


def test_a_resumed_run_keeps_the_batch_size_that_was_found(tmp_path: Path) -> None:
    """It runs out of nothing, and goes on as it was: there is nothing to warn of."""

    class RunsOutOfMemory(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.train_batch_size == 16:
                raise RuntimeError("CUDA out of memory.")

    def scenario(side: Side) -> tuple[int, dict[str, torch.Tensor]]:
        cut = side.trainer(auto_find_batch_size=True, callbacks=[RunsOutOfMemory(), StopAt(2)])
        if side.is_ours:
            with pytest.warns(UserWarning, match="starts again with 14 rows"):
                cut.train()
        else:
            cut.train()
        resumed = side.trainer(auto_find_batch_size=True)
        resumed.train(resume_from_checkpoint=str(side.folder / "checkpoint-2"))
        return resumed._train_batch_size, weights(resumed)

    stock, ours = compared(tmp_path, scenario)
    assert ours[0] == stock[0] == 14
    assert_same_weights(ours[1], stock[1])
