"""What is done to Accelerate and the Trainer for a while, and taken back."""

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from transformers import GPT2LMHeadModel, Trainer

from hf_mbp import compat
from tests.helpers import build, gpt2_config


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


class Parameters:
    """A model that notes how often its parameters are counted."""

    def __init__(self) -> None:
        self.times = 0

    def num_parameters(self, *, exclude_embeddings: bool) -> int:
        self.times += 1
        return 5


class Attentive(Parameters):
    """One that counts its operations itself, with attention."""

    def floating_point_ops(self, inputs: dict[str, torch.Tensor]) -> int:
        rows, width = inputs["input_ids"].shape
        return rows * width * width


class OwnCount(Trainer):
    """A trainer that does."""

    def floating_point_ops(self, inputs: Any) -> int:
        return len(inputs["input_ids"])


MICRO_BATCHES = [{"input_ids": torch.ones(2, 7)}, {"input_ids": torch.ones(3, 4)}]


def operations(trainer_class: type, model: Any, micro_batches: list[dict[str, Any]]) -> int:
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = model
    return compat.operations_of(model, trainer.floating_point_ops, micro_batches)


def test_operations_are_counted_once_for_all_micro_batches() -> None:
    model = Parameters()
    assert operations(Trainer, model, MICRO_BATCHES) == 6 * (14 + 12) * 5
    assert model.times == 1
    assert operations(Trainer, model, []) == 0
    assert operations(Trainer, model, [{"pixels": torch.ones(2)}]) == 0


def test_own_counts_of_operations_see_the_micro_batches_as_they_are() -> None:
    assert operations(OwnCount, Parameters(), MICRO_BATCHES) == 5
    stock_asks_the_model = compat.operations_of(Attentive(), Attentive().floating_point_ops, MICRO_BATCHES)
    assert stock_asks_the_model == 2 * 49 + 3 * 16


@pytest.mark.parametrize("is_asked_for", [False, True])
def test_checkpointing_for_a_while_leaves_no_hooks(is_asked_for: bool) -> None:
    """Hooks on embeddings would have frozen layers differentiated, and be one more after every row."""
    model = build(GPT2LMHeadModel, gpt2_config())
    model.transformer.wte.requires_grad_(False)
    model.transformer.wpe.requires_grad_(False)
    if is_asked_for:
        model.enable_input_require_grads()
    tokens = torch.arange(5)[None]
    for _ in range(2):
        with compat.checkpointed(model):
            assert model.transformer.gradient_checkpointing
            model(input_ids=tokens, labels=tokens).loss.backward()
        assert not model.transformer.gradient_checkpointing
        assert model.transformer.wte(tokens).requires_grad is is_asked_for
        assert len(model.transformer.wte._forward_hooks) == is_asked_for
    assert model.transformer.h[0].attn.c_attn.weight.grad is not None
    model.disable_input_require_grads()
    assert not model.transformer.wte(tokens).requires_grad
