"""What has to be known of models that something else has changed; more in `tests/test_compile.py`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_mbp import wrapped
from hf_mbp.lockstep import LeavingOut


def test_elements_of_a_parameter_that_zero_3_has_put_aside() -> None:
    parameter = torch.nn.Parameter(torch.empty(0))
    assert wrapped.num_elements(torch.nn.Parameter(torch.zeros(2, 3))) == 6
    parameter.ds_numel = 12
    assert wrapped.num_elements(parameter) == 12


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("device_ids", [None, [0]])
def test_ddp_reduces_what_lies_in_the_gradients(device_ids: list[int] | None) -> None:
    """With devices, as on a GPU, the wrapper moves its arguments there, and there have to be some."""
    model = torch.nn.Linear(3, 1)
    replicated = torch.nn.parallel.DistributedDataParallel(model)
    replicated.device_ids = device_ids
    reduced = []
    replicated.register_comm_hook(None, lambda _, bucket: _noted(reduced, bucket))
    with replicated.no_sync():
        model(torch.ones(2, 3)).sum().backward()
    before = model.weight.grad.clone()
    wrapped.reduce_gradients(replicated)
    assert torch.equal(model.weight.grad, before)
    assert sum(bucket.numel() for bucket in reduced) == 4
    assert replicated.module is model


def _noted(reduced: list[torch.Tensor], bucket: Any) -> torch.futures.Future[torch.Tensor]:
    reduced.append(bucket.buffer())
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@pytest.mark.usefixtures("alone")
def test_collectives_that_were_made_are_left_out() -> None:
    """Of every kind, and no more of them than were made."""
    one, many = torch.ones(2), [torch.zeros(2)]

    def collectives() -> None:
        torch.distributed.all_reduce(one)
        torch.distributed.all_gather(many, one)
        torch.distributed.reduce_scatter(one, [one])
        torch.distributed.broadcast(one, 0)
        torch.distributed.scatter(one, [one])
        torch.distributed.gather(one, many)
        torch.distributed.barrier()

    before = wrapped.sequence_numbers()
    collectives()
    made = sum(wrapped.sequence_numbers().values()) - sum(before.values())
    assert made == 7
    with LeavingOut(before):
        collectives()
        assert sum(wrapped.sequence_numbers().values()) - sum(before.values()) == made
        torch.distributed.all_reduce(one)
    assert sum(wrapped.sequence_numbers().values()) - sum(before.values()) == made + 1
