"""Where one rank fails, all end soon, with the cause named; a rank that is only slow is waited for.

The ranks are started one by one, as by SLURM or mpirun, so that nothing but the library can end them.
"""

import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.distributed.failing_worker import train_as_rank
from tests.distributed.launching import fork_server, run

TIMEOUT = 8.0
"""The `rank_timeout` of most runs, in seconds; long enough for a machine with other work to do."""
SECONDS = 120
"""A time limit, for processes that are not ended; `ddp_timeout`, half an hour, is much longer."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Processes that train together, and the files that they print to."""

    processes: list[BaseProcess]
    folder: Path

    def wait(self, *ranks: int) -> None:
        """Until these ranks have ended; fails if they do not."""
        end = time.monotonic() + SECONDS
        for rank in ranks:
            self.processes[rank].join(max(0.1, end - time.monotonic()))
            assert self.processes[rank].exitcode is not None, f"rank {rank} goes on.\n{self.output(rank)[-2000:]}"

    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        file = self.folder / f"output{rank}"
        return file.read_text() if file.exists() else ""

    def line(self, rank: int) -> str:
        """What the library says on a rank about the failure of another."""
        (line,) = [line for line in self.output(rank).splitlines() if line.startswith("hf_mbp: rank ")]
        return line


Start = Callable[..., Ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts ranks; those that are left at the end of the test are killed."""
    context = fork_server()
    processes: list[BaseProcess] = []

    def start_ranks(way: str, *, failing: int, num_ranks: int = 2, seconds: float = TIMEOUT) -> Ranks:
        port = free_port()
        for rank in range(num_ranks):
            arguments = (rank, num_ranks, port, tmp_path, way, failing, seconds)
            processes.append(context.Process(target=train_as_rank, args=arguments))
            processes[-1].start()
        return Ranks(processes=processes, folder=tmp_path)

    yield start_ranks
    for process in processes:
        process.kill()
        process.join(SECONDS)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.parametrize(("failing", "others"), [(0, [1, 2]), (1, [0, 2])])
def test_an_exception_ends_the_others_with_its_text(start: Start, failing: int, others: list[int]) -> None:
    """Also on rank 0, whose process takes the store, where the others read of it, with it."""
    ranks = start("exception", failing=failing, num_ranks=3)
    ranks.wait(0, 1, 2)
    assert ranks.exit_codes() == [1, 1, 1]
    assert "LookupError: the cause" in ranks.output(failing)
    assert "Traceback" in ranks.output(failing)
    for rank in others:
        assert ranks.line(rank).startswith(f"hf_mbp: rank {failing} (process {ranks.processes[failing].pid} on ")
        assert ranks.line(rank).endswith(
            f" failed: LookupError: the cause. Its traceback says where. Rank {rank} ends, too."
        )


@pytest.mark.parametrize("way", ["stays", "stays in an evaluation"])
def test_a_process_that_lives_on_after_its_exception_ends_the_others(start: Start, way: str) -> None:
    """Its connections stay open, so the others wait in their collective, where no exception reaches them."""
    ranks = start(way, failing=1)
    ranks.wait(0)
    assert ranks.exit_codes() == [1, None]
    assert "failed: LookupError: the cause." in ranks.line(0)
    assert "Traceback" not in ranks.output(0)


def test_without_a_timeout_they_wait(start: Start) -> None:
    """What the test before rests on: nothing else ends them."""
    ranks = start("stays", failing=1, seconds=0)
    end = time.monotonic() + SECONDS
    while not (ranks.folder / "stays").exists():
        assert time.monotonic() < end, ranks.output(1)
        time.sleep(0.1)
    ranks.processes[0].join(TIMEOUT)
    assert ranks.exit_codes() == [None, None]


def test_want_of_memory_ends_the_others_with_the_remedy(start: Start) -> None:
    ranks = start("memory", failing=1)
    ranks.wait(0, 1)
    assert ranks.exit_codes() == [1, 1]
    assert "can't allocate memory" in ranks.output(1)
    assert ranks.line(0).startswith("hf_mbp: rank 1 (process ")
    assert "can't allocate memory" in ranks.line(0)
    assert ranks.line(0).endswith("Set memory_limit or max_tokens_per_micro_batch lower. Rank 0 ends, too.")


def test_a_rank_that_nothing_fits_on_ends_all(start: Start) -> None:
    ranks = start("starved", failing=1)
    ranks.wait(0, 1)
    assert ranks.exit_codes() == [1, 1]
    assert "does not fit the memory by itself, with activation checkpointing (DefaultCPUAllocator" in ranks.output(1)
    assert "Process 1 has a row that does not fit its memory; it says which." in ranks.output(0)


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_a_rank_that_is_gone_ends_the_others(start: Start, way: str) -> None:
    """Killed, its connections break, which the network reports as a failure of theirs; stopped, they do not."""
    ranks = start(way, failing=1, num_ranks=3)
    ranks.wait(0, 2)
    assert ranks.exit_codes() == [1, -9 if way == "killed" else None, 1]
    for rank in (0, 2):
        assert ranks.line(rank).startswith(f"hf_mbp: rank 1 (process {ranks.processes[1].pid} on ")
        assert "has given no sign of life for 5 s: its process was killed or suspended" in ranks.line(rank)


@pytest.mark.parametrize("way", ["killed", "stopped"])
def test_rank_0_with_the_store_that_is_gone_ends_the_others(start: Start, way: str) -> None:
    ranks = start(way, failing=0, num_ranks=3)
    ranks.wait(1, 2)
    assert ranks.exit_codes() == [-9 if way == "killed" else None, 1, 1]
    for rank in (1, 2):
        assert ranks.line(rank).startswith("hf_mbp: rank 0, with which the ranks keep in touch")
        assert "has given no sign of life for 5 s: its process was killed or suspended" in ranks.line(rank)


@pytest.mark.parametrize("way", ["asleep", "busy"])
def test_a_rank_that_is_slow_is_waited_for(start: Start, way: str) -> None:
    """For longer than `rank_timeout`, while its thread gives signs of life."""
    ranks = start(way, failing=1, seconds=5.0)
    ranks.wait(0, 1)
    assert ranks.exit_codes() == [0, 0], ranks.output(0)[-4000:]
    assert "hf_mbp: rank" not in ranks.output(0) + ranks.output(1)


def test_a_rank_that_leaves_on_purpose_does_not_end_the_others(start: Start) -> None:
    """`sys.exit(0)` in a callback, before another rank has saved."""
    ranks = start("leaves", failing=1, seconds=5.0)
    ranks.wait(0, 1)
    assert ranks.exit_codes() == [0, 0], ranks.output(0)[-4000:]
    assert "hf_mbp: rank" not in ranks.output(0) + ranks.output(1)


def test_under_a_launcher(tmp_path: Path) -> None:
    """The launcher ends the other rank itself, maybe before it has read why; the cause is told all the same."""
    code, errors = run("failing_worker", tmp_path, "exception", 1, TIMEOUT)
    assert code == 1
    assert "[rank1]: LookupError: the cause" in errors
