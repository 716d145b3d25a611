"""The budget of a run: settled at its first step, changed by what the device says, and kept in its checkpoints."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from hf_mbp import compat, control, device_memory, memory
from hf_mbp.arrays import Ints
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.control import Reading
from hf_mbp.distributed import Ranks
from hf_mbp.gauge import Gauge
from hf_mbp.kept import BUDGET, keep_entry, kept_entry, kept_if_it_holds
from hf_mbp.plan import Budget
from hf_mbp.profile import VERSION, Failure, Profile, difference, key_of
from hf_mbp.rehearsal import rehearse
from hf_mbp.sizing import Sizing, cost_of, measure_budget
from hf_mbp.step import MicroBatch


class RunBudget:
    """The budget of one trainer's run.

    A step calls `settle`, then `planned` with the micro-batches it will run; `shrink` and `checkpoint_from` if memory
    runs out, on all ranks alike; `after_passes` when the gradients are there; and `after_step` once the optimizer has
    stepped, before a checkpoint is saved.

    Args:
        trainer: whose budget it is.
        ranks: that have one budget.
        tell: shows a line to the reader, on the first process.
    """

    def __init__(self, trainer: Any, ranks: Ranks, tell: Callable[[str], None] = lambda _: None) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._tell = tell
        self.gauge = Gauge(trainer.args.device, may_reset=trainer.args.skip_memory_metrics)
        self.forget()

    def forget(self) -> None:
        """For a new run."""
        self._profile: Profile | None = None
        self._checkpoint_from: int | None = None
        self._planned = Reading()
        self._seen = Reading()
        self._looked_at = -1
        self._peak_of_passes = 0

    # Finding it

    @property
    def settled(self) -> Budget | None:
        """The budget as it is now, if it was needed yet."""
        return None if self._profile is None else self._profile.budget

    @property
    def is_lowered(self) -> bool:
        """Whether memory ran out, so that the budget is not the one that was asked for or sized."""
        return self._profile is not None and self._profile.failure is not None

    def settle(self, rows: list[Any], sizes: Ints) -> Budget:
        """The budget: as asked, as kept, or sized from memory on `rows` of the first step; as it has changed since."""
        profile = self._profile
        if profile is None:
            profile = self._kept() or self._new(rows, sizes)
            self._set(profile)
        self.gauge.restart()  # an evaluation between the steps is not theirs
        return profile.budget

    @property
    def _options(self) -> dict[str, Any]:
        """What was asked for; a profile holds for no other."""
        config = self._trainer.mbp_config
        options = {"max_tokens": config.max_tokens_per_micro_batch, "memory_limit": config.memory_limit}
        return options | ({"accumulate_in_fp32": True} if config.accumulate_in_fp32 else {})

    def _kept(self) -> Profile | None:
        """The profile of the run that is resumed, if it holds here, too."""
        kept = kept_entry(self._trainer, BUDGET)
        is_known = isinstance(kept, dict) and kept.get("version") == VERSION
        if not kept or (is_known and kept.get("options") != self._options):
            return None  # something else was asked for; what another version has kept, and how, is not looked into

        def read() -> tuple[Profile, str]:
            profile = Profile.from_json(kept)
            return profile, self._what_differs(profile)

        return kept_if_it_holds(self._ranks, read, what="The budget", entry="its memory profile", anew="found")

    def _what_differs(self, profile: Profile) -> str:
        if profile.room is None:
            return ""
        free = device_memory.free_memory(self._trainer.args.device)
        if free < profile.room.activation_bytes:
            return (
                f"it was made with {format_bytes(profile.room.activation_bytes)} for activations, more than the "
                f"{format_bytes(free)} that are free now"
            )
        return difference(profile.key, key_of(self._trainer))

    def _new(self, rows: list[Any], sizes: Ints) -> Profile:
        options, step = self._options, self._trainer.state.global_step
        max_tokens, key = options["max_tokens"], key_of(self._trainer)
        if max_tokens is not None and options["memory_limit"] is None:
            return Profile(key=key, options=options, budget=Budget(max_tokens=max_tokens), settled_at=step)
        sizing = self._agreed(measure_budget(self._trainer, rows, sizes))
        profile = Profile(
            key=key,
            options=options,
            budget=replace(sizing.budget, max_tokens=max_tokens),
            room=sizing.room,
            held_out_error=sizing.held_out_error,
            settled_at=step,
        )
        return self._rehearsed(profile, len(rows))

    def _agreed(self, sizing: Sizing) -> Sizing:
        """One sizing for all ranks: the room of the one that has least, and the most that rows of any need."""
        room, budget = sizing.room, sizing.budget
        said = self._ranks.gather(
            *(room.allowed_bytes, room.activation_bytes),
            *(budget.bytes_fixed, budget.bytes_per_cell, budget.bytes_per_pair),
            -1 if sizing.held_out_error is None else sizing.held_out_error,
        )
        allowed, activations, fixed, per_cell, per_pair, error = zip(*said, strict=True)
        least = memory.Room(allowed_bytes=int(min(allowed)), resting_bytes=int(min(allowed) - min(activations)))
        return Sizing(
            budget=Budget(
                max_bytes=float(least.activation_bytes),
                bytes_fixed=max(fixed),
                bytes_per_cell=max(per_cell),
                bytes_per_pair=max(per_pair),
            ),
            room=least,
            held_out_error=None if min(error) < 0 else max(error),
        )

    def _rehearsed(self, profile: Profile, num_rows: int) -> Profile:
        """The profile after the worst micro-batch of the data was tried, as the rank says that has the least room."""
        cost = cost_of(self._trainer.model, self._trainer.args.device)
        tried = rehearse(self._trainer, profile, self.gauge, cost, num_rows)
        self.gauge.release()
        caps, failed = zip(*self._ranks.gather(tried.cap, tried.failure.size if tried.failure else inf), strict=True)
        if min(caps) < tried.cap:
            why = "another process has less room for its worst micro-batch"
            tried = profile.with_cap(min(caps), profile.settled_at, why)
        if min(failed) < inf:
            tried = replace(tried, failure=Failure(step=profile.settled_at, size=min(failed)))
        for event in tried.events:
            self._tell(f"hf_mbp: {event}")
        return tried

    def describe(self, max_tokens: int) -> str:
        """The budget in words, of which the longest rows may have `max_tokens` in a micro-batch."""
        profile = self._profile
        if profile is None or profile.room is None:
            return f"at most {max_tokens:,} tokens each, as asked"
        error = profile.held_out_error
        return (
            f"at most {max_tokens:,} tokens each, sized for {format_bytes(profile.room.activation_bytes)} of "
            f"activations" + ("" if error is None else f", predicted within {max(0.01, error):.0%}")
        )

    # Changing it

    def planned(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Notes the micro-batches that a step will run, to compare with what the device will say."""
        profile = self._profile
        if profile is None or profile.room is None:
            return
        if any(mb.is_checkpointed for mb in micro_batches):
            return  # the peak may be that of a row beyond the budget, which no smaller micro-batch would lower
        for mb in micro_batches:
            if mb.num_rows and not mb.is_idle:
                rows, width = mb.layout.shape(mb.num_rows, mb.cells)
                planned = Reading(planned_bytes=profile.size_of(rows, float(width)), num_rows=mb.num_rows)
                self._planned = self._planned.merged(planned)

    def shrink(self, rows: int, width: int) -> None:
        """A micro-batch `[rows, width]` ran out of memory: from now on none as large fits; a row alone always does.

        To be called by every rank with the same numbers.
        """
        profile = self._profile
        if profile is None:
            return
        self._planned = self._seen = Reading()
        step = self._trainer.state.global_step
        if rows > 1:
            self._set(control.after_failure(profile, rows, width, step))

    def checkpoint_from(self, width: int) -> None:
        """Single rows of this width and more run with activation checkpointing from now on."""
        profile = self._profile
        if profile is None:  # batches of a loader of the user's own need no budget
            self._checkpoint_from = min(width, self._checkpoint_from or width)
        elif profile.checkpoint_from is None or width < profile.checkpoint_from:
            self._set(profile.with_checkpointing(width, self._trainer.state.global_step))

    def is_checkpointed(self, rows: int, width: float) -> bool:
        """Whether a micro-batch `[rows, width]` runs with activation checkpointing: a row that is too large without."""
        profile = self._profile
        if rows != 1:
            return False
        if profile is None:
            return self._checkpoint_from is not None and width >= self._checkpoint_from
        if profile.checkpoint_from is not None and width >= profile.checkpoint_from:
            return True
        model, max_bytes = self._trainer.model, profile.budget.max_bytes
        is_large = max_bytes is not None and profile.budget.bytes(1, width) > max_bytes
        return bool(is_large) and compat.can_checkpoint(model)

    def after_passes(self) -> None:
        """Reads what the micro-batches took; what the optimizer takes in its step would not be less for smaller ones.

        Its first step makes its states, and beside them stand, for a moment, the values that it starts from.
        """
        self._peak_of_passes = self.gauge.peak_bytes()

    def after_step(self) -> None:
        """Compares what the device held with what was planned; to be called by every rank after each optimizer step.

        One rank looks every time. Several have to agree, which takes a small gather: every few steps.
        """
        profile, step = self._profile, self._trainer.state.global_step
        if profile is None or step == self._looked_at:
            return
        self._looked_at = step
        if profile.room is not None:
            self._read(profile.room)
        if self._ranks.count > 1 and not control.is_due(profile, step):
            return
        reading, self._seen = self._seen, Reading()
        agreed = control.wanted(profile, reading)
        if profile.room is not None:
            agreed = self._ranks.lowest(agreed)
        adapted = control.adapted(profile, step, agreed, reading)
        if adapted.num_events > profile.num_events:
            self.gauge.release()
            self._change(adapted)
        elif adapted is not profile:
            self._set(adapted)

    def has_room_for(self, size: int) -> bool:
        """Whether so many bytes fit beside what training holds when no micro-batch runs; as far as that is known."""
        return self._profile is None or self._profile.room is None or size <= self._profile.room.activation_bytes

    def make_room(self) -> None:
        """Has the allocator give back what it keeps and nothing uses, if that could bring the device beyond its limit.

        To be called between micro-batches; local to this rank.
        """
        profile = self._profile
        if profile is not None and profile.room is not None:
            self.gauge.tidy(profile.room.resting_bytes, profile.room.allowed_bytes)

    def _read(self, room: memory.Room) -> None:
        """Adds what the device held in the passes of this step to what was seen since the last look."""
        peak, self._peak_of_passes = self._peak_of_passes, 0
        seen = replace(self._planned, peak_bytes=self._scaled(peak, room))
        self._planned = Reading()
        self._seen = self._seen.merged(seen)
        self.gauge.tidy(room.resting_bytes, room.allowed_bytes)

    def _scaled(self, peak: int, room: memory.Room) -> float:
        """The peak, as it would count if others on the device had left as much as when the room was found."""
        left = self.gauge.held_bytes() + self.gauge.free_bytes()
        return peak * max(1.0, room.allowed_bytes / max(1, left))

    def _change(self, profile: Profile) -> None:
        self._set(profile)
        self._tell(f"hf_mbp: {profile.events[-1]}")

    def _set(self, profile: Profile) -> None:
        self._profile = profile
        keep_entry(self._trainer, BUDGET, profile.to_json())
