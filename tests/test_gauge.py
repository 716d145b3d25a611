"""The peak of a step is read by itself, and the peak of the run is not lost by that."""

import sys
from pathlib import Path

import psutil
import pytest
import torch

from hf_mbp import device_memory
from hf_mbp.gauge import Gauge

CPU = torch.device("cpu")
SIZE = 64 * 2**20

linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak of a step is read from /proc")


@linux
def test_a_peak_counts_from_the_restart_on() -> None:
    gauge = Gauge(CPU)
    gauge.release()
    torch.ones(3 * SIZE // 4)
    gauge.restart()
    before = gauge.held_bytes()
    assert gauge.peak_bytes() - before < SIZE
    torch.ones(SIZE // 4)
    assert 0.9 * SIZE < gauge.peak_bytes() - before < 1.5 * SIZE
    assert device_memory.peak_memory(CPU) - before > 2 * SIZE


@linux
def test_what_is_resident_is_what_psutil_says() -> None:
    kept = torch.ones(SIZE // 4)
    assert device_memory.used_memory(CPU) == pytest.approx(psutil.Process().memory_info().rss, rel=0.01)
    before = device_memory.used_memory(CPU)
    more = torch.ones(SIZE // 4)
    assert SIZE * 0.9 < device_memory.used_memory(CPU) - before < SIZE * 1.5
    assert kept.numel() == more.numel()


@linux
def test_a_look_between_micro_batches_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    files: list[str] = []
    monkeypatch.setattr(psutil, "Process", None)
    monkeypatch.setattr(Path, "read_bytes", lambda path: files.append(str(path)) or read(path))
    Gauge(CPU).tidy(0, 2**60)
    assert files == ["/proc/self/statm"]


def test_a_device_that_cannot_be_read_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_CLEAR_PEAK", Path("/nowhere"))
    gauge = Gauge(CPU)
    gauge.restart()
    assert gauge.peak_bytes() == 0
    assert gauge.held_bytes() > 0


def test_memory_is_given_back_only_if_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    gauge, calls = Gauge(CPU), []
    monkeypatch.setattr(gauge, "release", lambda: calls.append(1))
    monkeypatch.setattr(device_memory, "held_memory", lambda device: 500)
    gauge.tidy(400, 1000)
    assert not calls
    gauge.tidy(300, 1000)
    assert calls


class Allocator:
    """What torch says of a GPU whose allocator has reserved `reserved` bytes; of them 700 were used at the peak."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reserved = self.most = 0
        self.releases = 0
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.most)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 700)
        monkeypatch.setattr(torch.cuda, "empty_cache", self.release)

    def take(self, reserved: int) -> None:
        self.reserved = reserved
        self.most = max(self.most, reserved)

    def release(self) -> None:
        self.reserved = 400
        self.releases += 1


def test_a_gpu_gives_back_what_is_unused_near_the_limit_once_and_not_at_every_micro_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    allocator, gauge = Allocator(monkeypatch), Gauge(torch.device("cuda"))
    for reserved, releases in ((850, 0), (950, 1), (500, 1), (850, 1), (950, 2)):
        allocator.take(reserved)
        gauge.tidy(400, 1000)
        assert allocator.releases == releases


def test_processes_of_a_machine_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "_group_limits", lambda: [(8000, 2000)])
    assert device_memory.free_memory(CPU) == 6000
    assert device_memory.total_memory(CPU) == 8000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert device_memory.free_memory(CPU) == 2000
    monkeypatch.setattr(device_memory, "_own_limits", lambda: [(5000, 4000)])
    assert device_memory.free_memory(CPU) == 1000
    assert device_memory.total_memory(CPU) == 8000 // 3
