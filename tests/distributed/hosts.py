"""Two hosts on one machine: network namespaces with one link between them, which can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

INTERFACE = "cable"
"""Its name on either host."""

ADDRESSES = ("192.0.2.1", "192.0.2.2")
"""Of the block that is kept for documentation; they exist inside the namespaces only."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Names of the two namespaces."""

    names: tuple[str, str]

    def on(self, host: int, command: list[str]) -> list[str]:
        """The command, to be run on a host."""
        return [program(), "netns", "exec", self.names[host], *command]

    def set_link(self, state: str) -> None:
        """Cuts the link (`down`), or puts it back (`up`)."""
        ip("-n", self.names[0], "link", "set", "dev", INTERFACE, state)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Has two hosts that reach each other, and nothing else.

    Raises:
        PermissionError: this machine, or this user, cannot have network namespaces.
    """
    names = (f"hf_mbp_{os.getpid()}_0", f"hf_mbp_{os.getpid()}_1")
    made: list[str] = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ends = [("name", INTERFACE, "netns", name) for name in names]
            ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        except OSError as error:
            raise PermissionError(f"no network namespaces here: {error}") from error
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "dev", INTERFACE, "up")
        yield Hosts(names=names)
    finally:
        for name in made:
            ip("netns", "delete", name)


def program() -> str:
    """Where `ip` of iproute2 is, which is often in no path of a user."""
    found = shutil.which("ip", path=os.pathsep.join([os.environ.get("PATH", os.defpath), "/sbin", "/usr/sbin"]))
    if found is None:
        raise FileNotFoundError("there is no program ip (package iproute2)")
    return found


def ip(*words: str) -> None:
    """Runs `ip`; an OSError says what it said."""
    done = subprocess.run([program(), *words], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
