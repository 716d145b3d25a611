"""The trainers of the tasks: an evaluation loss that is a mean over the whole set, and a model card of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import EvalLoopOutput

from hf_mbp.trainer import MBPSeq2SeqTrainer, MBPTrainer

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object

# Key under which compute_metrics returns the loss that is to be reported.
MEAN_LOSS = "mean_loss"


class WritesCard(_Base):
    """Writes the model card of this command; put it before a trainer's class.

    Attributes:
        write_card: writes it, wherever Trainer would write its own: at the end, and before each upload.
    """

    write_card: Callable[[], None] | None = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card of this command, which says more than the stock one; until there is one, the stock one."""
        if self.write_card is None:
            super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card()


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
