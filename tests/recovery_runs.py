"""Runs of a classifier that may run out of memory."""

from pathlib import Path
from typing import Any

from transformers import BertForSequenceClassification

from tests.faults import Faults
from tests.helpers import (
    Recorder,
    bert_config,
    build,
    mbp_trainer,
    token_rows,
    with_labels,
)

ROWS = with_labels(token_rows(16), lambda index, row: index % 3)


def classifier(*, dropout: float = 0.0, **changes: Any) -> Any:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return build(BertForSequenceClassification, bert_config(num_labels=3, **rates, **changes))


def trained(model: Any, folder: Path, faults: Faults | None = None, **changes: Any) -> Any:
    """The trainer after its steps; gradients and logs are in `trainer.recorder`."""
    recorder = Recorder()
    trainer = mbp_trainer(
        model,
        ROWS,
        folder,
        **{
            "check_at_start": False,
            "logging_steps": 1,
            "callbacks": [recorder, *changes.pop("callbacks", [])],
            **changes,
        },
    )
    trainer.recorder = recorder
    if faults is not None:
        faults.install(model)
    trainer.train()
    return trainer


def retries(trainer: Any) -> float:
    return sum(log["mbp_oom_retries"] for log in trainer.recorder.logs)
