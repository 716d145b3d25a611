"""The cost model follows from the model's shape, the budget from its memory; finding them leaves no trace."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    Trainer,
)
from transformers.pytorch_utils import Conv1D

from hf_mbp import MBPMixin, device_memory, memory, sizing, wrapped
from hf_mbp.memory import AllocationTracker
from hf_mbp.plan import Cost
from hf_mbp.sizing import cost_of, measure_budget
from tests.helpers import (
    VOCABULARY,
    Pad,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    t5_config,
    token_rows,
    with_labels,
)

CPU = torch.device("cpu")


def bart_config() -> BartConfig:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    return BartConfig(**sizes, **heads, vocab_size=VOCABULARY, pad_token_id=0)


MODELS: dict[str, Callable[[], Any]] = {
    "bert, head tied": lambda: build(BertForMaskedLM, bert_config()),
    "bert, large vocabulary": lambda: build(BertForMaskedLM, bert_config(vocab_size=5000)),
    "bert, no language head": lambda: build(BertForSequenceClassification, bert_config(vocab_size=5000)),
    "gpt2, head tied": lambda: build(GPT2LMHeadModel, gpt2_config()),
    "llama, head of its own": lambda: build(LlamaForCausalLM, llama_config(tie_word_embeddings=False)),
    "llama, head tied": lambda: build(LlamaForCausalLM, llama_config(tie_word_embeddings=True)),
    "t5, head tied": lambda: build(T5ForConditionalGeneration, t5_config(tie_word_embeddings=True)),
    "t5, head of its own": lambda: build(T5ForConditionalGeneration, t5_config(tie_word_embeddings=False)),
    "t5, large vocabulary": lambda: build(T5ForConditionalGeneration, t5_config(vocab_size=5000)),
    "bart": lambda: build(BartForConditionalGeneration, bart_config()),
}


# cost_of


def counted_weights(model: Any, cost: Cost) -> float:
    """Weights behind a cost model: an attention pair costs 12 x layers x hidden, a cell 6 operations a weight."""
    return 2 * model.config.num_hidden_layers * model.config.hidden_size / cost.attention


@pytest.mark.parametrize("name", MODELS)
def test_cells_cost_the_weights_of_all_layers_and_not_of_embeddings(name: str) -> None:
    model = MODELS[name]()
    layers = sum(m.weight.numel() for m in model.modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert layers <= round(counted_weights(model, cost_of(model, CPU)), 6) <= layers + vectors


@pytest.mark.parametrize("name", ["bert, head tied", "gpt2, head tied", "llama, head of its own"])
@pytest.mark.parametrize(("narrow", "wide"), [((4, 8), (4, 64)), ((8, 16), (1, 64))])
def test_costs_are_in_proportion_to_counted_operations(
    name: str, narrow: tuple[int, int], wide: tuple[int, int]
) -> None:
    model = MODELS[name]()
    model.set_attn_implementation("eager")
    cost = cost_of(model, CPU)

    def operations(rows: int, width: int) -> int:
        token_ids = torch.randint(5, VOCABULARY, (rows, width))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=token_ids, labels=token_ids).loss.backward()
        return counter.get_total_flops()

    def modelled(rows: int, width: int) -> float:
        return float(cost(np.array(rows), np.array(width))) - cost.overhead

    expected = operations(*wide) / operations(*narrow)
    assert modelled(*wide) / modelled(*narrow) == pytest.approx(expected, rel=0.05)


def test_a_wider_model_has_a_smaller_share_of_attention() -> None:
    small, large = (cost_of(build(BertForMaskedLM, bert_config(hidden_size=h)), CPU) for h in (16, 64))
    assert large.attention < small.attention


def test_a_larger_model_has_less_overhead_in_cells() -> None:
    small, large = (cost_of(build(BertForMaskedLM, bert_config(intermediate_size=s)), CPU) for s in (32, 4096))
    assert 0 < large.overhead < small.overhead


def test_frozen_weights_have_no_gradients_to_add_up() -> None:
    model = build(BertForMaskedLM, bert_config(intermediate_size=4096))
    full = cost_of(model, CPU)
    for parameter in model.bert.encoder.parameters():
        parameter.requires_grad = False
    frozen = cost_of(model, CPU)
    assert frozen.overhead < full.overhead
    assert frozen.attention == full.attention


def test_launches_take_more_cells_on_a_gpu_and_are_hidden_behind_many_cells() -> None:
    model = build(BertForMaskedLM, bert_config())
    cpu, gpu = cost_of(model, CPU), cost_of(model, torch.device("cuda"))
    assert cpu.floor == 0
    assert gpu.floor > 10 * cpu.overhead
    rows, few, many = np.array(1), np.array(1), np.array(10 * int(gpu.floor))
    assert gpu(rows, few) == gpu.overhead + gpu.floor
    assert gpu(rows, many) == gpu.overhead + gpu.of_row(many)


def test_a_model_that_does_not_tell_its_shape_has_no_attention() -> None:
    cost = cost_of(torch.nn.Sequential(torch.nn.Linear(4, 3)), CPU)
    assert cost.attention == 0
    assert cost.overhead > 0


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
def test_a_forward_pass_costs_what_training_costs_without_gradients(device: torch.device) -> None:
    """In units of a cell, of which each takes a third of the time: pairs of positions and launches do, too."""
    model = build(BertForMaskedLM, bert_config())
    full, forward = cost_of(model, device), cost_of(model, device, forward_only=True)
    assert forward.overhead < full.overhead
    frozen = cost_of(model.requires_grad_(False), device)
    for name in ("overhead", "cell", "attention", "floor"):
        assert getattr(forward, name) == pytest.approx(getattr(frozen, name))


def test_the_forward_pass_is_a_third_of_the_operations() -> None:
    model, token_ids = build(BertForMaskedLM, bert_config()), torch.randint(5, VOCABULARY, (4, 16))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=token_ids, labels=token_ids).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    share = forward.get_total_flops() / (forward.get_total_flops() + backward.get_total_flops())
    assert share == pytest.approx(sizing.FORWARD, rel=0.03)


def test_a_cpu_is_given_no_more_cells_than_its_cache_holds() -> None:
    narrow, wide = (BertForSequenceClassification(bert_config(hidden_size=size)) for size in (16, 64))
    cpu = torch.device("cpu")
    most = sizing.cost_of(narrow, cpu).most_cells
    assert most == pytest.approx(2**24 / (10 * 16 * 4))
    assert sizing.cost_of(wide, cpu).most_cells == pytest.approx(most / 4)
    assert sizing.cost_of(narrow.to(torch.bfloat16), cpu).most_cells == pytest.approx(2 * most)
    assert sizing.cost_of(narrow, torch.device("cuda")).most_cells is None
    assert sizing.cost_of(torch.nn.Linear(2, 2), cpu).most_cells is None, "it does not tell its shape"


def test_a_model_without_weights_has_a_cost() -> None:
    assert np.isfinite(cost_of(torch.nn.Identity(), CPU)(np.array(1), np.array(1)))


# measure_budget


class Normalised(torch.nn.Module):
    """Has all that a forward pass could disturb: running means, dropout, and parts in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.dropout = torch.nn.Dropout(0.5)
        self.head = torch.nn.Linear(8, 3)

    def forward(self, input_ids: Any, attention_mask: Any, labels: Any) -> dict[str, torch.Tensor]:
        hidden = (self.embedding(input_ids) * attention_mask[..., None]).mean(dim=1)
        logits = self.head(self.dropout(self.norm(hidden)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def class_rows(count: int = 16, **kwargs: Any) -> list[dict[str, Any]]:
    return with_labels(token_rows(count, **kwargs), lambda index, row: index % 3)


def unsized(model: Any, rows: list[Any], folder: Path, **changes: Any) -> Any:
    """A trainer whose budget is not given."""
    options = {"max_tokens_per_micro_batch": None, "check_at_start": False}
    return mbp_trainer(model, rows, folder, **{**options, **changes})


def snapshot(model: Any) -> dict[str, Any]:
    """All that training depends on, as plain values."""
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "gradients": {n: None if p.grad is None else p.grad.tolist() for n, p in model.named_parameters()},
        "flags": {name: module.training for name, module in model.named_modules()},
        "problem_type": getattr(getattr(model, "config", None), "problem_type", None),
        "random": (random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()),
    }


@pytest.mark.parametrize("kind", ["batch normalisation", "bert"])
def test_measuring_leaves_no_trace(kind: str, tmp_path: Path) -> None:
    config = bert_config(num_labels=3, hidden_dropout_prob=0.1)
    model = Normalised() if kind == "batch normalisation" else build(BertForSequenceClassification, config)
    rows = class_rows()
    trainer = unsized(model, rows, tmp_path)
    model.train()
    next(model.children()).eval()
    first = next(model.parameters())
    first.grad = torch.rand_like(first)
    gradient, before = first.grad, snapshot(model)
    budget = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget
    assert budget.bytes_per_cell > 0
    assert snapshot(model) == before
    assert first.grad is gradient


def test_copies_leave_half_of_the_room_to_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows()
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    own = {id(parameter) for parameter in model.parameters()}
    were_copied = []

    def noted(module: Any, *_: Any) -> None:
        were_copied.append({p.requires_grad: id(p) not in own for p in module.parameters()})

    model.register_forward_pre_hook(noted)
    for free, copied in ((3, {True: True, False: True}), (1.5, {True: True, False: False})):
        monkeypatch.setattr(device_memory, "free_memory", lambda device, free=free: int(free * weights))
        trainer = unsized(model, rows, tmp_path)
        measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows))
        assert were_copied
        assert all(one == copied for one in were_copied)
        assert {id(parameter) for parameter in model.parameters()} == own
        were_copied.clear()


