"""Run by several processes, or one: trains with a loss that compares the rows of all; saves gradients, per rank."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

from tests.contrastive import Contrastive, bert, pair_rows
from tests.distributed.ending import leave
from tests.faults import MESSAGE
from tests.helpers import Recorder, mbp_trainer

ROWS_A_STEP = 12
"""Of each of two ranks, on average: they are dealt by their cost."""

NUM_ROWS, STEPS = 48, 2


class FailingFirst(Contrastive):
    """Runs out of memory in the third first pass on the second rank."""

    calls = 0

    def embed_rows(self, model: Any, inputs: Any) -> Any:
        """Fails once."""
        if self.args.process_index == 1 and not torch.is_grad_enabled():
            FailingFirst.calls += 1
            if FailingFirst.calls == 3:
                raise torch.OutOfMemoryError(MESSAGE)
        return super().embed_rows(model, inputs)


class FailingSecond(Contrastive):
    """The same in the third second pass."""

    calls = 0

    def embed_rows(self, model: Any, inputs: Any) -> Any:
        """Fails once."""
        if self.args.process_index == 1 and torch.is_grad_enabled():
            FailingSecond.calls += 1
            if FailingSecond.calls == 3:
                raise torch.OutOfMemoryError(MESSAGE)
        return super().embed_rows(model, inputs)


TRAINERS = {"plain": Contrastive, "first": FailingFirst, "second": FailingSecond}


def outcome(folder: Path, name: str) -> dict[str, Any]:
    """Gradients and losses of all steps, and how often memory ran out."""
    recorder = Recorder()
    trainer = mbp_trainer(
        bert(),
        pair_rows(NUM_ROWS),
        folder,
        trainer_class=TRAINERS[name],
        callbacks=[recorder],
        per_device_train_batch_size=2 * ROWS_A_STEP // int(os.environ.get("WORLD_SIZE", 1)),
        max_steps=STEPS,
        learning_rate=0.1,
        check_at_start=name == "plain",
    )
    trainer.train()
    return {
        "gradients": recorder.gradients,
        "losses": [log["loss"] for log in recorder.logs],
        "retries": sum(log["mbp_oom_retries"] for log in recorder.logs),
    }


def main(folder: Path) -> None:
    outcomes = {name: outcome(folder / "out", name) for name in TRAINERS}
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
