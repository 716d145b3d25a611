"""What training may take of a device, and what a pass takes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_mbp import device_memory
from hf_mbp.memory import (
    DEFAULT_FRACTION,
    AllocationTracker,
    measure_activations,
    pending_training_bytes,
    room_for_training,
)
from tests.examples import examples

quick = examples(100)

CPU = torch.device("cpu")
KILO = 1000  # elements of float32: 4,000 bytes


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


# Room for training


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