def test_snapshots_see_what_a_forward_pass_disturbs() -> None:
    model, rows = Normalised(), class_rows()
    before = snapshot(model)
    model(**Pad()(rows))
    after = snapshot(model)
    assert before["weights"] != after["weights"]
    assert before["random"] != after["random"]


def test_measuring_before_training_changes_nothing_of_it(tmp_path: Path) -> None:
    def trained(**changes: Any) -> dict[str, Any]:
        model = build(BertForSequenceClassification, bert_config(num_labels=3))
        unsized(model, class_rows(), tmp_path, max_steps=3, per_device_train_batch_size=4, **changes).train()
        return {name: value.tolist() for name, value in model.state_dict().items()}

    assert trained(memory_limit="4GB", max_tokens_per_micro_batch=40) == trained(max_tokens_per_micro_batch=40)


def peaks_of(model: Any, rows: list[Any], folder: Path, **changes: Any) -> tuple[list[int], int]:
    """Bytes that each micro-batch of a run really took, and those that its budget allowed."""
    peaks = []

    class Tracked(Trainer):
        def training_step(self, model: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            with AllocationTracker() as tracker:
                loss: torch.Tensor = super().training_step(model, *args, **kwargs)
            peaks.append(tracker.peak_bytes)
            return loss

    class TrackedMBP(MBPMixin, Tracked):
        pass

    trainer = unsized(model, rows, folder, trainer_class=TrackedMBP, **changes)
    trainer.train()
    return peaks, trainer.state.stateful_callbacks["hf_mbp"]["budget"]["max_bytes"]


@pytest.fixture
def nothing_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits then mean the memory that training takes, whatever the tests have used before."""
    monkeypatch.setattr(device_memory, "used_memory", lambda device: 0)
    monkeypatch.setattr(device_memory, "peak_since_restart", lambda device: 0)


@pytest.mark.usefixtures("nothing_used")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("make", [bert_config, gpt2_config], ids=["bert", "gpt2"])
def test_no_micro_batch_takes_more_than_the_budget(make: Any, dropout: float, tmp_path: Path) -> None:
    if make is bert_config:
        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        model = build(BertForMaskedLM, bert_config(**rates, max_position_embeddings=512))
    else:
        rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
        model = build(GPT2LMHeadModel, gpt2_config(**rates, n_positions=512))
    rows = with_labels(token_rows(32, low=100, high=500), masked_prefix)
    room = "40MB" if dropout == 0 else "150MB"
    peaks, max_bytes = peaks_of(model, rows, tmp_path, per_device_train_batch_size=32, memory_limit=room)
    assert len(peaks) > 1
    assert max(peaks) <= max_bytes
    assert max(peaks) > max_bytes / 4


@pytest.mark.usefixtures("nothing_used")
def test_a_small_limit_splits_more_than_a_large_one(tmp_path: Path) -> None:
    def micro_batches(limit: Any, **changes: Any) -> float:
        trainer = unsized(build(BertForMaskedLM, bert_config()), rows, tmp_path, memory_limit=limit, **changes)
        trainer.train()
        return float(trainer.state.log_history[0]["mbp_micro_batches"])

    rows = with_labels(token_rows(), masked_prefix)
    assert micro_batches("4GB") == micro_batches(None) == 1
    assert micro_batches("600KB") >= 4
    assert micro_batches("4GB", max_tokens_per_micro_batch=64) >= 4
    assert micro_batches("600KB", max_tokens_per_micro_batch=10_000) == micro_batches("600KB")


@pytest.mark.usefixtures("nothing_used")
def test_a_limit_that_leaves_no_room_stops_before_the_first_step(tmp_path: Path) -> None:
    model = build(BertForMaskedLM, bert_config())
    trainer = unsized(model, with_labels(token_rows(), masked_prefix), tmp_path, memory_limit="50KB")
    with pytest.raises(ValueError, match=r"memory_limit=48\.8 KiB: no memory is left for activations"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_there_is_no_memory_for_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, measure = [], memory.measure_activations

    def scarce(run: Any) -> int:
        size = measure(run)
        if measured and size > 3 * measured[0]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        measured.append(size)
        return size

    monkeypatch.setattr(memory, "measure_activations", scarce)
    model, rows = build(BertForSequenceClassification, bert_config(num_labels=3)), class_rows(high=60)
    trainer = unsized(model, rows, tmp_path)
    sizing = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows))
    assert 0 < len(measured) < 4
    assert sizing.budget.bytes_per_cell > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_given_number_of_tokens_needs_no_measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "_measure", None)
    trainer = unsized(Normalised(), class_rows(), tmp_path, max_tokens_per_micro_batch=10**6)
    trainer.train()
    assert trainer.state.stateful_callbacks["hf_mbp"]["budget"]["max_bytes"] is None


def test_a_sharded_model_needs_a_given_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = class_rows()
    trainer = unsized(Normalised(), rows, tmp_path)
    monkeypatch.setattr(wrapped, "is_sharded", lambda trainer: True)
    with pytest.raises(ValueError, match=r"cannot be sized .* under FSDP and DeepSpeed yet: set max_tokens_per_micro"):
        measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows))


@pytest.mark.parametrize("high", [1, 3, 31, 33])
def test_rows_of_any_length_can_be_measured(high: int, tmp_path: Path) -> None:
    rows = class_rows(low=1, high=high)
    trainer = unsized(build(BertForSequenceClassification, bert_config(num_labels=3)), rows, tmp_path)
    budget = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget
    assert budget.bytes(1, high) > 0


class Shapes(torch.nn.Module):
    """Keeps the shapes of what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        shapes: list[tuple[int, ...]] = []
        self.note, self.noted = shapes.append, lambda: shapes  # what a module holds itself is put back after a probe

    def forward(self, labels: Any, input_ids: Any = None, pixel_values: Any = None) -> dict[str, torch.Tensor]:
        values = pixel_values if input_ids is None else input_ids
        self.note(tuple(values.shape))
        return {"loss": (values.double() * self.weight).mean()}


def test_rows_without_tokens_are_measured_a_few_at_a_time(tmp_path: Path) -> None:
    rows = [{"pixel_values": torch.rand(3, 4, 4), "labels": index % 2} for index in range(16)]
    model = Shapes()
    trainer = unsized(model, rows, tmp_path)
    budget = measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget
    assert model.noted()
    assert all(shape[1:] == (3, 4, 4) and shape[0] <= 8 for shape in model.noted())
    assert budget.bytes(4, 1) >= 4 * 3 * 4 * 4 * 4


def test_rows_laid_end_to_end_are_measured_at_their_length(tmp_path: Path) -> None:
    def joined(rows: list[Any]) -> dict[str, torch.Tensor]:
        token_ids = torch.cat([torch.tensor(row["input_ids"]) for row in rows])[None]
        return {"input_ids": token_ids, "labels": token_ids}

    rows, model = token_rows(low=40, high=60), Shapes()
    longest = max(len(row["input_ids"]) for row in rows)
    trainer = unsized(model, rows, tmp_path, data_collator=joined)
    trainer.mbp_rows.shifts_labels(joined(rows[:1]))
    model.noted().clear()
    measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows))
    assert model.noted()
    assert {shape[1] / longest for shape in model.noted() if shape[1] > 2 * longest} == {5, 8}


@pytest.mark.parametrize("key", ["attention_mask", "token_weights", "pairs"])
def test_values_as_wide_as_the_tokens_do_not_break_the_probe(key: str, tmp_path: Path) -> None:
    """They are cut with the tokens, or nothing is."""

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, input_ids: torch.Tensor, labels: Any = None, **others: torch.Tensor) -> dict[str, Any]:
            other = others[key].sum(dim=-1) if key == "pairs" else others[key]
            return {"loss": (self.weight * input_ids * other).double().mean(dim=-1).mean()}

    def pad(rows: list[Any]) -> dict[str, torch.Tensor]:
        padded = Pad()([{"input_ids": row["input_ids"]} for row in rows])
        height, width = padded["input_ids"].shape
        values = torch.ones(height, width, width, dtype=torch.long) if key == "pairs" else torch.ones(height, width)
        return {**padded, key: values}

    rows = token_rows(low=40, high=60)
    trainer = unsized(Wide(), rows, tmp_path, data_collator=pad)
    assert measure_budget(trainer, rows, trainer.mbp_rows.sizes(rows)).budget.max_bytes
