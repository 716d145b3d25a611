"""What is refused before training; more in `tests/test_trainer.py`, where real trainers can be made of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from hf_mbp import MBPConfig, refusals


def trainer_with(*, fsdp_version: int | None = None, config: MBPConfig | None = None, **sizes: int) -> Any:
    """What refusals look at."""
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version))
    accelerator = SimpleNamespace(
        parallelism_config=SimpleNamespace(**{"tp_size": 1, "cp_size": 1, "sp_size": 1, **sizes}),
        distributed_type=DistributedType.MULTI_GPU,
        state=state,
    )
    return SimpleNamespace(
        args=SimpleNamespace(n_gpu=1, optim="adamw_torch"),
        accelerator=accelerator,
        mbp_config=config or MBPConfig(),
        is_fsdp_enabled=fsdp_version is not None,
        is_deepspeed_enabled=False,
    )


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"cp_size": 2}, {"sp_size": 2}])
def test_parallelism_inside_a_batch(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"does not support context, sequence or tensor parallelism.*Use data"):
        refusals.refuse_unsupported(trainer_with(**sizes))


def test_fsdp_1_and_not_2() -> None:
    with pytest.raises(ValueError, match=r"does not support FSDP 1: .*fsdp_config=\{'version': 2\}"):
        refusals.refuse_unsupported(trainer_with(fsdp_version=1))
    refusals.refuse_unsupported(trainer_with(fsdp_version=2))


def test_a_memory_limit_where_the_budget_cannot_be_sized() -> None:
    config = MBPConfig(max_tokens_per_micro_batch=64, memory_limit="1GiB")
    with pytest.raises(ValueError, match=r"memory_limit='1GiB'.*Leave memory_limit out, and set max_tokens"):
        refusals.refuse_unsupported(trainer_with(fsdp_version=2, config=config))


def test_a_static_graph() -> None:
    trainer = trainer_with()
    trainer.args.ddp_static_graph = True
    with pytest.raises(ValueError, match=r"does not support ddp_static_graph=True: .*Leave it out"):
        refusals.refuse_unsupported(trainer)
