"""Under a real limit on allocations a batch that `Trainer` cannot hold trains, without a budget being named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import resource, sys
import psutil, torch
from transformers import BertForSequenceClassification, Trainer
from hf_mbp import MBPTrainer
from tests.helpers import Pad, arguments, bert_config, token_rows, with_labels

sizes = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256}
model = BertForSequenceClassification(bert_config(num_labels=2, **sizes))
rows = with_labels(token_rows(256, low=200, high=256), lambda index, row: index % 2)
args = arguments(sys.argv[2], per_device_train_batch_size=256)
trainer = {"stock": Trainer, "mbp": MBPTrainer}[sys.argv[1]](
    model=model, args=args, train_dataset=rows, data_collator=Pad()
)
limit = psutil.Process().memory_info().vms + 700 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
trainer.train()
print("trained on", trainer.state.global_step * 256, "rows")
"""


def run(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, kind, str(folder)]
    return subprocess.run(command, env=environment, timeout=250, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")
def test_what_does_not_fit_whole_trains_in_micro_batches(tmp_path: Path) -> None:
    stock = run("stock", tmp_path)
    assert "can't allocate memory" in stock.stderr, "the limit is too wide to prove anything"
    ours = run("mbp", tmp_path)
    assert "trained on 256 rows" in ours.stdout, ours.stderr[-2000:]
    assert "of activations" in ours.stdout
