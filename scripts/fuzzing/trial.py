"""One input, tried: how it ended, what it said, and whether it left anything where it should not."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState

from hf_mbp.cli.errors import MISTAKE

Run = Callable[[], "int | None"]


class Ending(Enum):
    """How a trial can end; the last three are failures."""

    ACCEPTED = "accepted"
    REFUSED = "refused in one line"
    UNCLEAR = "refused, but not told what or where"
    TRACEBACK = "exception or failed run"
    WROTE = "wrote or connected elsewhere"

    @property
    def is_failure(self) -> bool:
        """Whether something has to be mended."""
        return self not in (Ending.ACCEPTED, Ending.REFUSED)


class WorkBegins(BaseException):
    """Raised where all that was fed in has been read, and what would come next is work. Nothing catches it."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What is fed in: words of a command line, and files beside it."""

    argv: tuple[str, ...] = ()
    files: Mapping[str, bytes] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Puts the files into a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How an input ended, and what was said."""

    ending: Ending
    said: str


class Guard:
    """Notes what Python code of this process opens for writing, makes, moves or deletes, and whom it connects to.

    Compiled code that opens files by itself is not seen; what it does is looked for in the folder of the trial.
    """

    EVENTS: Mapping[str, tuple[tuple[int, int | None], ...]] = {
        "os.mkdir": ((0, 2),),
        "os.remove": ((0, 1),),
        "os.rmdir": ((0, 1),),
        "os.rename": ((0, 2), (1, 3)),
        "os.link": ((1, 3),),
        "os.symlink": ((1, 2),),
        "os.truncate": ((0, None),),
        "os.chmod": ((0, 2),),
        "socket.connect": ((1, None),),
    }
    """What the interpreter tells of, and which of its arguments are places, each with the folder it is relative to."""

    def __init__(self) -> None:
        self._allowed: tuple[str, ...] = ()
        self._is_on = False
        self.elsewhere: list[str] = []
        sys.addaudithook(self._hear)

    @contextlib.contextmanager
    def watching(self, *allowed: Path) -> Iterator[None]:
        """A context in which nothing may be written but below these folders."""
        self._allowed, self.elsewhere, self._is_on = tuple(f"{folder}/" for folder in allowed), [], True
        try:
            yield
        finally:
            self._is_on = False

    def _hear(self, event: str, values: tuple[Any, ...]) -> None:
        if not self._is_on:
            return
        places = self.EVENTS.get(event, ())
        if event == "open" and isinstance(values[2], int) and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            places = ((0, None),)
        for place, folder in places:
            self._note(event, values[place], -1 if folder is None else values[folder])

    def _note(self, event: str, where: Any, folder: int) -> None:
        if isinstance(where, int):  # a file that is open already
            return
        if not isinstance(where, (str, bytes, os.PathLike)):
            self.elsewhere.append(f"{event} {where}")
            return
        base = os.getcwd() if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        path = os.path.normpath(os.path.join(base, os.fsdecode(where)))
        # below /proc the peak of memory is read anew by writing
        if not f"{path}/".startswith((*self._allowed, "/dev/null/", "/proc/self/")):
            self.elsewhere.append(f"{event} {path}")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where trials are made, one after the other, each in a folder of its own below `scratch`."""

    scratch: Path
    guard: Guard
    is_clear: Callable[[str, Input], bool]

    def trial(self, tried: Input, run: Run, *, may_write: tuple[str, ...] = ()) -> Trial:
        """Runs what takes the input; `may_write` are folders beside its files."""
        folder = self.scratch / "trial"
        tried.write(folder)
        before = _listed(folder)
        allowed = [self.scratch / "cache", self.scratch / "temporary", *(folder / name for name in may_write)]
        try:
            with _as_it_was(folder, self.scratch / "temporary"), self.guard.watching(*allowed):
                code, said = _caught(run)
            new = [name for name in _listed(folder) - before if not name.startswith(may_write or ("\0",))]
        finally:
            shutil.rmtree(folder)
        elsewhere = [*self.guard.elsewhere, *new]
        if elsewhere:
            return Trial(ending=Ending.WROTE, said=f"{said}\n{elsewhere[:5]}")
        return Trial(ending=self._ending(code, said, tried), said=said)

    def _ending(self, code: int | None, said: str, tried: Input) -> Ending:
        if code == 0:
            return Ending.ACCEPTED
        is_asked = any(word.startswith(("--debug_traceback", "--debug-traceback")) for word in tried.argv)
        if code != MISTAKE or ("Traceback (most recent call last)" in said and not is_asked):
            return Ending.TRACEBACK
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        return Ending.REFUSED if len(errors) == 1 and self.is_clear(errors[0], tried) else Ending.UNCLEAR


def _listed(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def _caught(run: Run) -> tuple[int | None, str]:
    """The exit code, and what was said; `None` for an exception."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # as a terminal, which takes no halves of characters
    said = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            code = run() or 0
        except WorkBegins:
            code = 0
        except (Exception, SystemExit) as error:
            return None, f"{said.getvalue()}\n{type(error).__name__}: {error}"
    return code, said.getvalue()


@contextlib.contextmanager
def inside(folder: str | Path) -> Iterator[None]:
    """A context with another working directory."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextlib.contextmanager
def _as_it_was(folder: Path, temporary: Path) -> Iterator[None]:
    """Runs in a folder, and then puts back what libraries change in a process."""
    environment, temporary_before = dict(os.environ), tempfile.tempdir
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    try:
        with inside(folder):
            yield
    finally:
        tempfile.tempdir = temporary_before
        os.environ.clear()
        os.environ.update(environment)
        AcceleratorState._reset_state()
        PartialState._reset_state()
