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
from hf_mbp import MBPConfig, MBPTrainer, run_cost
from hf_mbp.plan import Cost
from tests.helpers import Pad, arguments, bert_config, token_rows, with_labels

run_cost.cost_of = lambda *_: Cost(overhead=1e9)  # as few micro-batches as fit
sizes = {"hidden_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 256}
model = BertForSequenceClassification(bert_config(num_labels=2, **sizes))
kind = sys.argv[1]
shortest = 256 if kind == "too large" else 200  # rows of one length run as one micro-batch, if they may
rows = with_labels(token_rows(256, low=shortest, high=256), lambda index, row: index % 2)
args = arguments(sys.argv[2], per_device_train_batch_size=256)
options = {} if kind != "too large" else {"mbp_config": MBPConfig(max_tokens_per_micro_batch=10**6)}
trainer = (Trainer if kind == "stock" else MBPTrainer)(
    model=model, args=args, train_dataset=rows, data_collator=Pad(), **options
)
limit = psutil.Process().memory_info().vms + 700 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
trainer.train()
print("trained on", trainer.state.global_step * 256, "rows")
print("retries:", sum(log.get("mbp_oom_retries", 0) for log in trainer.state.log_history if "loss" in log))
"""


FILLED = """
import sys
import torch
from transformers import BertForSequenceClassification, TrainerCallback
from hf_mbp import device_memory, MBPConfig, MBPTrainer, run_budget, run_cost
from hf_mbp.plan import Cost
from tests.helpers import Pad, arguments, bert_config, token_rows, with_labels

MIB, cpu = 2**20, torch.device("cpu")
run_cost.cost_of = run_budget.cost_of = lambda *_: Cost(overhead=1e9)  # as few micro-batches as fit
torch.set_num_threads(1)

class Looks(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        peaks.append(trainer.mbp_feed.budget.gauge.peak_bytes())
        trainer.mbp_feed.budget.after_step()

peaks = []
sizes = {"hidden_size": 128, "num_hidden_layers": 3, "max_position_embeddings": 256, "intermediate_size": 512}
model = BertForSequenceClassification(bert_config(num_labels=2, **sizes))
rows = with_labels(token_rows(1024, low=32, high=256), lambda index, row: index % 2)
trainer = MBPTrainer(
    model=model,
    args=arguments(sys.argv[2], per_device_train_batch_size=96, max_steps=3, optim="adamw_torch"),
    train_dataset=rows,
    data_collator=Pad(),
    mbp_config=MBPConfig(memory_limit=device_memory.used_memory(cpu) + 300 * MIB),
    callbacks=[Looks()],
)
trainer.train()
room = trainer.mbp_feed.budget._profile.room
print("shares", *(peak / room.allowed_bytes for peak in peaks), device_memory.peak_memory(cpu) / room.allowed_bytes)
print("of the room", *((peak - room.resting_bytes) / room.activation_bytes for peak in peaks))
"""


def run(kind: str, folder: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program, kind, str(folder)]
    return subprocess.run(command, env=environment, timeout=250, capture_output=True, text=True, check=False)  # noqa: S603


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")
def test_what_does_not_fit_whole_trains_in_micro_batches(tmp_path: Path) -> None:
    stock = run("stock", tmp_path)
    assert "can't allocate memory" in stock.stderr, "the limit is too wide to prove anything"
    ours = run("mbp", tmp_path)
    assert "trained on 256 rows" in ours.stdout, ours.stderr[-2000:]
    assert "of activations" in ours.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is enforced on Linux only")
def test_a_budget_that_does_not_fit_is_lowered_until_it_does(tmp_path: Path) -> None:
    """The allocator itself fails here, in the middle of a step."""
    ours = run("too large", tmp_path)
    assert "trained on 256 rows" in ours.stdout, ours.stderr[-2000:]
    assert "no memory for a micro-batch of 256 x 256 tokens (DefaultCPUAllocator" in ours.stdout
    assert "can't allocate memory" in ours.stdout
    assert "retries: 0" not in ours.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a step is read from /proc")
def test_a_full_budget_fills_the_limit_and_never_exceeds_it(tmp_path: Path) -> None:
    done = run("mbp", tmp_path, FILLED)
    assert "shares" in done.stdout, done.stderr[-3000:]
    lines = {
        line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("shares", "of the"))
    }
    shares = [float(share) for share in lines["shares"][1:]]
    rooms = [float(share) for share in lines["of"][3:]]
    assert all(0.85 <= share <= 1 for share in shares), done.stdout
    assert all(share > 0.5 for share in rooms), done.stdout
