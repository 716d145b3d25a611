"""What happens when, as with `Trainer`: callbacks, stopping, searching, new models, optimizers with modes, signals."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from tests.contract.scenario import (
    Side,
    assert_same_weights,
    assert_trained,
    class_rows,
    classifier,
    compared,
    files_below,
    weights,
    without_measurements,
)


class Listener(TrainerCallback):
    """Notes every event with the step and the epoch at which it came, and which flags were set."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float | None, tuple[str, ...]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            flags = tuple(flag for flag, is_set in vars(control).items() if is_set)
            self.events.append((name, state.global_step, state.epoch, flags))

        return note


@pytest.mark.parametrize("accumulation", [1, 3])
def test_callbacks_hear_the_same_events_in_the_same_order(accumulation: int, tmp_path: Path) -> None:
    def scenario(side: Side) -> list[tuple[Any, ...]]:
        listener = Listener()
        trainer = side.trainer(
            callbacks=[listener],
            train_dataset=class_rows(44),
            eval_dataset=class_rows(4),
            per_device_train_batch_size=9,
            gradient_accumulation_steps=accumulation,
            eval_strategy="epoch",
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train()
        return listener.events

    stock, ours = compared(tmp_path, scenario)
    assert ours == stock
    names = [event[0] for event in stock]
    assert names.count("on_substep_end") == {1: 0, 3: 6}[accumulation]
    assert {"on_evaluate", "on_save", "on_prediction_step", "on_epoch_end"} <= set(names)


def test_the_handler_holds_the_same_callbacks(tmp_path: Path) -> None:
    def scenario(side: Side) -> list[list[type]]:
        trainer = side.trainer(callbacks=[EarlyStoppingCallback], disable_tqdm=False, report_to="tensorboard")
        before = [type(callback) for callback in trainer.callback_handler.callbacks]
        trainer.remove_callback(EarlyStoppingCallback)
        trainer.train()
        return [before, [type(callback) for callback in trainer.callback_handler.callbacks]]

    stock, ours = compared(tmp_path, scenario)
    assert ours == stock
    assert len(stock[0]) == len(stock[1]) + 1 >= 3


def test_early_stopping_stops_at_the_same_step(tmp_path: Path) -> None:
    def scenario(side: Side) -> Any:
        trainer = side.trainer(
            callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
            eval_dataset=class_rows(12, seed=5),
            learning_rate=0.05,
            num_train_epochs=8,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
        )
        trainer.train()
        return trainer

    stock, ours = compared(tmp_path, scenario)
    assert stock.state.global_step < stock.state.max_steps == 24
    assert ours.state.global_step == stock.state.global_step
    assert ours.state.best_global_step == stock.state.best_global_step
    assert ours.state.best_metric == pytest.approx(stock.state.best_metric)
    assert_same_weights(weights(ours), weights(stock))


def test_hyperparameter_search_returns_the_same_best_run(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[Any, list[tuple[dict[str, Any], float]]]:
        storage = optuna.storages.InMemoryStorage()
        trainer = side.trainer(
            model_init=lambda: classifier(), eval_dataset=class_rows(12), eval_strategy="epoch", num_train_epochs=1
        )
        best = trainer.hyperparameter_search(
            hp_space=lambda trial: {
                "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2),
                "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [12, 16]),
            },
            compute_objective=lambda metrics: metrics["eval_loss"],
            n_trials=2,
            backend="optuna",
            direction="minimize",
            sampler=optuna.samplers.RandomSampler(seed=1),
            study_name="search",
            storage=storage,
        )
        study = optuna.load_study(study_name="search", storage=storage)
        return best, [(trial.params, trial.value) for trial in study.trials]

    (stock, stock_trials), (ours, our_trials) = compared(tmp_path, scenario)
    assert len(our_trials) == len(stock_trials) == 2
    for (params, value), (expected_params, expected) in zip(our_trials, stock_trials, strict=True):
        assert params == expected_params
        assert value == pytest.approx(expected)
    assert (ours.run_id, ours.hyperparameters) == (stock.run_id, stock.hyperparameters)
    assert ours.objective == pytest.approx(min(value for _, value in stock_trials))


def test_every_training_starts_from_a_model_of_model_init(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[int, list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
        starts, ends, made = [], [], []

        class Starts(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
                starts.append({name: value.clone() for name, value in model.state_dict().items()})

        def model_init() -> Any:
            made.append(classifier())
            return made[-1]

        trainer = side.trainer(model_init=model_init, callbacks=[Starts()], num_train_epochs=1)
        for _ in range(2):
            trainer.train()
            assert trainer.model is made[-1]
            ends.append(weights(trainer))
        return len(made), starts, ends

    stock, ours = compared(tmp_path, scenario)
    assert ours[0] == stock[0] == 3
    for start in (*stock[1], *ours[1]):
        assert_same_weights(start, dict(classifier().state_dict()), within=0)
    for end in (*stock[2], *ours[2]):
        assert_trained(end)
        assert_same_weights(end, stock[2][0])


class ModalSGD(torch.optim.SGD):
    """An optimizer with modes, like the schedule-free ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mode = "none"

    def train(self) -> None:
        self.mode = "train"

    def eval(self) -> None:
        self.mode = "eval"


def test_optimizers_with_modes_are_in_the_right_one_at_every_forward_pass(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[list[str], list[str]]:
        model, during = classifier(), {True: [], False: []}
        optimizer = ModalSGD(model.parameters(), lr=0.01)
        trainer = side.trainer(
            model=model, optimizers=(optimizer, None), eval_dataset=class_rows(4), eval_strategy="steps", eval_steps=1
        )
        step = trainer.training_step

        def marked(*args: Any, **kwargs: Any) -> Any:
            optimizer.mode = "none"
            handle = model.register_forward_pre_hook(lambda *_: during[True].append(optimizer.mode))
            try:
                return step(*args, **kwargs)
            finally:
                handle.remove()

        predict = trainer.prediction_step

        def predicted(*args: Any, **kwargs: Any) -> Any:
            during[False].append(optimizer.mode)
            return predict(*args, **kwargs)

        trainer.training_step, trainer.prediction_step = marked, predicted
        trainer.train()
        return during[True], during[False]

    stock, ours = compared(tmp_path, scenario)
    assert set(stock[0]) == set(ours[0]) == {"train"}
    assert len(stock[0]) == 6 < len(ours[0])
    assert stock[1] == ours[1] == ["eval"] * 6


def test_schedule_free_optimizers_train_the_same_weights(tmp_path: Path) -> None:
    def scenario(side: Side) -> dict[str, torch.Tensor]:
        trainer = side.trainer(optim="schedule_free_adamw", eval_dataset=class_rows(4), eval_strategy="epoch")
        trainer.train()
        return weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert_trained(ours)
    assert_same_weights(ours, stock, within=1e-7)


class Terminate(TrainerCallback):
    """Sends the process SIGTERM at a substep and waits for what the handler starts."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.manager: Any = None

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.step:
            return
        assert signal.getsignal(signal.SIGTERM) == self.manager._sigterm_handler
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while not self.manager.is_checkpoint_requested and time.monotonic() < deadline:
            time.sleep(0.001)


def test_a_checkpoint_is_written_when_the_process_is_terminated(tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGTERM)

    def scenario(side: Side) -> tuple[set[str], list[Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "enable_jit_checkpoint": True}
        terminate = Terminate(step=2)
        trainer = side.trainer(callbacks=[terminate], **options)
        (jit,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, JITCheckpointCallback)]
        terminate.manager = jit.jit_manager
        jit.jit_manager.kill_wait = 0
        trainer.train()
        assert signal.getsignal(signal.SIGTERM) == handler
        written, stopped = files_below(side.folder), weights(trainer)
        history = [without_measurements(entry) for entry in trainer.state.log_history]

        resumed = side.trainer(**{**options, "enable_jit_checkpoint": False})
        (checkpoint,) = {path.split("/")[0] for path in written}
        resumed.train(resume_from_checkpoint=str(side.folder / checkpoint))
        return written, history, stopped, weights(resumed)

    try:
        stock, ours = compared(tmp_path, scenario)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert ours[0] == stock[0]
    assert any(name.endswith("trainer_state.json") for name in ours[0])
    assert [entry["step"] for entry in ours[1]] == [entry["step"] for entry in stock[1]]
    assert_same_weights(ours[2], stock[2])
    assert_same_weights(ours[3], stock[3])
