"""The watch over the other ranks, turn by turn and without waiting: several watches in one process, on one store."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import FileStore, HashStore

from hf_mbp import MBPConfig
from hf_mbp import watch as watch_module
from hf_mbp.watch import GRACE_TICKS, SILENT_TICKS, TICKS, Watch, cause_of, watched_ranks

ROOT = Path(__file__).parents[1]
GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:13220."


class Group:
    """Watches of ranks that share a store; `ended` holds the ranks that were ended, and with which line."""

    def __init__(self, store: Any, num_ranks: int, seconds: float = 0.1) -> None:
        self.ended: dict[int, str] = {}
        self.watches = [
            Watch(store, rank, num_ranks, seconds=seconds, end=lambda line, rank=rank: self.ended.update({rank: line}))
            for rank in range(num_ranks)
        ]

    def turns(self, number: int, ranks: list[int]) -> None:
        """So many turns, of these ranks only."""
        for _ in range(number):
            for rank in ranks:
                self.watches[rank].exchange()
            for rank in ranks:
                self.watches[rank].judge()


@pytest.fixture(params=["HashStore", "FileStore"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return HashStore() if request.param == "HashStore" else FileStore(str(tmp_path / "store"), 1)


def test_ranks_that_take_their_turns_are_left_alone(store: Any) -> None:
    group = Group(store, 3)
    group.turns(3 * TICKS, [0, 1, 2])
    assert group.ended == {}


@pytest.mark.parametrize("silent", [0, 1, 2])
def test_a_rank_that_falls_silent_ends_the_others(store: Any, silent: int) -> None:
    group, others = Group(store, 3), [rank for rank in range(3) if rank != silent]
    group.turns(2, [0, 1, 2])
    group.turns(SILENT_TICKS - 1, others)
    assert group.ended == {}
    group.turns(3, others)
    assert sorted(group.ended) == others
    for rank, line in group.ended.items():
        assert line.startswith(f"hf_mbp: rank {silent} (process ")
        assert "has given no sign of life for 0 s: its process was killed or suspended, or its host is gone." in line
        assert line.endswith(f"if it was only slow, raise rank_timeout. Rank {rank} ends, too.")


def test_the_parts_of_a_timeout_add_up() -> None:
    """Silence, a turn until it counts, one until the others read of it, their grace: less than the whole."""
    assert SILENT_TICKS + 2 + GRACE_TICKS <= TICKS


def test_a_rank_that_was_away_accuses_nobody(store: Any) -> None:
    """Suspended (a laptop's sleep), it has had no turns in which it could have heard of the others."""
    group = Group(store, 2)
    group.turns(2, [0, 1])
    group.turns(SILENT_TICKS - 1, [0])  # rank 1 is away, not long enough to be given up
    group.turns(3 * TICKS, [0, 1])
    assert group.ended == {}


def test_a_slow_rank_is_not_accused(store: Any) -> None:
    group = Group(store, 2)
    for _ in range(5):
        group.turns(SILENT_TICKS - 1, [0])
        group.turns(1, [0, 1])
    assert group.ended == {}


def test_a_rank_that_has_not_begun_is_waited_for(store: Any) -> None:
    group = Group(store, 3)
    group.turns(3 * TICKS, [0, 2])
    assert group.ended == {}


def started(group: Group, rank: int) -> Watch:
    watch = group.watches[rank]
    watch.start()
    return watch


def test_a_rank_that_is_done_is_not_waited_for() -> None:
    group = Group(HashStore(), 2)
    started(group, 1).finish()
    group.turns(3 * TICKS, [0])
    assert group.ended == {}


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_ends_the_others_with_its_cause(failing: int) -> None:
    group = Group(HashStore(), 3, seconds=1)
    others = [rank for rank in range(3) if rank != failing]
    group.turns(1, others)
    started(group, failing).fail(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB."))
    group.turns(1, others)
    assert sorted(group.ended) == others
    for rank, line in group.ended.items():
        assert line.startswith(f"hf_mbp: rank {failing} (process ")
        assert line.endswith(
            "failed: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. Set memory_limit or "
            f"max_tokens_per_micro_batch lower. Rank {rank} ends, too."
        )


def test_the_first_failure_is_the_cause() -> None:
    group = Group(HashStore(), 3, seconds=1)
    started(group, 1).fail(ValueError("first"))
    started(group, 2).fail(ValueError("second"))
    group.turns(1, [0])
    assert "rank 1 (process" in group.ended[0]
    assert "failed: ValueError: first. Its traceback says where." in group.ended[0]


def test_a_lost_connection_is_explained_by_the_rank_that_is_gone() -> None:
    """What gloo says comes at once, and would hide the cause if it were told to the others."""
    group = Group(HashStore(), 2, seconds=4)
    group.turns(2, [0])
    error = RuntimeError(GLOO)
    started(group, 1).fail(error)
    assert group.ended == {}
    explained = error.__notes__[0] if hasattr(error, "add_note") else ""
    assert explained.startswith("hf_mbp: rank 0 (process ") or sys.version_info < (3, 11)
    assert "no sign of life" in explained or sys.version_info < (3, 11)


def test_a_connection_that_is_lost_between_ranks_that_live_is_a_failure_in_the_end() -> None:
    group = Group(HashStore(), 2, seconds=1)
    other = started(group, 1)
    started(group, 0).fail(torch.distributed.DistNetworkError("reset"))
    group.turns(1, [1])
    other.finish()
    assert "rank 0 (process" in group.ended[1]
    assert "DistNetworkError: reset." in group.ended[1]


def test_a_rank_that_fails_itself_in_time_is_not_ended() -> None:
    """So that its own traceback is printed, and user code that catches the exception of all ranks goes on."""
    group = Group(HashStore(), 2, seconds=4)
    watches = [started(group, rank) for rank in range(2)]
    for watch in watches:
        watch.fail(ValueError("memory_limit is too low"))
    for watch in watches:
        for thread in watch._threads:
            thread.join(10)
            assert not thread.is_alive()
    assert group.ended == {}


class DeadStore:
    """A store whose host is gone: what is asked never comes back, or the connection breaks."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs, self.is_left = hangs, threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.hangs:
            self.is_left.wait(30)
        raise torch.distributed.DistNetworkError("Broken pipe")


@pytest.mark.parametrize("hangs", [True, False])
def test_a_store_that_is_gone_ends_the_rank(hangs: bool) -> None:
    store = DeadStore(hangs=hangs)
    group, is_ended = Group(store, 2, seconds=0.4), threading.Event()
    watch = group.watches[1]
    watch._end = lambda line: (group.ended.update({1: line}), is_ended.set())
    watch.start()
    try:
        assert is_ended.wait(30)
    finally:
        watch._stop()
        store.is_left.set()
    assert group.ended[1].startswith("hf_mbp: rank 0, with which the ranks keep in touch")
    assert "no sign of life" in group.ended[1]
    assert ("Broken pipe" in group.ended[1]) is not hangs


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("boom"), "failed: RuntimeError: boom. Its traceback says where."),
        (RuntimeError("x" * 1000), f"failed: RuntimeError: {'x' * 286}... Its traceback says where."),
        (
            MemoryError(),
            "failed: MemoryError. Set memory_limit or max_tokens_per_micro_batch lower.",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            "failed: RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes. Set "
            "memory_limit or max_tokens_per_micro_batch lower.",
        ),
        (KeyboardInterrupt(), "was interrupted: KeyboardInterrupt."),
    ],
)
def test_a_cause_is_one_line(error: BaseException, text: str) -> None:
    assert cause_of(error) == text


# When there is a watch


@pytest.mark.parametrize(("num_ranks", "seconds"), [(1, 60.0), (2, 0)])
def test_one_process_or_no_timeout_is_not_watched(
    num_ranks: int, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "Watch", None)
    monkeypatch.setattr("hf_mbp.compat.own_store", lambda name: pytest.fail("not needed"))
    with watched_ranks(num_ranks, seconds):
        pass


def test_each_run_has_keys_of_its_own_and_a_restarted_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr("hf_mbp.compat.own_store", names.append)
    for restart in (None, "1"):
        if restart:
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        for _ in range(2):
            with watched_ranks(2, 60):
                pass
    assert len(set(names)) == 4
    assert [name.split("/")[1] for name in names] == ["0", "0", "1", "1"]


def test_the_default_is_a_minute() -> None:
    assert MBPConfig().rank_timeout == 60


@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), float("inf"), "60", True, None])
def test_a_timeout_is_a_number_of_seconds(value: Any) -> None:
    with pytest.raises(ValueError, match="is no number of seconds from 1 on") as error:
        MBPConfig(rank_timeout=value)
    assert str(error.value).startswith(f"rank_timeout={value!r} is")
    assert "Write for example rank_timeout=60, or rank_timeout=0" in str(error.value)


@pytest.mark.parametrize("value", [0, 1, 2.5, 3600])
def test_timeouts_that_are_taken(value: float) -> None:
    assert MBPConfig(rank_timeout=value).rank_timeout == value


# The end of a process


def run(program: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_ending_a_process_prints_the_line_and_what_was_printed_before() -> None:
    """Though its main thread waits for something that never comes."""
    done = run(
        "import threading\n"
        "from hf_mbp.watch import end_process\n"
        "print('before', end='')\n"
        "threading.Thread(target=end_process, args=('the line',), daemon=True).start()\n"
        "threading.Event().wait()\n"
    )
    assert (done.returncode, done.stdout) == (1, "before")
    assert done.stderr.endswith("the line\n")


def test_an_exit_that_hangs_after_a_failure_is_ended() -> None:
    done = run(
        "import atexit, time\n"
        "from hf_mbp.watch import end_later\n"
        "atexit.register(time.sleep, 100)\n"  # runs behind the other, which is registered later
        "atexit.register(end_later, 1)\n"
        "raise ValueError('the cause')\n"
    )
    assert done.returncode == 1
    assert "ValueError: the cause" in done.stderr
    assert "Timeout (0:00:01)!" in done.stderr
