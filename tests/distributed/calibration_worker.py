"""Run by several processes that take unlike times for micro-batches of one shape; saves costs and plans."""

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from hf_mbp import run_cost
from hf_mbp.plan import Cost
from tests.distributed.ending import leave
from tests.test_run_cost import MODELLED, trainer_for

CLOCKS = (Cost(overhead=60), Cost(overhead=90))
"""So that each rank by itself would find other constants."""

STEPS = 14


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    run_cost.cost_of = lambda model, device: MODELLED
    trainer = trainer_for(folder, CLOCKS[rank], max_steps=STEPS, per_device_train_batch_size=12)
    metrics = trainer.train().metrics
    saved = {
        "cost": asdict(trainer.mbp_feed.cost.of_step()),
        "error": metrics["mbp_calibration_error"],
        "measured": len(trainer.mbp_feed.cost.stopwatch.all),
        "kept": trainer.state.stateful_callbacks["hf_mbp_cost"]["calibration"],
        "shapes": trainer.shapes,
        "weights": [parameter.detach().clone() for parameter in trainer.model.parameters()],
    }
    torch.save(saved, folder / f"rank{rank}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
