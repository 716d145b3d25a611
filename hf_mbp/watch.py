"""The ranks that train together watch over each other: where one fails, all end soon, with the cause named.

Without it a rank that fails leaves the others in a collective, which ends when `ddp_timeout` is over (half an hour) or,
where the connection breaks, with an error that speaks of the network and not of the cause.

Two daemon threads on each rank, while `train()`, `evaluate()` or `predict()` runs:

* one talks with the store of torch.distributed, over a connection of its own: it gives a sign of life, looks for the
  one of the next rank (each rank watches one other, so the traffic is three requests a turn), and reads the verdict;
* one judges, and never waits for the store, which may be gone with its host.

The verdict is one line, written by whoever knows first: a rank on which that raises, or the one that hears nothing of
the next. A rank that reads it ends, after a time for its own exception to come and be shown.

No clocks are compared, not even one with itself: silence is counted in turns that this process had and the other did
not use. A process that was suspended had no turns.
"""

import atexit
import faulthandler
import itertools
import os
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_mbp import compat

TICKS = 20
"""Turns in a `rank_timeout`: at 60 s, one every three seconds."""
SILENT_TICKS = 13
"""Turns without a sign of life before a rank is given up; the rest is for telling the others and for `GRACE_TICKS`."""
GRACE_TICKS = 3
"""Turns that a rank has, when another one has failed, to end by its own exception."""

VERDICT, TOLD, DONE = "verdict", "told", b"done"

MOST_LETTERS = 300
"""Of an exception, in the verdict; out-of-memory errors go on about settings of the allocator."""

_runs = itertools.count()
_watching: list["Watch"] = []
"""The one of this process, if it has one now: an evaluation may be part of a training."""


@contextmanager
def watched_ranks(num_ranks: int, seconds: float) -> Iterator[None]:
    """Has the failure of any rank inside the block end all of them within about `seconds`; 0 turns that off.

    All ranks have to come here equally often. Inside of another such block there is nothing to do.
    """
    if _watching:
        yield
        return
    # Workers that the launcher starts again may find the store of the first attempt.
    name = f"hf_mbp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_runs)}"
    store = compat.own_store(name) if num_ranks > 1 and seconds else None
    if store is None:
        yield
        return
    watch = Watch(store, torch.distributed.get_rank(), torch.distributed.get_world_size(), seconds=seconds)
    watch.start()
    _watching.append(watch)
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and not error.code:  # a rank that leaves on purpose, maybe before the others
            watch.finish()
            raise
        atexit.register(end_later, seconds)
        watch.fail(error)
        raise
    finally:
        _watching.clear()
    atexit.unregister(end_later)  # of an earlier failure, which was survived
    watch.finish()


