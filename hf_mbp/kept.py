"""What a run keeps in its checkpoints: entries among the states of callbacks, which none of the callbacks reads."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from hf_mbp.distributed import Ranks

Kept = TypeVar("Kept")

BUDGET, COST, RANDOM_STATES = "hf_mbp", "hf_mbp_cost", "hf_mbp_random_states"
"""Names of entries in `trainer.state.stateful_callbacks`: the profile of the budget, the measured cost, and how many
ranks save the states of their random numbers."""


def kept_entry(trainer: Any, name: str) -> Any:
    """The entry of the run that is resumed, or of this one; `None` if there is none.

    A dictionary, if nobody has changed the checkpoint.
    """
    return trainer.state.stateful_callbacks.get(name) or None


def keep_entry(trainer: Any, name: str, entry: dict[str, Any]) -> None:
    """Has checkpoints hold the entry from now on; it must go into JSON."""
    trainer.state.stateful_callbacks[name] = entry


def drop_entry(trainer: Any, name: str) -> None:
    """Has checkpoints hold no such entry from now on."""
    trainer.state.stateful_callbacks.pop(name, None)


def kept_if_it_holds(
    ranks: Ranks, read: Callable[[], tuple[Kept, str]], *, what: str, entry: str, anew: str
) -> Kept | None:
    """What an entry says, if it holds here, on all ranks alike; else warns why not, and returns `None`.

    Args:
        ranks: that go on together.
        read: what it says, and why it does not hold; empty if it does.
        what: it is, and `entry` the same where it cannot be read, and `anew` what is done instead, for the warning.
    """
    kept, reason = None, ""
    try:
        kept, reason = read()
    except ValueError as error:
        reason = f"{entry} cannot be read ({error})"
    if ranks.highest(bool(reason)) == 0:
        return kept
    warnings.warn(
        f"{what} of the checkpoint does not hold here: {reason or 'so another process says'}. It is {anew} anew, so "
        "the run will not repeat the earlier one bit for bit.",
        stacklevel=3,
    )
    return None


@contextmanager
def hidden_entries(trainer: Any) -> Iterator[None]:
    """The state of the trainer without the entries, for stock code that takes every one of them for a callback."""
    states = trainer.state.stateful_callbacks
    entries = {name: states.pop(name) for name in (BUDGET, COST, RANDOM_STATES) if name in states}
    try:
        yield
    finally:
        states.update(entries)
