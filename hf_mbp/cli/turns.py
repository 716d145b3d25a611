"""Processes of a machine that take turns: the first makes data ready, the others find them in its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState


@contextmanager
def first_process_first() -> Iterator[None]:
    """Have the first process of each machine go through the block alone, then all others.

    For what is read and tokenized, and nothing in which processes meet, such as loading a model under ZeRO-3, which
    spreads each layer when it is made: they would wait for one another for ever. Unlike Accelerate's own it lets the
    others go on if the first one fails, so that each can tell why it ends.
    """
    state = PartialState()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()
