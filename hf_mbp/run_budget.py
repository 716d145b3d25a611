"""The budget of a run: settled at its first step, kept in its checkpoints, so that a resumed run plans alike."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from hf_mbp import memory
from hf_mbp.distributed import Ranks
from hf_mbp.plan import Budget, Ints
from hf_mbp.sizing import measure_budget

STATE_KEY = "hf_mbp"
"""Where `trainer.state.stateful_callbacks`, which goes into checkpoints, holds the budget."""


class RunBudget:
    """The budget of one trainer's run."""

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._budget: Budget | None = None

    def forget(self) -> None:
        """For a new run."""
        self._budget = None

    @property
    def settled(self) -> Budget | None:
        """The budget as it is now, if it was needed yet."""
        return self._budget

    def settle(self, rows: list[Any], sizes: Ints) -> Budget:
        """The budget: as asked, as kept, or sized from memory on `rows` of the first step."""
        if self._budget is None:
            config = self._trainer.mbp_config
            options = {"max_tokens": config.max_tokens_per_micro_batch, "memory_limit": config.memory_limit}
            if config.accumulate_in_fp32:  # it takes memory; without it checkpoints of earlier versions still count
                options["accumulate_in_fp32"] = True
            states = self._trainer.state.stateful_callbacks
            kept = states.get(STATE_KEY)
            self._budget = self._kept(kept["budget"]) if kept and kept["options"] == options else None
            self._budget = self._budget or self._new(rows, sizes)
            states[STATE_KEY] = {"options": options, "budget": asdict(self._budget)}
        return self._budget

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """The state of the trainer without it, for stock code that takes every entry for a callback."""
        states = self._trainer.state.stateful_callbacks
        kept = states.pop(STATE_KEY, None)
        try:
            yield
        finally:
            if kept is not None:
                states[STATE_KEY] = kept

    def _kept(self, kept: dict[str, Any]) -> Budget | None:
        """The budget of the run that is resumed, unless it was made where there was more memory."""
        budget, free = Budget(**kept), memory.free_memory(self._trainer.args.device)
        if self._ranks.lowest(free) >= (budget.max_bytes or 0):
            return budget
        warnings.warn(
            f"The checkpoint was made with {memory.format_bytes(budget.max_bytes or 0)} for activations, more than the "
            f"{memory.format_bytes(free)} that are free now: the budget is sized anew, so the run will not repeat the "
            "earlier one bit for bit.",
            stacklevel=2,
        )
        return None

    def _new(self, rows: list[Any], sizes: Ints) -> Budget:
        config = self._trainer.mbp_config
        if config.max_tokens_per_micro_batch is not None and config.memory_limit is None:
            return Budget(max_tokens=config.max_tokens_per_micro_batch)
        measured = measure_budget(self._trainer, rows, sizes)
        room = self._ranks.lowest(measured.max_bytes or 0.0)
        return replace(measured, max_bytes=room, max_tokens=config.max_tokens_per_micro_batch)
