"""Run by several processes: the trajectories of all budgets and accumulations; saves them per rank."""

import os
import sys
from pathlib import Path

import torch

from tests.distributed.ending import leave
from tests.distributed.trajectories import CELLS, by_trainer


def main(folder: Path) -> None:
    processes = int(os.environ["WORLD_SIZE"])
    outcomes = {cell: by_trainer(folder / str(number), processes, *cell) for number, cell in enumerate(CELLS)}
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
