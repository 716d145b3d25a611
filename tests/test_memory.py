"""What memory there is, what a micro-batch needs, and that a budget keeps to it."""

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
from hf_mbp.byte_sizes import format_bytes, parse_memory_limit
from hf_mbp.memory import (
    DEFAULT_FRACTION,
    AllocationTracker,
    measure_activations,
    pending_training_bytes,
    room_for_training,
)
from hf_mbp.out_of_memory import unused_heap_bytes
from tests.examples import examples

quick = examples(100)

CPU = torch.device("cpu")
KILO = 1000  # elements of float32: 4,000 bytes


# parse_memory_limit


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (None, None),
        (0.8, 0.8),
        ("0.8", 0.8),
        (".5", 0.5),
        (1, 1.0),
        (1.0, 1.0),
        ("20GiB", 20 * 2**30),
        ("20 gib", 20 * 2**30),
        ("20Gi", 20 * 2**30),
        ("20GB", 20 * 10**9),
        ("20G", 20 * 10**9),
        ("1.5 MiB", 3 * 2**19),
        ("0.5GB", 5 * 10**8),
        ("500 KB", 500_000),
        ("1TiB", 2**40),
        ("1B", 1),
        ("1234567", 1234567),
        (10**9, 10**9),
        (1e9, 10**9),
        (" 7 MB ", 7 * 10**6),
    ],
)
def test_sizes_and_fractions(value: Any, limit: Any) -> None:
    parsed = parse_memory_limit(value)
    assert parsed == limit
    assert type(parsed) is type(limit)


@pytest.mark.parametrize(
    "value",
    [
        "much",
        "",
        "GiB",
        "20iB",
        "20 GiBs",
        "20PiB",
        "-1GiB",
        -0.5,
        0,
        "0",
        "0GiB",
        "0.2B",
        "1,5GiB",
        True,
        20,
        1.5,
        float("nan"),
        float("inf"),
        "1e400GiB",
        "1e400",
    ],
)
def test_what_is_no_limit_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="is neither a size nor a fraction") as error:
        parse_memory_limit(value)
    assert f"memory_limit={value!r}" in str(error.value)
    assert 'Write for example memory_limit="20GiB"' in str(error.value)


# AllocationTracker


def test_tensors_count_while_they_live() -> None:
    with AllocationTracker() as tracker:
        first = torch.zeros(KILO)
        assert tracker.live_bytes == 4000
        second = first + 1
        assert tracker.live_bytes == 8000
        del first
        assert tracker.live_bytes == 4000
        del second
        assert tracker.live_bytes == 0
    assert tracker.peak_bytes == 8000


def test_peak_is_the_most_at_once_and_not_the_sum() -> None:
    with AllocationTracker() as tracker:
        for _ in range(50):
            torch.zeros(KILO)
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 4000)


def test_tensors_from_before_do_not_count() -> None:
    existing, other = torch.zeros(KILO), torch.ones(KILO)
    with AllocationTracker() as tracker:
        existing.add_(1).mul_(other)
        torch.add(existing, other, out=existing)
        existing.view(10, -1).detach().t()
        existing[10:20] = 5
        existing.zero_()
        torch._foreach_add_([existing], [other])
    assert (tracker.live_bytes, tracker.peak_bytes) == (0, 0)


def test_views_share_the_bytes_of_their_tensor() -> None:
    with AllocationTracker() as tracker:
        view = torch.zeros(KILO)[:10]
        assert tracker.live_bytes == 4000
        del view
        assert tracker.live_bytes == 0


def test_tensors_that_only_autograd_holds_count() -> None:
    weight = torch.ones(KILO, requires_grad=True)
    with AllocationTracker() as tracker:
        loss = weight.exp().exp().sum()
        assert tracker.live_bytes == 2 * 4000 + 4
        del loss
        assert tracker.live_bytes == 0


def test_all_results_of_an_operator_count() -> None:
    with AllocationTracker() as tracker:
        halves = torch.zeros(KILO).sort()
        assert tracker.peak_bytes == 4000 + 4000 + 8000
        assert halves[1].dtype == torch.int64


def test_adding_to_a_gradient_that_exists_needs_one_tensor_more() -> None:
    weight = torch.ones(KILO, requires_grad=True)
    weight.grad = torch.zeros(KILO)
    with AllocationTracker() as tracker:
        (weight * 2).sum().backward()
        assert tracker.live_bytes == 0
    assert weight.grad.tolist() == [2.0] * KILO


