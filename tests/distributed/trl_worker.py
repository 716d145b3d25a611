"""Run by several processes: TRL's trainers on ranks with very uneven rows; saves their outcomes, per rank."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from datasets import Dataset

from tests.distributed.ending import leave
from tests.trl_runs import CASES, dataset, outcome_of, trainer_of

NAMES = ("sft-completion", "sft-padding-free", "reward-margin", "dpo-sigmoid", "dpo-sft")

LONG, SHORT = (9, 16, 14), (1, 2, 1)


def rows_of(name: str) -> Dataset:
    """27 rows for two steps of 8 rows a rank: rank 0 has long ones, rank 1 short ones, and only 3 in the second step.

    No two sizes are alike, so that a mean over pairs, tokens or micro-batches is each another number.
    """
    sizes = [LONG] * 8 + [SHORT] * 8 + [LONG] * 8 + [SHORT] * 3
    uneven = [(a + index % 2, b + index % 3, c + index % 2) for index, (a, b, c) in enumerate(sizes)]
    return dataset(CASES[name].rows, uneven)


def main(folder: Path) -> None:
    outcomes = {}
    for name in NAMES:
        trainer = trainer_of(
            CASES[name],
            rows_of(name),
            folder,
            split=True,
            per_device_train_batch_size=8,
            train_sampling_strategy="sequential",
            accelerator_config={"even_batches": False},
        )
        outcomes[name] = asdict(outcome_of(trainer))
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
