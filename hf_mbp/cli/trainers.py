"""The trainers of the tasks: an evaluation loss that is a mean over the whole set, and a model card of their own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import EvalLoopOutput

from hf_mbp.cli.output import CARD, kept
from hf_mbp.trainer import MBPSeq2SeqTrainer, MBPTrainer

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

# Key under which compute_metrics returns the loss that is to be reported.
MEAN_LOSS = "mean_loss"


class WritesCard(_Base):
    """Writes the model card of this command and no other; put it before a trainer's class.

    TRL writes one into the output folder with each checkpoint, PEFT with each model that it saves, over whatever
    README.md is there.

    Attributes:
        write_card: writes it, at the end of training and before each upload; ``None`` until there is something to say.
    """

    write_card: Callable[[], None] | None = None

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the card of this command, which says more than the stock one."""
        if self.write_card is not None and self.is_world_process_zero():
            self.write_card()

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save the model, and leave the README.md of the output folder as it is."""
        with kept(Path(str(self.args.output_dir), CARD)) if self.args.should_save else nullcontext():
            super().save_model(*args, **kwargs)


class TaskTrainer(WritesCard):
    """Reports the evaluation loss that ``compute_metrics`` returns as ``mean_loss``; put it before a trainer's class.

    The stock loop averages the batches' means, each with the same weight: the last, smaller batch and, for language
    models, the batches of short rows weigh too much, and the number changes with the batch size. Where none is
    returned, as for texts that were generated, the stock loss stays.
    """

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Run the stock loop, then put the exact loss in the place of its own."""
        output = super().evaluation_loop(*args, **kwargs)
        metrics = output.metrics or {}
        for key in [key for key in metrics if key.endswith(f"_{MEAN_LOSS}")]:
            metrics[key.removesuffix(MEAN_LOSS) + "loss"] = metrics.pop(key)
        return output


class FinetuneTrainer(TaskTrainer, MBPTrainer):
    """`MBPTrainer`, for all tasks that need no other trainer."""


class FinetuneSeq2SeqTrainer(TaskTrainer, MBPSeq2SeqTrainer):
    """`MBPSeq2SeqTrainer`, which can generate texts in evaluation."""
