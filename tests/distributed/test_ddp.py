"""Two processes under DistributedDataParallel give the gradient of plain PyTorch on both their rows."""

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.distributed import precision_worker
from tests.distributed.launching import launch
from tests.distributed.worker import rows_of
from tests.helpers import (
    Pad,
    build,
    llama_config,
    relative_error,
    whole_gradients,
)


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradients_and_loss_are_those_of_all_rows(accumulation: int, tmp_path: Path) -> None:
    ranks = launch("worker", tmp_path, accumulation, "dense")
    model, rows = build(LlamaForCausalLM, llama_config()), rows_of("dense")
    whole_loss, expected = whole_gradients(model, lambda m: m(**Pad()(rows[:16])).loss)
    for rank in ranks:
        assert len(rank["gradients"]) == 2
        assert relative_error(expected, rank["gradients"][0]) < 3e-6
    log = ranks[0]["logs"][0]
    assert log["loss"] == pytest.approx(whole_loss, rel=1e-6)
    assert log["mbp_micro_batches"] >= 2
    assert log["mbp_tokens"] == sum(len(row["input_ids"]) for row in rows[:16])


def test_a_rank_without_items_and_a_loss_that_divides_by_them(tmp_path: Path) -> None:
    """Fillers and micro-batches without items run at weight zero; divided by zero items they would be NaN."""
    ranks = launch("worker", tmp_path, 1, "sparse")
    model, rows = build(LlamaForCausalLM, llama_config()), rows_of("sparse")
    expected = whole_gradients(model, lambda m: m(**Pad()(rows[:16])).loss)[1]
    for rank in ranks:
        assert relative_error(expected, rank["gradients"][0]) < 3e-6


def test_a_loop_without_a_trainer(tmp_path: Path) -> None:
    """13 rows on one rank, 3 on the other, some without labels."""
    ranks = launch("loop_worker", tmp_path)
    rows = rows_of("sparse")[:16]
    whole_loss, expected = whole_gradients(
        build(LlamaForCausalLM, llama_config()), lambda model: model(**Pad()(rows)).loss
    )
    for rank in ranks:
        assert relative_error(expected, rank["gradients"]) < 3e-6
        assert rank["report"]["loss"] == pytest.approx(whole_loss, rel=1e-6)
        assert rank["report"]["num_items"] == sum(label != -100 for row in rows for label in row["labels"][1:])
    assert ranks[0]["report"]["num_micro_batches"] > 3


def test_sums_in_float32_are_closer_to_the_gradient_in_float32(tmp_path: Path) -> None:
    """Each rank runs 32 micro-batches of one row; the last one reduces what all have added up to."""
    ranks = launch("precision_worker", tmp_path)
    model, rows = build(LlamaForCausalLM, llama_config()).bfloat16().float(), precision_worker.rows_of()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    for name in ("loop", "trainer 1", "trainer 4"):
        plain, summed = (
            [{key: value.float() for key, value in rank[f"{name} {in_fp32}"].items()} for rank in ranks]
            for in_fp32 in (False, True)
        )
        assert relative_error(summed[0], summed[1]) == 0
        assert relative_error(expected, summed[0]) < 0.8 * relative_error(expected, plain[0])
