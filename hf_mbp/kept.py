"""What a run keeps in its checkpoints: entries among the states of callbacks, which none of the callbacks reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BUDGET, COST = "hf_mbp", "hf_mbp_cost"
"""Names of entries in `trainer.state.stateful_callbacks`: the profile of the budget, and the measured cost."""


def kept_entry(trainer: Any, name: str) -> dict[str, Any] | None:
    """The entry of the run that is resumed, or of this one; `None` if there is none."""
    entry: dict[str, Any] | None = trainer.state.stateful_callbacks.get(name)
    return entry or None


def keep_entry(trainer: Any, name: str, entry: dict[str, Any]) -> None:
    """Has checkpoints hold the entry from now on; it must go into JSON."""
    trainer.state.stateful_callbacks[name] = entry


@contextmanager
def hidden_entries(trainer: Any) -> Iterator[None]:
    """The state of the trainer without the entries, for stock code that takes every one of them for a callback."""
    states = trainer.state.stateful_callbacks
    entries = {name: states.pop(name) for name in (BUDGET, COST) if name in states}
    try:
        yield
    finally:
        states.update(entries)
