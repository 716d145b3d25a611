"""When a budget changes, and to what: by what a step was predicted to need, and what the device says it took. Pure."""

from dataclasses import dataclass, replace
from math import inf

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.memory import Room
from hf_mbp.profile import Ceiling, Failure, Profile

AIM = 0.93
"""Share of what is allowed that a corrected budget leads to: above the 85 % below which memory lies idle, and as far
from the limit as allocators were seen to stray between steps of one plan."""

AIM_OF_ONE = 0.88
"""The same where a single micro-batch was tried: in a step others have been before it, and have left gaps."""

SHRINK_ABOVE, GROW_BELOW = 0.97, 0.88
"""Shares of what is allowed beyond which a measured peak changes the budget."""

FILLED = 0.8
"""Share of the budget from which a micro-batch tells what a full one takes."""

WIDEST_ROOM = 3
"""A share left free is one of at most so many times the room for activations: beside a process, or weights, that take
much, a tenth of all could be more than the whole room.

A choice: with it a corrected budget aims at four fifths of the room, and shrinks where a tenth of it is left. That this
stays below the limit, and fills more than half of the room, `tests/test_memory_limit.py` shows under a real one."""

LEAST_SHRINK, MOST_SHRINK = 0.95, 0.5
GROW_FACTOR = 1.1
GROW_PAUSE = 8
"""A budget grows by no more at a time, nor sooner after its last change, in optimizer steps."""

BELOW_FAILURE = 0.9
FAILURE_HOLDS = 500
"""After memory ran out the budget stays below this share of what failed, for so many optimizer steps. For as many it
stays where a full micro-batch took what may be taken: most steps may take less than the worst of them."""

LOOK_EVERY, LOOK_AFTER_CHANGE = 8, 3
"""Several ranks compare what they measured every so many steps, and for so many after a change: each time a gather."""

ROOM_TO_GROW = 1.01
"""A smaller change is none."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a rank saw: the most its device held, 0 if unknown, and the largest micro-batch that it ran meanwhile.

    `planned_bytes` are those predicted for it, 0 if it says nothing, and `num_rows` are its rows.
    """

    peak_bytes: float = 0.0
    planned_bytes: float = 0.0
    num_rows: int = 0

    def merged(self, other: "Reading") -> "Reading":
        """The higher peak, and the larger micro-batch."""
        larger = max(self, other, key=lambda reading: reading.planned_bytes)
        return replace(larger, peak_bytes=max(self.peak_bytes, other.peak_bytes))


def is_due(profile: Profile, step: int) -> bool:
    """Whether several ranks compare what they measured after this step."""
    return step % LOOK_EVERY == 0 or step - profile.changed_at <= LOOK_AFTER_CHANGE


def wanted(profile: Profile, reading: Reading) -> float:
    """The cap that one rank asks for; infinite where what it saw says nothing about it."""
    cap, room = profile.cap, profile.room
    if room is None or not reading.peak_bytes:
        return max(cap, profile.most)  # nothing is measured: back to where it was
    if not reading.planned_bytes:
        return inf
    if reading.peak_bytes > share_of(room, SHRINK_ABOVE):
        lower = min(corrected(room, reading), LEAST_SHRINK * cap)
        return max(lower, MOST_SHRINK * cap) if reading.num_rows > 1 else inf  # a row alone cannot be split
    if reading.planned_bytes < FILLED * cap:
        return inf
    is_low = reading.peak_bytes < share_of(room, GROW_BELOW)
    return max(cap, corrected(room, reading)) if is_low else cap


def share_of(room: Room, share: float) -> float:
    """Bytes that are this share of what is allowed; of a small room, those that leave it a like share.

    Example:
        >>> share_of(Room(allowed_bytes=1000, resting_bytes=400), 0.9)
        900.0
        >>> share_of(Room(allowed_bytes=1000, resting_bytes=900), 0.9)
        970.0
    """
    return room.allowed_bytes - (1 - share) * min(room.allowed_bytes, WIDEST_ROOM * room.activation_bytes)


def corrected(room: Room, reading: Reading, aim: float = AIM) -> float:
    """The predicted bytes that would take this share of what is allowed, by a micro-batch that took less or more."""
    taken = max(1.0, reading.peak_bytes - room.resting_bytes)
    return (share_of(room, aim) - room.resting_bytes) * reading.planned_bytes / taken


def adapted(profile: Profile, step: int, agreed: float, reading: Reading) -> Profile:
    """The profile with the cap that ranks have agreed on, or with as much of a step up to it as is due.

    Only what they have agreed on, and not the reading of one, decides: their profiles stay alike.
    """
    cap = profile.cap
    if agreed <= cap and profile.room is not None:
        profile = replace(profile, ceiling=Ceiling(step=step, size=agreed))
    if agreed < cap:
        is_over = profile.room is not None and reading.peak_bytes > profile.room.allowed_bytes
        relation = "which is more than" if is_over else "which is close to"
        return profile.with_cap(agreed, step, _why(reading, relation, profile.room))
    if agreed == inf or step - profile.changed_at < GROW_PAUSE:
        return profile
    higher = min(agreed, _one_step_up(profile), _ceiling(profile, step))
    if higher < ROOM_TO_GROW * cap and higher < profile.most:
        return profile
    if higher <= cap:
        return profile
    is_measured = profile.room is not None and reading.peak_bytes > 0
    why = _why(reading, "less than", profile.room) if is_measured else f"{GROW_PAUSE} steps without a fault"
    return profile.with_cap(higher, step, why)


def _one_step_up(profile: Profile) -> float:
    return max(GROW_FACTOR * profile.cap, profile.cap + 1)


def _ceiling(profile: Profile, step: int) -> float:
    """Where the budget stays below for now, because memory ran out, or almost did."""
    known = [(profile.failure, BELOW_FAILURE), (profile.ceiling, 1.0)]
    return min([share * at.size for at, share in known if at and step - at.step < FAILURE_HOLDS], default=inf)


def _why(reading: Reading, relation: str, room: Room | None) -> str:
    allowed = format_bytes(room.allowed_bytes) if room else "what is allowed"
    return f"the peak was {format_bytes(reading.peak_bytes)}, {relation} {allowed}"


def after_failure(profile: Profile, rows: int, width: int, step: int) -> Profile:
    """The profile after a micro-batch `[rows, width]` ran out of memory: it, and any as large, no longer fits."""
    size = profile.size_of(rows, width)
    cap = min(profile.cap, size / 2)
    failed = replace(profile, failure=Failure(step=step, size=size))
    return failed.with_cap(cap, step, f"out of memory at {rows:,} rows of width {width:,}")
