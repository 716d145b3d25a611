"""What memory a device has for this process, under limits of the machine, of its groups and of the address space."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hf_mbp import device_memory
from hf_mbp.out_of_memory import unused_heap_bytes
from tests.examples import examples

quick = examples(100)

CPU = torch.device("cpu")
KILO = 1000  # elements of float32: 4,000 bytes


def test_an_address_space_limit_bounds_what_is_free() -> None:
    script = """
        import resource, psutil, torch
        from hf_mbp import device_memory, memory
        GIB = 2**30
        cpu = torch.device("cpu")
        unlimited = device_memory.free_memory(cpu)
        limit = psutil.Process().memory_info().vms + GIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        most = min(GIB + 2**24, unlimited)  # the heap has some free blocks
        assert 0.9 * GIB < device_memory.free_memory(cpu) <= most, device_memory.free_memory(cpu)
        assert device_memory.total_memory(cpu) == min(limit, psutil.virtual_memory().total)
        kept = torch.ones(2**27)
        assert device_memory.free_memory(cpu) <= GIB // 2 + 2**24, device_memory.free_memory(cpu)
        assert memory.room_for_training(cpu, None, 1000).activation_bytes <= 0.9 * (GIB // 2 + 2**24)
        try:
            torch.ones(device_memory.free_memory(cpu) // 4 + 2**24)
        except RuntimeError as error:
            print("what is not free cannot be had:", error)
    """
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert "cannot be had: " in done.stdout, done.stderr


@pytest.mark.skipif(unused_heap_bytes() == 0, reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("is_limited", "said", "leave"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"MALLOC_MMAP_THRESHOLD_": str(2**24)}, False),
        (True, {"GLIBC_TUNABLES": f"glibc.malloc.mmap_threshold={2**24}"}, False),
    ],
)
def test_freed_tensors_leave_a_limited_address_space(is_limited: bool, said: dict[str, str], leave: bool) -> None:
    """glibc, which has learned from larger ones, would take them from the heap, where a block in use pins them."""
    script = f"""
        import resource, psutil, torch
        from hf_mbp import device_memory, memory
        MIB = 2**20
        if {is_limited}:
            limit = psutil.Process().memory_info().vms + 1024 * MIB
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        device_memory.keep_address_space_free()
        for _ in range(3):
            torch.ones(7 * MIB)  # 28 MiB, freed at once: from here on smaller ones would come from the heap
        before = psutil.Process().memory_info().vms
        tensors = [(torch.ones(MIB // 2), torch.ones(2**14)) for _ in range(100)]  # of 2 MiB, small ones between
        small = [two for _, two in tensors]
        del tensors
        print("kept:", psutil.Process().memory_info().vms - before > 150 * MIB)
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env={**os.environ, **said}, capture_output=True, text=True, timeout=60)  # noqa: S603
    assert f"kept: {not leave}" in done.stdout, done.stderr


@pytest.mark.skipif(unused_heap_bytes() == 0, reason="the C library does not tell what it keeps")
def test_freed_blocks_of_the_heap_are_free_under_an_address_space_limit() -> None:
    """They keep their address space: a block in use above them pins the heap."""
    script = """
        import resource, psutil, torch
        from hf_mbp import device_memory, memory
        MIB, cpu = 2**20, torch.device("cpu")
        limit = psutil.Process().memory_info().vms + 400 * MIB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        before = device_memory.free_memory(cpu)
        small = [torch.ones(2**14) for _ in range(3200)]  # 200 MiB, from the heap
        assert device_memory.free_memory(cpu) < before - 190 * MIB
        held = psutil.Process().memory_info().vms
        small = small[-1]
        assert psutil.Process().memory_info().vms > held - 50 * MIB, "the heap has shrunk: this shows nothing"
        assert device_memory.free_memory(cpu) > before - 20 * MIB
        print("free again")
    """
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60
    )
    assert "free again" in done.stdout, done.stderr


@pytest.fixture
def control_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Writes the files of the control group `at`, of version 2; `None` for a file that is not there."""
    monkeypatch.setattr(device_memory, "_GROUP_ROOT", tmp_path)
    monkeypatch.setattr(device_memory, "_GROUPS", tmp_path / "groups of this process")

    def put(limit: str, used: str | None, *, at: str = "", statistics: str | None = None) -> None:
        folder = tmp_path / at
        folder.mkdir(parents=True, exist_ok=True)
        is_first_version = at.startswith("memory")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first_version else MEMORY_FILES
        for name, text in zip((*names, "memory.stat"), (limit, used, statistics), strict=True):
            if text is not None:
                (folder / name).write_text(f"{text}\n")

    return put


MEMORY_FILES = ("memory.max", "memory.current")


@pytest.mark.parametrize(("limit", "used", "free"), [("1000000", "400000", 600_000), ("1000000", "1000001", 0)])
def test_a_control_group_bounds_what_is_free(control_group: Any, limit: str, used: str, free: int) -> None:
    control_group(limit, used)
    assert device_memory.free_memory(CPU) == free
    assert device_memory.total_memory(CPU) == int(limit)


def test_a_control_group_without_a_limit_bounds_nothing(control_group: Any) -> None:
    control_group("max", "400000")
    assert device_memory.free_memory(CPU) > 10**6
    assert device_memory.total_memory(CPU) > 10**6


@pytest.mark.parametrize(
    ("limit", "used"), [("1000000", None), ("", "400000"), ("1000000", "much"), ("-1", "0"), ("\xb2", "0")]
)
def test_what_cannot_be_read_of_a_control_group_is_no_limit(control_group: Any, limit: str, used: str | None) -> None:
    control_group(limit, used)
    assert device_memory._group_limits() == []


def test_without_control_groups_there_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device_memory, "_GROUP_ROOT", tmp_path / "none")
    monkeypatch.setattr(device_memory, "_GROUPS", tmp_path / "none")
    assert device_memory._group_limits() == []


@pytest.mark.parametrize(
    ("statistics", "free"),
    [
        ("anon 7\n\ninactive_file 100000", 700_000),
        ("inactive_file 1\ntotal_inactive_file 200000", 800_000),
        ("inactive_file\nof three words\ninactive_file much", 600_000),
    ],
)
def test_files_that_can_be_forgotten_are_free(control_group: Any, statistics: str, free: int) -> None:
    control_group("1000000", "400000", statistics=statistics)
    assert device_memory.free_memory(CPU) == free


@pytest.mark.parametrize(
    ("groups", "folders", "limits"),
    [
        ("0::/a/b", ["", "a", "a/b", "c"], {1, 2, 3}),
        ("0::/a/b", ["", "a/b"], {1, 2}),
        ("0::/", ["", "a"], {1}),
        ("0::/../../a", ["", "a"], {1}),
        ("0::/not/shown/here", ["", "a"], {1}),
        ("12:cpu,cpuacct:/a\n4:memory:/b:c\n1:name=systemd:/a\n", ["memory", "memory/a", "memory/b:c"], {1, 3}),
        ("3:hugetlb,memory:/a/b\n0::/c", ["memory", "memory/a", "memory/a/b", "c"], {1, 2, 3, 4}),
        ("nonsense", ["", "a"], {1}),
    ],
)
def test_all_groups_up_to_the_root_limit(
    control_group: Any, tmp_path: Path, groups: str, folders: list[str], limits: set[int]
) -> None:
    """Folder number one has a limit of 1,000,001 bytes, and so on."""
    (tmp_path / "groups of this process").write_text(groups)
    for number, folder in enumerate(folders, start=1):
        control_group(str(1_000_000 + number), str(number), at=folder)
    assert sorted(device_memory._group_limits()) == [(1_000_000 + number, number) for number in sorted(limits)]
    assert device_memory.total_memory(CPU) == 1_000_000 + min(limits)


def test_memory_of_the_cpu_is_that_of_the_process() -> None:
    held = psutil.Process().memory_info().rss
    assert device_memory.used_memory(CPU) == pytest.approx(held, rel=0.2)
    assert device_memory.used_memory(CPU) < device_memory.total_memory(CPU)
    if os.uname().sysname == "Linux":
        assert device_memory.peak_memory(CPU) >= 0.8 * held
