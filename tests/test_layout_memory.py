"""A budget sized from memory holds for rows laid end to end: no micro-batch takes more than was predicted."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from hf_mbp import MBPTrainer, memory, rehearsal
from hf_mbp.distributed import Ranks
from hf_mbp.gauge import Gauge
from hf_mbp.plan import Budget, Layout
from hf_mbp.pools import Basis, Pooling
from hf_mbp.probe import loss_of
from hf_mbp.profile import Profile, difference, key_of
from hf_mbp.sizing import cost_of, measure_budget
from tests.flash import Kernels, install, with_flash
from tests.helpers import build, gpt2_config, llama_config, mbp_trainer, token_rows, with_labels

LENGTHS = {"low": 100, "high": 300}
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 4096}

MODELS: dict[str, Any] = {
    "llama": lambda: build(LlamaForCausalLM, llama_config(**SIZES)),
    "gpt2": lambda: build(GPT2LMHeadModel, gpt2_config(n_positions=1024, n_embd=64, n_layer=2)),
}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return install(monkeypatch)


def trainer_of(model: Any, layout: Layout, folder: Path) -> MBPTrainer:
    """A trainer of rows with about twice the tokens of the largest micro-batch that is measured."""
    rows = with_labels(token_rows(10, **LENGTHS), lambda index, row: row["input_ids"])
    trainer = mbp_trainer(model.float(), rows, folder, max_tokens_per_micro_batch=None, memory_limit="4GiB")
    trainer.create_optimizer()
    trainer.mbp_rows.layout = layout
    return trainer


def taken(trainer: MBPTrainer) -> int:
    """Bytes of a micro-batch of all rows."""
    (inputs,) = trainer.mbp_rows.collate_arranged([trainer.train_dataset])
    trainer.model.train()
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return memory.measure_activations(lambda: loss_of(trainer, inputs, 1).backward())


def predicted(trainer: MBPTrainer, budget: Budget) -> float:
    """As the planner, and whoever lays the rows, count them together."""
    sizes = trainer.mbp_rows.sizes(trainer.train_dataset)
    if trainer.mbp_rows.layout is Layout.SEGMENTS:
        return float(budget.bytes_of_row(sizes).sum())
    return float(budget.bytes(1, int(sizes.sum())))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_one_long_row(name: str, attention: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.set_attn_implementation(attention)
    trainer = trainer_of(model, Layout.ONE_ROW, tmp_path)
    rows = trainer.train_dataset
    budget = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget
    assert 1 <= predicted(trainer, budget) / taken(trainer) < 1.5


def test_segments(kernels: Kernels, tmp_path: Path) -> None:
    trainer = trainer_of(with_flash(MODELS["llama"]()), Layout.SEGMENTS, tmp_path)
    rows = trainer.train_dataset
    budget = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget
    assert kernels.boundaries
    assert 1 <= predicted(trainer, budget) / taken(trainer) < 2


def test_rows_that_together_are_one_too_long_row_run_in_several(tmp_path: Path) -> None:
    """The plan is made as if they were padded; how much they take is seen when they lie there."""
    trainer = trainer_of(MODELS["llama"](), Layout.ONE_ROW, tmp_path)
    rows = trainer.train_dataset
    sizes = trainer.mbp_rows.sizes(rows)
    budget = measure_budget(trainer, rows, sizes).budget
    capped = Budget(
        max_bytes=float(budget.bytes(1, 900)),
        bytes_per_cell=budget.bytes_per_cell,
        bytes_per_pair=budget.bytes_per_pair,
    )
    pooling = Pooling(trainer, trainer.mbp_rows, Ranks(trainer.accelerator))
    basis = Basis(budget=capped, cost=cost_of(trainer.model, trainer.args.device), step=0)
    micro_batches = pooling.micro_batches([pooling.pool([rows])], basis)
    assert sum(micro_batch.num_rows for micro_batch in micro_batches) == len(rows)
    assert any(micro_batch.num_rows > 1 for micro_batch in micro_batches)
    assert all(micro_batch.cells <= 900 for micro_batch in micro_batches if micro_batch.num_rows > 1)


@pytest.mark.parametrize("layout", [Layout.SEGMENTS, Layout.ONE_ROW])
def test_the_worst_micro_batch_is_tried_as_it_will_run(layout: Layout, kernels: Kernels, tmp_path: Path) -> None:
    model = MODELS["llama"]()
    trainer = trainer_of(with_flash(model) if layout is Layout.SEGMENTS else model, layout, tmp_path)
    rows = trainer.train_dataset
    sizing = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows))
    # As much as one row of twice the longest takes, so that several run together.
    budget = replace(sizing.budget, max_bytes=float(sizing.budget.bytes(1, 600)))
    profile = Profile(key={}, options={}, budget=budget, room=sizing.room)
    worst = rehearsal.worst_of(trainer, rows, profile, cost_of(trainer.model, trainer.args.device))
    assert worst is not None
    assert worst.planned_bytes <= budget.max_bytes
    calls: list[dict[str, Any]] = []
    trainer.model.register_forward_pre_hook(lambda _, __, inputs: calls.append(dict(inputs)), with_kwargs=True)
    rehearsal._run(trainer, worst, Gauge(trainer.args.device))
    (call,) = calls
    assert "attention_mask" not in call
    assert call["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in worst.rows))


def test_a_kept_budget_holds_for_one_layout_only(tmp_path: Path) -> None:
    trainer = trainer_of(MODELS["llama"](), Layout.PADDED, tmp_path)
    padded = key_of(trainer)
    trainer.mbp_rows.layout = Layout.ONE_ROW
    laid = key_of(trainer)
    assert "layout" not in " ".join(padded)
    assert "layout of rows" in difference(padded, laid)