class Watch:
    """One rank's part in it. `end` is called with the line to print when this rank has to end."""

    def __init__(
        self, store: Any, rank: int, num_ranks: int, *, seconds: float, end: "Callable[[str], None] | None" = None
    ) -> None:
        self._store, self._end = store, end or end_process
        self._rank, self._num_ranks, self._tick = rank, num_ranks, seconds / TICKS
        self._mine, self._next = f"rank{rank}", f"rank{(rank + 1) % num_ranks}"
        self._name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self._has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._beats = itertools.count()
        self._heard, self._silence = b"", 0
        self._answers, self._answers_before, self._unanswered = 0, 0, 0
        self._lost, self._cause, self._verdict = "", "", ""
        self._is_well = self._has_told = False
        self._is_known, self._is_over, self._is_woken, self._are_told = (threading.Event() for _ in range(4))
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._talk, self._judge)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """For a rank that is done: nobody has to wait for it, and it ends for nobody."""
        self._is_well = True
        self._stop()
        self._threads[0].join(GRACE_TICKS * self._tick)

    def fail(self, error: BaseException) -> None:
        """Tells the others why this rank's training ends, or the user why it has to, if that began elsewhere."""
        try:
            if compat.is_lost_connection(error) and self._is_known.wait((TICKS - GRACE_TICKS) * self._tick):
                explain(error, self.line())
            elif not self._is_known.is_set():
                self._cause = f"{self._name} {cause_of(error)}"
                self._is_woken.set()
                self._is_known.wait(GRACE_TICKS * self._tick)
            if self._rank == 0 and not self._has_agent:  # the store, with the verdict in it, ends with this process
                self._are_told.wait((GRACE_TICKS - 1) * self._tick)  # the judge waits a turn longer
        finally:
            self._stop()

    def line(self) -> str:
        """What to tell the user."""
        return f"hf_mbp: {self._verdict} Rank {self._rank} ends, too."

    def exchange(self) -> None:
        """One turn of the talk with the store."""
        self._store.set(self._mine, f"{next(self._beats)} {self._name}")
        self._listen()
        if verdict := self._cause or self._accusation():
            self._pass_on(self._store.compare_set(VERDICT, "", verdict).decode())
        elif self._store.check([VERDICT]):
            self._pass_on(self._store.get(VERDICT).decode())
        self._answers += 1

    def judge(self) -> None:
        """One turn of the judge."""
        is_answered, self._answers_before = self._answers != self._answers_before, self._answers
        self._unanswered = 0 if is_answered else self._unanswered + 1
        if self._unanswered >= SILENT_TICKS:
            self._conclude(self._loss())
        if self._is_known.is_set() and not self._is_over.wait(GRACE_TICKS * self._tick):
            self._end(self.line())

    def _talk(self) -> None:
        try:
            while not self._is_over.is_set():
                self.exchange()
                self._is_woken.wait(self._tick)
                self._is_woken.clear()
            if self._is_well:
                self._store.set(self._mine, DONE.decode())
        except RuntimeError as error:  # not swallowed: if it matters, the judge says it
            self._lost = f" ({shortened(error)})"

    def _judge(self) -> None:
        while not self._is_over.wait(self._tick):
            self.judge()

    def _stop(self) -> None:
        self._is_over.set()
        self._is_woken.set()

    def _pass_on(self, verdict: str) -> None:
        self._conclude(verdict)
        if self._store.add(TOLD, 0 if self._has_told else 1) == self._num_ranks:
            self._are_told.set()
        self._has_told = True

    def _conclude(self, verdict: str) -> None:
        if not self._is_known.is_set():
            self._verdict = verdict
            self._is_known.set()

    def _listen(self) -> None:
        """Counts the turns in which the next rank, which may not have begun yet or be done, gave no sign of life."""
        is_there = self._heard or self._store.check([self._next])
        heard = self._store.get(self._next) if is_there else b""
        is_silent = heard == self._heard and heard not in (b"", DONE)
        self._heard, self._silence = heard, self._silence + 1 if is_silent else 0

    def _accusation(self) -> str:
        return _gone(self._heard.decode().split(" ", 1)[1], self._tick) if self._silence >= SILENT_TICKS else ""

    def _loss(self) -> str:
        keeper = "the launcher on the first machine" if self._has_agent else "rank 0"
        return _gone(f"{keeper}, with which the ranks keep in touch{self._lost},", self._tick)


def _gone(who: str, tick: float) -> str:
    return (
        f"{who} has given no sign of life for {SILENT_TICKS * tick:.0f} s: its process was killed or suspended, or its "
        "host is gone. See the log of that host, where the kernel notes whom it killed for want of memory; if it was "
        "only slow, raise rank_timeout."
    )


def cause_of(error: BaseException) -> str:
    """What happened to a rank, in one line, with the remedy if it ran out of memory."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return f"was interrupted: {shortened(error)}."
    is_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    remedy = "Set memory_limit or max_tokens_per_micro_batch lower." if is_memory else "Its traceback says where."
    return f"failed: {shortened(error)}. {remedy}"


def shortened(error: BaseException) -> str:
    """An exception in one line that is not too long."""
    text = " ".join("".join(traceback.format_exception_only(error)).split())
    return text.rstrip(".") if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]}.."


def explain(error: BaseException, line: str) -> None:
    """Has the line stand at the end of the traceback, behind what the network says about it."""
    if hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(line)
    else:
        say(line)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def end_process(line: str) -> None:
    """Prints the line and ends this process."""
    try:
        say(line)
        sys.stdout.flush()
    finally:
        # The main thread waits in a collective, in C++, where no exception reaches it; and an exit with destructors
        # would wait for that collective.
        os._exit(1)


def end_later(seconds: float) -> None:
    """Ends the process if it is still there so long after its exit has begun; to be called then.

    The destructors of process groups wait for peers, or for threads that wait for them. Threads of Python do not run
    any more then; that of faulthandler is none.
    """
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
