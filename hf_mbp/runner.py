"""Runs the micro-batches of an optimizer step for one trainer, each by the trainer's own `training_step`."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch

from hf_mbp import compat, probe, undisturbed, wrapped
from hf_mbp.accumulation import Float32Sums, half_precision
from hf_mbp.call_metrics import CallMetrics
from hf_mbp.distributed import Ranks
from hf_mbp.feed import Feed
from hf_mbp.first_step import protect_first_step
from hf_mbp.prefetch import Prefetch
from hf_mbp.recovery import Backward, Fault, Recovery
from hf_mbp.report import StepReport
from hf_mbp.step import MicroBatch, run_micro_batches
from hf_mbp.two_passes import Part

IS_OPAQUE = (
    "training_step gets the micro-batches of a step and not a dictionary of inputs. Override compute_loss, which gets "
    "each of them; or put your training_step behind the mixin: class Mine(MBPMixin, YourTrainer)."
)


class MicroBatches:
    """What the stock loop gets in place of a batch: all micro-batches of the step in the last, none in the others.

    Opaque, like `Rows`. All of them run together, so that all can be run again.
    """

    def __init__(self, micro_batches: list[MicroBatch]) -> None:
        self.micro_batches = micro_batches

    def __contains__(self, key: object) -> bool:
        return False

    def __getitem__(self, key: object) -> Any:
        raise TypeError(IS_OPAQUE)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(IS_OPAQUE if name in dir(dict) else name)


TrainingStep = Callable[..., torch.Tensor]
"""`Trainer.training_step`, whoever overrides it."""


class Runner:
    """The steps of one trainer."""

    def __init__(self, trainer: Any, feed: Feed, ranks: Ranks, report: StepReport) -> None:
        self._trainer = trainer
        self._feed = feed
        self._ranks = ranks
        self._report = report
        self._sums = Float32Sums()
        self._call_metrics = CallMetrics(trainer, ranks)
        self._prefetch = Prefetch(trainer.args.device, pins=trainer.args.dataloader_pin_memory)
        self._recovery = Recovery(ranks, partial(probe.modules_of, trainer), self._parameters)
        self._half: list[torch.nn.Parameter] = []
        self._not_embedded: list[MicroBatch] = []
        self._last: MicroBatch | None = None
        self._has_stepped = False

    def restart(self) -> None:
        """For a new run of training."""
        self._sums.restart()
        self._recovery.restart()
        self._has_stepped = False

    def run(self, batch: MicroBatches, model: torch.nn.Module, training_step: TrainingStep) -> torch.Tensor:
        """Forward and backward of all the micro-batches; this rank's part of the loss."""
        if not batch.micro_batches:
            return torch.zeros((), device=self._ranks.device)
        attempt = partial(self._attempt, model)
        backward = partial(self._forward_and_backward, model, training_step)
        if wrapped.recovers(self._trainer.accelerator):
            plan_again = partial(self._plan_again, batch, undisturbed.remembered_notes(self._trainer))
            loss = self._recovery.run(batch.micro_batches, attempt, backward, plan_again=plan_again)
        else:
            loss = attempt(batch.micro_batches, backward)
        self._call_metrics.merge()
        if all(micro_batch.is_idle for micro_batch in batch.micro_batches):
            compat.void_step(self._trainer.accelerator, self._trainer.model)
        else:
            self._end(model)
        return loss

    def _attempt(self, model: torch.nn.Module, micro_batches: list[MicroBatch], backward: Backward) -> torch.Tensor:
        self._call_metrics.restart()
        self._sums.restart()
        self._half = self._summed_in_float32()
        self._sums.add(self._half)
        for micro_batch in micro_batches:
            if micro_batch.is_idle:
                self._call_metrics.idle(micro_batch)
        if all(micro_batch.is_idle for micro_batch in micro_batches):
            return torch.zeros((), device=self._ranks.device)
        self._prefetch.start(micro_batches)
        self._last = micro_batches[-1]
        self._not_embedded = [micro_batch for micro_batch in micro_batches if not micro_batch.is_idle]
        return run_micro_batches(
            micro_batches,
            backward,
            defer_sync=compat.sync_deferral(self._trainer, model),
            syncs_last=wrapped.replicated_in(model) is None,
        )

    def _forward_and_backward(
        self, model: torch.nn.Module, training_step: TrainingStep, micro_batch: MicroBatch
    ) -> torch.Tensor:
        self._feed.budget.make_room()
        self._embed_all(model, micro_batch)
        trainer = self._trainer
        varies = self._feed.is_compiled
        second_pass = trainer.mbp_two_passes.second(micro_batch) if trainer.mbp_two_passes else nullcontext()
        checkpointing = compat.checkpointed(trainer.model) if micro_batch.is_checkpointed else nullcontext()
        with self._feed.cost.timing(micro_batch):
            with (
                second_pass,
                checkpointing,
                self._call_metrics.call(micro_batch),
                compat.weighted_loss(trainer, micro_batch.weight, micro_batch.num_items, varies=varies),
                self._prefetch.on_device(micro_batch) as inputs,
                self._report.computing(),
            ):
                loss = training_step(model, inputs, None)
            self._sums.add(self._half)
        if micro_batch is self._last:  # now, because what comes next may wait for the device
            self._feed.prepare_next()
        return loss

    def _embed_all(self, model: torch.nn.Module, micro_batch: MicroBatch) -> None:
        """Of a loss that compares rows: the first pass of all micro-batches, before the second of the first.

        If there is no memory for it, the attempt is given up, and this rank makes it with fillers to keep in step.
        """
        waiting = self._not_embedded
        if not waiting or self._trainer.mbp_two_passes is None:
            return
        if micro_batch is not waiting[0]:
            waiting = [micro_batch] * len(waiting)
        compat.to_training_mode(self._trainer, model)
        parts = [Part(key=one, inputs=one.inputs, share=one.weight / self._ranks.count) for one in waiting]
        with self._report.computing():
            self._trainer.mbp_two_passes.first(model, parts, self._ranks)
        self._not_embedded = []

    def _summed_in_float32(self) -> list[torch.nn.Parameter]:
        if not self._trainer.mbp_config.accumulate_in_fp32:
            return []
        return half_precision(chain.from_iterable(module.parameters() for module in probe.modules_of(self._trainer)))

    def _parameters(self) -> list[torch.nn.Parameter]:
        """All that a backward pass may reach: of modules, of the optimizer, and of the trainer itself."""
        held = [module.parameters() for module in probe.modules_of(self._trainer)]
        stepped = [group["params"] for group in self._trainer.optimizer.param_groups]
        own = [value for value in vars(self._trainer).values() if isinstance(value, torch.nn.Parameter)]
        return list(dict.fromkeys(chain(*held, *stepped, own)))

    def _plan_again(
        self, batch: MicroBatches, put_back_notes: Callable[[], None], faults: list[Fault]
    ) -> list[MicroBatch]:
        put_back_notes()
        batch.micro_batches = self._feed.plan_again(faults)
        return batch.micro_batches

    def _end(self, model: torch.nn.Module) -> None:
        """What is left to do before the optimizer steps: reducing the gradients, and seeing to its first step.

        Which is not made yet if the scaler of fp16 has skipped it.
        """
        self._sums.give()
        if (replicated := wrapped.replicated_in(model)) is not None:
            with self._report.computing():
                wrapped.reduce_gradients(replicated)
        self._feed.budget.after_passes()
        is_first = not self._has_stepped or self._trainer.accelerator.optimizer_step_was_skipped
        if is_first and wrapped.recovers(self._trainer.accelerator):
            protect_first_step(self._trainer.optimizer, has_room_for=self._feed.budget.has_room_for)
        self._has_stepped = True
