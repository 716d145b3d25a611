"""One of two processes runs out of memory: both run the step again, and its gradient is that of all their rows."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.distributed import recovery_worker
from tests.distributed.launching import launch
from tests.helpers import Pad, build, llama_config, relative_error, whole_gradients


@pytest.mark.parametrize("strategy", ["ddp", recovery_worker.END_TO_END, "fsdp2"])
def test_the_gradient_is_that_of_all_rows(strategy: str, tmp_path: Path) -> None:
    ranks = launch("recovery_worker", tmp_path, strategy)
    rows = recovery_worker.ROWS[:16]
    loss, expected = whole_gradients(build(LlamaForCausalLM, llama_config()), lambda model: model(**Pad()(rows)).loss)
    points = recovery_worker.points(strategy)
    assert len(points) == 12
    for name in ("none", *points):
        for rank, outcomes in enumerate(ranks):
            outcome = outcomes[name]
            assert relative_error(expected, outcome["gradients"][0]) < 1e-6, (name, rank)
            assert outcome["logs"][0]["mbp_oom_retries"] == (name != "none"), (name, rank)
            assert outcome["logs"][0]["loss"] == pytest.approx(loss, rel=1e-6)
            assert len(outcome["gradients"]) == 2
        if name != "none":
            assert sorted([outcomes[name]["raised"] or 0 for outcomes in ranks]) == [0, 1], name