@pytest.mark.parametrize("depth", [1, 5, 20])
def test_activations_of_a_chain_grow_with_its_depth(depth: int) -> None:
    weight = torch.full((KILO,), 0.01, requires_grad=True)
    weight.grad = torch.zeros(KILO)

    def run() -> None:
        values = weight
        for _ in range(depth):
            values = values.sigmoid()
        values.sum().backward()

    assert depth * 4000 <= measure_activations(run) <= (depth + 3) * 4000


def test_nothing_is_counted_after_an_error() -> None:
    tracker = AllocationTracker()
    with pytest.raises(ZeroDivisionError), tracker:
        1 / 0  # noqa: B018
    kept = torch.zeros(KILO)
    assert tracker.live_bytes == 0
    del kept


def test_sparse_gradients_do_not_stop_the_count() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    assert measure_activations(lambda: embedding(torch.tensor([1, 2])).sum().backward()) > 0


# What there is


@pytest.fixture
def device_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    def put(total: int, used: int, free: int) -> None:
        for name, value in (("total_memory", total), ("used_memory", used), ("free_memory", free)):
            monkeypatch.setattr(device_memory, name, lambda device, value=value: value)

    return put


@pytest.mark.parametrize(
    ("limit", "pending", "room"),
    [
        (None, 0, DEFAULT_FRACTION * 600),
        (None, 40, DEFAULT_FRACTION * 600 - 40),
        (0.5, 0, 0.5 * 1000 - 300),
        (0.5, 150, 0.5 * 1000 - 300 - 150),
        (1.0, 0, 600),
        (450, 0, 450 - 300),
        (450, 149, 1),
        (10**6, 10, 600 - 10),
    ],
)
def test_room_is_the_limit_less_what_is_taken(
    device_with: Any, limit: float | int | None, pending: int, room: float
) -> None:
    device_with(1000, 300, 600)
    assert room_for_training(CPU, limit, pending).activation_bytes == int(room)


@pytest.mark.parametrize(
    ("limit", "pending", "named", "remedy"),
    [
        (300, 0, "memory_limit=300 B", "Raise memory_limit above 300 B"),
        (450, 150, "memory_limit=450 B", "Raise memory_limit above 450 B"),
        (450, 700, "memory_limit=450 B", "Free some of it"),
        (0.1, 0, "memory_limit=0.1", "Raise memory_limit above 300 B"),
        (None, 600, f"memory_limit is not set, which is {DEFAULT_FRACTION} of what is free", "Free some of it"),
    ],
)
def test_no_room_is_an_error_that_names_what_takes_it(
    device_with: Any, limit: Any, pending: int, named: str, remedy: str
) -> None:
    device_with(1000, 300, 600)
    with pytest.raises(ValueError, match="no memory is left for activations on cpu") as error:
        room_for_training(CPU, limit, pending)
    message = str(error.value)
    assert message.startswith(f"{named}: no memory")
    assert "This process holds 300 B, 600 B are free" in message
    assert f"gradients and optimizer states will take {pending} B more" in message
    assert f"{remedy}, or take a smaller model" in message


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


# What training will take


def parameters(*sizes: int, **options: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(size), **options) for size in sizes]


def test_gradients_and_two_optimizer_states_are_pending() -> None:
    assert pending_training_bytes(parameters(10, 5), None) == 15 * 4 * 3


def test_frozen_parameters_need_nothing() -> None:
    assert pending_training_bytes([*parameters(10), *parameters(1000, requires_grad=False)], None) == 10 * 4 * 3


def test_gradients_that_exist_are_not_pending() -> None:
    weight, other = parameters(10, 5)
    weight.grad = torch.zeros(10)
    assert pending_training_bytes([weight, other], None) == 5 * 4 + 15 * 4 * 2


def test_states_that_exist_are_not_pending() -> None:
    (weight,) = parameters(10)
    optimizer = torch.optim.AdamW([weight])
    assert pending_training_bytes([weight], optimizer) == 10 * 4 * 3
    weight.sum().backward()
    optimizer.step()
    assert pending_training_bytes([weight], optimizer) == 0
    optimizer.zero_grad()
    assert pending_training_bytes([weight], optimizer) == 10 * 4


def test_half_precision_takes_half() -> None:
    half = [torch.nn.Parameter(torch.ones(10, dtype=torch.bfloat16))]
    assert pending_training_bytes(half, None) == 10 * 2 * 3


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (5 * 2**40, "5120.0 GiB")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_bytes(size) == text
