"""Run by several processes: trains a tiny model, where one rank fails in its second step, in a chosen way."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

from hf_mbp import MBPTrainer
from tests.distributed.ending import leave
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels

SLOW_SECONDS = 7


def exception() -> None:
    raise LookupError("the cause")


def memory() -> None:
    torch.empty(2**50, dtype=torch.uint8)


def starved() -> None:
    """In every pass, so that no plan helps."""
    memory()


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stopped() -> None:
    """What a host that is gone looks like to the others: no answer, and connections that stay open."""
    os.kill(os.getpid(), signal.SIGSTOP)


def asleep() -> None:
    time.sleep(SLOW_SECONDS)


def busy() -> None:
    """In Python, with its lock, as long tokenisation would be."""
    end = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < end:
        pass


def leaves() -> None:
    """All ranks leave on purpose, the first one when it has saved."""
    if os.environ["RANK"] == "0":
        time.sleep(SLOW_SECONDS)
    sys.exit(0)


WAYS: dict[str, Callable[[], None]] = {
    way.__name__: way for way in (exception, memory, starved, killed, stopped, asleep, busy, leaves)
} | {"stays": exception, "stays in an evaluation": exception}


class Failing(MBPTrainer):
    """Fails on one rank: once in a pass, in which want of memory would be survived, or before it; or always."""

    way = staticmethod(exception)
    failing_rank = 0
    is_due = True

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.way is memory:
            self.fail()
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.fail()
        return super().compute_loss(*args, **kwargs)

    def fail(self) -> None:
        is_meant = self.way is leaves or self.args.process_index == self.failing_rank
        if self.is_due and self.state.global_step == 1 and is_meant:
            self.is_due = self.way is starved
            self.way()


def train(folder: Path, way: str, failing_rank: int, rank_timeout: float) -> None:
    """Ends by what the chosen way does to `train()` or `evaluate()`; where it `stays` the failing process lives on."""
    trainer = mbp_trainer(
        build(BertForSequenceClassification, bert_config()),
        with_labels(token_rows(64), lambda index, row: index % 2),
        folder,
        per_device_train_batch_size=8,
        max_steps=3,
        check_at_start=False,
        rank_timeout=rank_timeout,
        trainer_class=Failing,
    )
    trainer.way, trainer.failing_rank = WAYS[way], failing_rank
    try:
        if way == "stays in an evaluation":
            trainer.state.global_step = 1
            trainer.evaluate(trainer.train_dataset)
        trainer.train()
    except LookupError:
        if "stays" not in way:
            raise
        (folder / "stays").touch()
        time.sleep(1000)
    except SystemExit as leaving:
        os._exit(int(leaving.code or 0))  # without gloo's destructors; see `leave`
    assert trainer.state.global_step == 3
    leave()


def train_as_rank(rank: int, num_ranks: int, port: int, folder: Path, way: str, failing: int, seconds: float) -> None:
    """In a process that was started by itself, without a launcher; what it prints goes to a file."""
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
    train(folder, way, failing, seconds)


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
