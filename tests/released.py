"""The checkpoint that a version leaves for the tests of all later ones: of a tiny run, in which memory ran out once.

    python -m tests.released

writes `tests/data/checkpoint-VERSION`, about 35 KiB, with what a run keeps of its budget and of the cost of its plans.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification, set_seed

from hf_mbp import MBPTrainer, __version__
from tests.faults import Faults
from tests.helpers import bert_config, mbp_trainer, token_rows, with_labels

DATA = Path(__file__).parent / "data"

STEPS, SAVED_AFTER = 14, 12
"""The cost is measured in the first ten steps, and kept after them."""
FAILS_IN = 5
"""A pass of the first step, so that the budget is not the one that was asked for."""
ROWS_A_STEP = 8
LEARNING_RATE = 0.1
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 32}


def model() -> Any:
    set_seed(0)
    return BertForSequenceClassification(bert_config(**SIZES))


def rows() -> list[dict[str, Any]]:
    """Of one epoch."""
    return with_labels(token_rows(STEPS * ROWS_A_STEP), lambda index, row: index % 2)


def trainer(folder: Path, **changes: Any) -> MBPTrainer:
    options = {
        "per_device_train_batch_size": ROWS_A_STEP,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential",
        "calibrate": True,
        "on_inexact": "error",
    }
    return mbp_trainer(model(), rows(), folder, **{**options, **changes})


def write(folder: Path) -> Path:
    """Trains, and returns the checkpoint."""
    made = trainer(folder, save_strategy="steps", save_steps=SAVED_AFTER)
    Faults(made.model.bert.encoder.layer[0], "forward", {FAILS_IN}).install(made.model)
    made.train()
    checkpoint = folder / f"checkpoint-{SAVED_AFTER}"
    (checkpoint / "training_args.bin").unlink()  # Trainer reads it nowhere
    return checkpoint


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        shutil.copytree(write(Path(folder)), DATA / f"checkpoint-{__version__}")


if __name__ == "__main__":
    main()
