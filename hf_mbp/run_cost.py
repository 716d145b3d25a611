"""The cost that the plans of a run are made with: modelled, or measured in its first steps and kept in its checkpoints.

With `MBPConfig(calibrate=True)`:

    1. The first step warms up: memory is allocated, kernels are chosen or compiled.
    2. In the steps that follow, micro-batches are timed. Plans are made with the modelled overhead, with less and with
       more of it in turn, so that small and large ones are seen.
    3. After the last of these steps the ranks put together what they have measured, constants are fitted to it
       (`calibration.py`), and all later plans are made with these.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from hf_mbp import wrapped
from hf_mbp.calibration import Calibration, Timed, calibrated
from hf_mbp.distributed import Ranks
from hf_mbp.json_fields import value_object
from hf_mbp.kept import COST, keep_entry, kept_entry, kept_if_it_holds
from hf_mbp.plan import Cost
from hf_mbp.profile import difference, key_of
from hf_mbp.sizing import cost_of
from hf_mbp.step import MicroBatch
from hf_mbp.stopwatch import Stopwatch

WARM_UP_STEPS = 1
MEASURED_STEPS = 9
FIRST_STEPS = WARM_UP_STEPS + MEASURED_STEPS
"""Three rounds of `TRIED_OVERHEADS` are measured, so that none of them hangs on a single step; the help of
`MBPConfig.calibrate` names the sum."""

TRIED_OVERHEADS = (1.0, 0.25, 4.0)
"""Factors of the modelled overhead in the first steps: without them a plan would rarely hold the small, or the large,
micro-batches whose cost decides whether they are worth it."""

MOST_TOLD = 1024
"""Measured micro-batches of all ranks that constants are fitted to; more would take time, and gain little."""

VERSION = 1
"""Of the JSON."""


class RunCost:
    """The cost model of one trainer's run.

    A step asks for `of_step` when it plans, runs each micro-batch within `timing`, and calls `after_step` once the
    optimizer has stepped, before a checkpoint is saved; on all ranks alike.

    Args:
        trainer: whose plans are made with it.
        ranks: that plan with one cost.
        tell: shows a line to the reader, on the first process.
    """

    def __init__(self, trainer: Any, ranks: Ranks, tell: Callable[[str], None] = lambda _: None) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._tell = tell
        self.stopwatch = Stopwatch(trainer.args.device)
        self.forget()

    def forget(self) -> None:
        """For a new run."""
        self._modelled: Cost | None = None
        self._calibration: Calibration | None = None
        self._started_at = 0
        self.stopwatch.restart()

    @property
    def is_settled(self) -> bool:
        """Whether a step of this run was planned yet."""
        return self._modelled is not None

    @property
    def is_final(self) -> bool:
        """Whether all steps from here on are planned with the same cost."""
        return self._calibration is not None

    def of_step(self) -> Cost:
        """The cost that the step is planned with that the trainer is at, also if it is planned again."""
        if self._modelled is None:
            self._modelled = cost_of(self._trainer.model, self._trainer.args.device)
            self._started_at = self._trainer.state.global_step
            self._calibration = self._settled(self._modelled)
        if self._calibration is not None:
            return self._calibration.cost
        factor = TRIED_OVERHEADS[self._steps_done % len(TRIED_OVERHEADS)]
        return replace(self._modelled, overhead=factor * self._modelled.overhead, floor=factor * self._modelled.floor)

    def timing(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Around the passes of a micro-batch; nothing but planned rows counts, and no activation checkpointing."""
        is_measuring = self.is_settled and self._calibration is None and self._steps_done >= WARM_UP_STEPS
        if not is_measuring or not micro_batch.rows or micro_batch.is_checkpointed:
            return nullcontext()
        rows, width = micro_batch.layout.shape(micro_batch.num_rows, micro_batch.cells)
        return self.stopwatch.timing(rows, float(width))

    def after_step(self) -> None:
        """Finds the constants after the last of the first steps; to be called by every rank after each step."""
        modelled = self._modelled
        if modelled is None or self._calibration is not None or self._steps_done < FIRST_STEPS:
            return
        calibration = calibrated(self._of_all_ranks(self.stopwatch.finished()), modelled)
        self._calibration = replace(calibration, cost=self._first_ranks(calibration.cost))
        self._keep(self._calibration)
        self._tell(f"hf_mbp: {self._calibration.described(modelled)}")

    def metrics(self) -> dict[str, float]:
        """For the end of training: how far the cost is from what was measured, if it was."""
        error = None if self._calibration is None else self._calibration.error
        return {} if error is None else {"mbp_calibration_error": error}

    @property
    def _steps_done(self) -> int:
        return int(self._trainer.state.global_step) - self._started_at

    # Before the first step

    def _settled(self, modelled: Cost) -> Calibration | None:
        """What is known before the first step; `None` if it is to be measured."""
        if not self._trainer.mbp_config.calibrate:
            return Calibration(cost=modelled)
        if (calibration := self._kept()) is not None:
            return calibration
        if not (why_not := self._why_not_measured()):
            return None
        calibration = Calibration(cost=modelled, why_modelled=why_not)
        self._tell(f"hf_mbp: calibrate=True changes nothing here, {calibration.described(modelled)}")
        return calibration

    def _why_not_measured(self) -> str:
        steps_left = self._trainer.state.max_steps - self._trainer.state.global_step
        if wrapped.is_sharded(self._trainer):
            return "processes that share a model wait for each other in every micro-batch"
        if not self.stopwatch.can_time:
            return f"times of a device of type {self._trainer.args.device.type} are not read"
        if steps_left <= FIRST_STEPS:
            return f"{FIRST_STEPS} steps are measured, and {steps_left} are left"
        return ""

    def _kept(self) -> Calibration | None:
        """The calibration of the run that is resumed, if it holds here, too."""
        kept = kept_entry(self._trainer, COST)
        if kept is None:
            return None

        def read() -> tuple[Calibration, str]:
            entry = _read(kept)
            return entry.calibration, difference(entry.key, key_of(self._trainer))

        return kept_if_it_holds(self._ranks, read, what="The measured cost", entry="it", anew="measured")

    def _keep(self, calibration: Calibration) -> None:
        entry = _Entry(version=VERSION, key=key_of(self._trainer), calibration=calibration)
        keep_entry(self._trainer, COST, asdict(entry))

    # Ranks

    def _of_all_ranks(self, timed: list[Timed]) -> list[Timed]:
        """What all ranks have measured: balanced ones have rows of like lengths each, and differ from each other."""
        most = max(1, MOST_TOLD // self._ranks.count)
        told = timed[:: -(-len(timed) // most) or 1]
        numbers = [number for one in told for number in (one.rows, one.width, one.seconds)]
        said = self._ranks.gather(*numbers, *[0.0] * (3 * most - len(numbers)))
        return [
            Timed(rows=int(rows), width=width, seconds=seconds)
            for of_rank in said
            for rows, width, seconds in zip(*[iter(of_rank)] * 3, strict=True)
            if rows
        ]

    def _first_ranks(self, cost: Cost) -> Cost:
        """The cost as the first rank has it: unlike machines may round unlike."""
        overhead, cell, attention, floor = self._ranks.gather(cost.overhead, cost.cell, cost.attention, cost.floor)[0]
        return replace(cost, overhead=overhead, cell=cell, attention=attention, floor=floor)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What checkpoints hold, in JSON: a calibration, and for what."""

    version: int
    key: dict[str, str]
    calibration: Calibration


def _read(kept: Any) -> _Entry:
    if isinstance(kept, dict) and kept.get("version") != VERSION:
        raise ValueError(f"version {kept.get('version')!r} is not known here, only {VERSION}")
    return value_object(_Entry, kept, "entry")
