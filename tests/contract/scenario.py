"""Runs one scenario with the stock trainer and with ours, so that a test can compare what came out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import BertForSequenceClassification, Seq2SeqTrainingArguments, Trainer, TrainerCallback

from hf_mbp import MBPConfig, MBPMixin, MBPTrainer
from tests.helpers import Pad, arguments, bert_config, build, token_rows, with_labels

Outcome = TypeVar("Outcome")

STOCK_AND_OURS = (Trainer, MBPTrainer)

OF_TRAINERS = {
    "model",
    "model_init",
    "train_dataset",
    "eval_dataset",
    "data_collator",
    "callbacks",
    "compute_metrics",
    "processing_class",
    "optimizers",
}

CLOCK = ("_runtime", "_per_second", "_preparation_time")


def classifier(*, seed: int = 0, **changes: Any) -> Any:
    """A model in float64 with which stock is right under accumulation, too, if its batches are of one size."""
    model = build(BertForSequenceClassification, bert_config(num_labels=3, **changes), seed=seed)
    model.accepts_loss_kwargs = False  # stock takes the `**kwargs` of its forward pass for a loss that divides by items
    return model


def class_rows(count: int = 48, *, seed: int = 0) -> list[dict[str, Any]]:
    return with_labels(token_rows(count, seed=seed), lambda index, row: index % 3)


class Side:
    """One of the two trainer classes, with a folder of its own."""

    def __init__(self, kind: type[Trainer], folder: Path) -> None:
        self.kind = kind
        self.folder = folder
        self.made: list[Any] = []

    @property
    def is_ours(self) -> bool:
        return issubclass(self.kind, MBPMixin)

    def trainer(self, *, generation: dict[str, Any] | None = None, **changes: Any) -> Any:
        """Three steps of 16 rows an epoch, two epochs, with Adam; ours has 80 tokens a micro-batch."""
        init = {name: changes.pop(name) for name in OF_TRAINERS & changes.keys()}
        if "model_init" not in init:
            init.setdefault("model", classifier())
        init = {"train_dataset": class_rows(), "data_collator": Pad(), **init}
        if self.is_ours:
            init["mbp_config"] = MBPConfig(max_tokens_per_micro_batch=80, on_inexact="error")
        args = arguments(self.folder, **{"max_steps": -1, "num_train_epochs": 2, "optim": "adamw_torch", **changes})
        if generation:
            args = Seq2SeqTrainingArguments(**{**args.to_dict(), **generation})
        trainer = self.kind(args=args, **init)
        self.made.append(trainer)
        return trainer


def compared(
    folder: Path, scenario: Callable[[Side], Outcome], *, kinds: tuple[type[Trainer], type[Trainer]] = STOCK_AND_OURS
) -> tuple[Outcome, Outcome]:
    """What the scenario returns with the stock class, and with ours; sees to it that ours really split its batches."""
    outcomes = []
    for kind in kinds:
        side = Side(kind, folder / kind.__name__)
        outcomes.append(scenario(side))
        if side.is_ours:
            assert all(was_split(trainer) for trainer in side.made if trainer.state.global_step)
    return outcomes[0], outcomes[1]


def was_split(trainer: Any) -> bool:
    """Whether every step that was logged ran in more micro-batches than the loader has batches a step."""
    logged = [entry["mbp_micro_batches"] for entry in trainer.state.log_history if "mbp_micro_batches" in entry]
    return bool(logged) and min(logged) > trainer.args.gradient_accumulation_steps


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same_weights(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, within: float = 1e-9
) -> None:
    torch.testing.assert_close(actual, expected, rtol=within, atol=within)


def assert_trained(actual: dict[str, torch.Tensor]) -> None:
    """The weights are no longer those of a new classifier."""
    new = classifier().state_dict()
    assert max(float((actual[name] - new[name]).abs().max()) for name in new) > 1e-3


def without_measurements(entry: dict[str, Any]) -> dict[str, Any]:
    """A log entry or metrics without clock times, what micro-batching adds, and the operations it saves."""
    return {
        name: value
        for name, value in entry.items()
        if not name.startswith("mbp_") and name != "total_flos" and not name.endswith(CLOCK)
    }


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


class StopAt(TrainerCallback):
    """Saves, and ends training, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
