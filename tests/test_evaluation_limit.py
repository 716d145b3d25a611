"""Under a real limit on allocations a batch that `Trainer` cannot predict is predicted, with no budget named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import resource, sys
import psutil, torch
from transformers import GPT2LMHeadModel, Trainer
from hf_mbp import MBPTrainer
from tests.helpers import Pad, arguments, gpt2_config, token_rows, with_labels

model = GPT2LMHeadModel(gpt2_config(n_embd=64, n_positions=256, vocab_size=8192))
rows = with_labels(token_rows(256, low=20, high=128), lambda index, row: row["input_ids"])
args = arguments(sys.argv[2], per_device_eval_batch_size=256)
trainer = {"stock": Trainer, "mbp": MBPTrainer}[sys.argv[1]](
    model=model,
    args=args,
    data_collator=Pad(),
    compute_metrics=lambda p: {"accuracy": float((p.predictions[:, :-1] == p.label_ids[:, 1:]).mean())},
    preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
)
limit = psutil.Process().memory_info().vms + 900 * 2**20  # the logits of the batch alone take 1 GiB
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print("predicted", trainer.predict(rows).predictions.shape, trainer.evaluate(rows)["eval_loss"])
"""


def run(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROGRAM, kind, str(folder)]
    return subprocess.run(command, env=environment, timeout=250, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")
def test_what_does_not_fit_whole_is_predicted_in_micro_batches(tmp_path: Path) -> None:
    stock = run("stock", tmp_path)
    assert "can't allocate memory" in stock.stderr, "the limit is too wide to prove anything"
    ours = run("mbp", tmp_path)
    assert "predicted (256, 128)" in ours.stdout, ours.stderr[-2000:]
