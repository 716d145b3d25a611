"""What is done to Accelerate and the Trainer for a while, and taken back."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from hf_mbp import compat


class State:
    """Accelerate's gradient state."""

    def __init__(self, **plugin_kwargs: Any) -> None:
        self.plugin_kwargs, self.sync_gradients = plugin_kwargs, True

    def _set_sync_gradients(self, syncs: bool) -> None:
        self.sync_gradients = syncs


class FakeAccelerator:
    """Notes whether gradients are kept from being synchronised."""

    def __init__(self, distributed_type: DistributedType, **plugin_kwargs: Any) -> None:
        self.gradient_state, self.distributed_type = State(**plugin_kwargs), distributed_type
        self.is_deferring = False

    @contextmanager
    def no_sync(self, model: Any) -> Any:
        self.is_deferring = True
        yield
        self.is_deferring = False


@pytest.mark.parametrize(
    ("distributed_type", "options", "defers"),
    [
        (DistributedType.MULTI_GPU, {}, True),
        (DistributedType.MULTI_GPU, {"sync_each_batch": True}, True),  # DDP's gradients are whole anyway
        (DistributedType.FSDP, {"sync_each_batch": True}, False),
        (DistributedType.DEEPSPEED, {"sync_each_batch": True}, True),  # its wrapper would step the optimizer
    ],
)
def test_gradients_stay_on_the_rank_unless_asked_otherwise(
    distributed_type: DistributedType, options: dict[str, Any], defers: bool
) -> None:
    accelerator = FakeAccelerator(distributed_type, **options)
    with compat.local_gradients(accelerator, torch.nn.Linear(1, 1)):
        assert accelerator.is_deferring is defers
        assert accelerator.gradient_state.sync_gradients is not defers
    assert not accelerator.is_deferring
    assert accelerator.gradient_state.sync_gradients
