"""The trainers of TRL with micro-batches; what they report of an evaluation is of the whole set. Needs TRL."""

from __future__ import annotations

import math
from typing import Any

import torch
import trl
from transformers.trainer_utils import EvalLoopOutput

from hf_mbp.call_metrics import CallMetrics
from hf_mbp.cli.arguments import ModelArguments
from hf_mbp.cli.trainers import WritesCard
from hf_mbp.cli.training_arguments import require_extra
from hf_mbp.compat import TokenizedRows
from hf_mbp.step import MicroBatch
from hf_mbp.trainer import MBPMixin


class WholeEvaluation(MBPMixin):
    """Puts the loss and the metrics of the evaluation batches together, by what each is a mean over.

    TRL takes the mean of the batches' means, each with the same weight, and names them ``eval_`` also where the
    evaluation has another name. On several processes the rows that fill up the last batches count once more, as in TRL.
    """

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run the stock loop, then put the exact numbers in the place of its own."""
        self._whole = CallMetrics(self, self._ranks, mode="eval")
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        self._whole.merge()
        values = {name: values[-1] for name, values in self._metrics["eval"].items()}
        self._metrics["eval"].clear()  # or TRL would log them once more
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in self.reported(values).items()})
        return output

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Run a batch and note what it gave."""
        batch = MicroBatch(inputs=inputs, num_rows=1, num_items=self.num_items(inputs), cells=0, tokens=0)
        with self._whole.call(batch, is_gathered=True):
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **kwargs)
            self._metrics["eval"]["loss"].append(float(result[0]))
        return result

    def reported(self, values: dict[str, float]) -> dict[str, float]:
        """What to report, of the metrics that TRL notes and the loss."""
        return {name: value for name, value in values.items() if name != "num_tokens"}  # those trained on


class InstructionTrainer(WritesCard, WholeEvaluation, trl.SFTTrainer):
    """Reports the perplexity, too, where the loss is that of the tokens."""

    def reported(self, values: dict[str, float]) -> dict[str, float]:
        """The perplexity is told from the loss."""
        reported = super().reported(values)
        if self.args.loss_type == "nll" and not self.args.label_smoothing_factor and "loss" in values:
            reported["perplexity"] = math.exp(values["loss"]) if values["loss"] < 700 else math.inf
        return reported


class PreferenceTrainer(WritesCard, WholeEvaluation, TokenizedRows, trl.DPOTrainer):
    """Takes rows of ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``."""


def without_adapters(model: Any) -> Any:
    """Return the model as TRL takes it, which puts in adapters itself; one without weights comes with them."""
    return model.unload() if hasattr(model, "peft_config") else model


def lora_config(arguments: ModelArguments) -> Any:
    """Return PEFT's configuration of the adapters; ``None`` if all weights are trained.

    Raises:
        UserError: PEFT is not installed.
    """
    if not arguments.use_peft:
        return None
    require_extra("peft", "use_peft")
    from peft import LoraConfig

    targets = arguments.lora_target_modules
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=targets[0] if targets is not None and len(targets) == 1 else targets,
        task_type="CAUSAL_LM",
    )
