"""Starts the processes of a distributed test, and brings back what each of them saved."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]

SECONDS = 420
"""Several times what a launch needs on a busy machine of two cores; ranks that wait for each other fail then."""


def run(worker: str, *arguments: Any, ranks: int = 2, **environment: str) -> tuple[int, str]:
    """Runs `tests.distributed.<worker>` and returns the launcher's exit code, and what was said; fails if all hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [environment.pop("PYTHONPATH", "")])])
    launched: Any = subprocess.Popen(  # noqa: S603
        [*command, "-m", f"tests.distributed.{worker}", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = launched.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        launched.terminate()  # which ends the ranks as well
        _, errors = launched.communicate()
        pytest.fail(f"the ranks hang: no end after {SECONDS} s.\n{errors[-4000:]}")
    return launched.returncode, errors


def launch(worker: str, folder: Path, *arguments: Any, ranks: int = 2, **environment: str) -> list[Any]:
    """Runs `tests.distributed.<worker>` and returns what each rank saved; fails if one fails."""
    code, errors = run(worker, folder, *arguments, ranks=ranks, **environment)
    assert code == 0, errors[-8000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]
