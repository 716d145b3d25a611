"""What a run keeps about its memory, in its checkpoints: how the budget was found, every change of it, and for what."""

import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch

from hf_mbp import wrapped
from hf_mbp.byte_sizes import format_bytes
from hf_mbp.json_fields import value_object
from hf_mbp.memory import Room
from hf_mbp.plan import Budget, Layout

MOST_EVENTS = 100
"""Of the last changes; a run of weeks may have many more, and each checkpoint has them."""

VERSION = 1
"""Of the JSON. A profile of a later version is not read; one of an earlier version is, or is refused here."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """A change: after `step` optimizer steps `what` went from `before` to `after`, and why."""

    step: int
    what: str
    before: float | None
    after: float | None
    why: str

    def __str__(self) -> str:
        return f"after step {self.step:,} {self.what} changes from {self._shown(self.before)} to " + (
            f"{self._shown(self.after)}: {self.why}."
        )

    def _shown(self, value: float | None) -> str:
        if value is None:
            return "none"
        return format_bytes(value) if self.what.endswith("bytes") else f"{value:,.0f}"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Memory ran out, after `step` optimizer steps, at a micro-batch of `size`: bytes as predicted, or cells."""

    step: int
    size: float


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """Last after `step` optimizer steps a full micro-batch took what may be taken, under a cap of `size`."""

    step: int
    size: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The budget of a run, and what is known about it.

    `key` says for which model, device and libraries it holds, `options` what was asked for, `room` what the device has,
    `held_out_error` how well a measured shape was predicted from the others. Single rows from `checkpoint_from` tokens
    on run with activation checkpointing. `settled_at` is the number of steps before the budget was found. `events` are
    the last ones of `num_events`.
    """

    key: dict[str, str]
    options: dict[str, Any]
    budget: Budget
    room: Room | None = None
    held_out_error: float | None = None
    checkpoint_from: int | None = None
    failure: Failure | None = None
    ceiling: Ceiling | None = None
    settled_at: int = 0
    events: tuple[Event, ...] = ()
    num_events: int = 0

    def __post_init__(self) -> None:
        asked, budget = self.options.get("max_tokens"), self.budget
        is_other = (budget.max_tokens is None) != (asked is None)
        if is_other or (budget.max_tokens or 0) > (asked or 0):
            raise ValueError(f"its budget of {budget.max_tokens} tokens is not within the {asked} that are asked for")
        if (self.room is None) != (budget.max_bytes is None):
            raise ValueError("it has either a room for activations or a budget of bytes, and not both")
        if budget.max_tokens is None and budget.max_bytes is None:
            raise ValueError("its budget limits nothing")

    @property
    def knob(self) -> str:
        """What a change of the budget changes: `max_bytes`, or `max_tokens` where bytes are not known."""
        return "max_tokens" if self.budget.max_bytes is None else "max_bytes"

    @property
    def cap(self) -> float:
        """The value of the knob."""
        value: float = getattr(self.budget, self.knob)
        return value

    @property
    def most(self) -> float:
        """What the cap was before anything happened."""
        if self.knob == "max_tokens":
            return float(self.options["max_tokens"])
        return float(self.room.activation_bytes) if self.room else self.cap

    @property
    def changed_at(self) -> int:
        """Steps before the last change."""
        return self.events[-1].step if self.events else self.settled_at

    def size_of(self, rows: int, width: float) -> float:
        """What a micro-batch takes of the cap."""
        return float(rows * width if self.knob == "max_tokens" else self.budget.bytes(rows, width))

    def with_cap(self, cap: float, step: int, why: str) -> "Profile":
        """With another cap, at least 1, and the event of it; as it is, if the cap is the same."""
        if self.knob == "max_tokens":
            budget = replace(self.budget, max_tokens=max(1, int(cap)))
        else:
            budget = replace(self.budget, max_bytes=max(1.0, cap))
        changed = replace(self, budget=budget)
        if changed.cap == self.cap:
            return self
        return changed._noted(Event(step=step, what=self.knob, before=self.cap, after=changed.cap, why=why))

    def with_checkpointing(self, width: int, step: int) -> "Profile":
        """With activation checkpointing for single rows of this width and more."""
        event = Event(
            step=step,
            what="checkpoint_from",
            before=self.checkpoint_from,
            after=width,
            why=f"out of memory at one row of width {width:,}",
        )
        return replace(self, checkpoint_from=width)._noted(event)

    def _noted(self, event: Event) -> "Profile":
        return replace(self, events=(*self.events, event)[-MOST_EVENTS:], num_events=self.num_events + 1)

    def to_json(self) -> dict[str, Any]:
        """As it goes into a checkpoint."""
        fields = asdict(self)
        fields["events"] = [
            {"step": e.step, "what": e.what, "from": e.before, "to": e.after, "why": e.why} for e in self.events
        ]
        return {"version": VERSION, **fields}

    @classmethod
    def from_json(cls, kept: Any) -> "Profile":
        """As it was kept.

        Raises:
            ValueError: by another version of this library, in a way that this one does not know, or changed since.
        """
        if not isinstance(kept, dict):
            raise ValueError(f"it is {kept!r:.40}")
        if kept.get("version") != VERSION:
            raise ValueError(f"a memory profile of version {kept.get('version')!r} is not known here, only {VERSION}")
        fields = {name: value for name, value in kept.items() if name != "version"}
        events = fields.get("events")
        if isinstance(events, list):
            fields["events"] = [_event_fields(event) for event in events]
            fields.setdefault("num_events", len(events))
        return value_object(cls, fields, "profile")


def _event_fields(event: Any) -> Any:
    """`from` is no name that a field can have."""
    names = {"from": "before", "to": "after"}
    return {names.get(name, name): value for name, value in event.items()} if isinstance(event, dict) else event


def key_of(trainer: Any) -> dict[str, str]:
    """For what a profile holds: the model, its dtypes and attention, the way it is trained, device and libraries."""
    model = trainer.model
    parameters = list(model.parameters())
    trained = sum(wrapped.num_elements(parameter) for parameter in parameters if parameter.requires_grad)
    total = sum(wrapped.num_elements(parameter) for parameter in parameters)
    laid = trainer.mbp_rows.layout
    return {
        **({} if laid is Layout.PADDED else {"layout of rows": f"end to end, {laid.value}"}),
        "model": f"{type(model).__name__}, {total:,} parameters, {trained:,} trained",
        "dtype": ", ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters})),
        "mixed precision": str(trainer.accelerator.mixed_precision),
        "attention": wrapped.attention_of(model),
        "activation checkpointing": str(wrapped.checkpoints_activations(model)),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "device": _device_name(trainer.args.device),
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def difference(kept: dict[str, str], now: dict[str, str]) -> str:
    """What differs between two keys, for people; empty if nothing does."""
    names = [name for name in {**kept, **now} if kept.get(name) != now.get(name)]
    return "; ".join(f"{name} was {kept.get(name)} and is {now.get(name)}" for name in names)
