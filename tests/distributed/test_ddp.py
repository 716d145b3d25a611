"""Two processes under DistributedDataParallel give the gradient of plain PyTorch on both their rows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.helpers import (
    Pad,
    build,
    llama_config,
    masked_prefix,
    relative_error,
    token_rows,
    whole_gradients,
    with_labels,
)

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *arguments: Any) -> list[Any]:
    """What each of two ranks saved; fails if they hang."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(  # noqa: S603
        [*command, "-m", "tests.distributed.worker", str(folder), *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        timeout=200,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_and_loss_are_those_of_all_rows(accumulation: int, tmp_path: Path) -> None:
    ranks = launch(tmp_path, accumulation, 32)
    model, rows = build(LlamaForCausalLM, llama_config()), with_labels(token_rows(32), masked_prefix)
    whole_loss, expected = whole_gradients(model, lambda m: m(**Pad()(rows[:16])).loss)
    for rank in ranks:
        assert len(rank["gradients"]) == 2
        assert relative_error(expected, rank["gradients"][0]) < 3e-6
    log = ranks[0]["logs"][0]
    assert log["loss"] == pytest.approx(whole_loss, rel=1e-6)
    assert log["mbp_micro_batches"] >= 2
    assert log["mbp_tokens"] == sum(len(row["input_ids"]) for row in rows[:16])
