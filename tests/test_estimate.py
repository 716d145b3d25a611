"""Estimates of memory against what the allocator hands out in real training, and against counts by hand."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5ForConditionalGeneration,
)

import check_estimates as script
from hf_mbp import MemoryEstimate, estimate_max_tokens, estimate_memory
from marked_table import table_in
from tests.helpers import (
    BERT,
    NO_DROPOUT,
    VOCABULARY,
    bert_config,
    gpt2_config,
    llama_config,
    mbp_trainer,
    t5_config,
    token_rows,
    with_labels,
)

ROOT = Path(__file__).parents[1]


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(llama_config(**changes))


# Against real training


@pytest.mark.parametrize("model", list(script.MODELS))
def test_estimate_is_what_training_takes(model: str) -> None:
    outcome = script.examine(script.Case(model=model, rows=8, width=32, options={"bf16": True}))
    assert outcome.is_within, outcome.row()


@pytest.mark.parametrize(
    ("model", "change", "options"),
    [
        ("BERT", "frozen but for a layer", {}),
        ("Llama", "", {"attn_implementation": "eager"}),
        ("Llama", "LoRA", {"bf16": True}),
        ("Llama", "bfloat16 weights", {"optimizer": "adamw_torch_fused"}),
        ("GPT-2", "", {"gradient_checkpointing": True}),
        ("Qwen2", "", {"optimizer": "sgd"}),
        ("Qwen2", "", {"optimizer": "adafactor"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # of PEFT
def test_estimate_follows_what_is_chosen(model: str, change: str, options: dict[str, Any]) -> None:
    outcome = script.examine(script.Case(model=model, rows=2, width=128, change=change, options=options))
    assert outcome.is_within, outcome.row()
    plain = estimate_memory(script.MODELS[model](128), 2, 128)
    assert abs(outcome.estimate.peak_bytes / plain.peak_bytes - 1) > 0.01  # or the choice would not show


def test_estimate_is_what_a_run_of_the_trainer_takes(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=VOCABULARY, pad_token_id=0))
    rows = with_labels(token_rows(16, low=60, high=64), lambda _, row: row["input_ids"])
    trainer = mbp_trainer(
        model, rows, tmp_path, optim="adamw_torch", max_steps=2, max_tokens_per_micro_batch=8 * 64, check_at_start=False
    )
    before = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer.train()
    real = before + script.most_allocated(profiler)
    assert trainer.state.log_history[0]["mbp_micro_batches"] == 2
    estimate = estimate_memory(model, 8, 64)
    assert -0.02 <= estimate.peak_bytes / real - 1 <= 0.20


def test_the_script_tells_errors_that_are_too_large() -> None:
    def outcome(peak: int) -> Any:
        zeros = dict.fromkeys(("gradient_bytes", "optimizer_bytes", "activation_bytes", "step_bytes"), 0)
        case = script.Case(model="BERT", rows=1, width=1)
        return script.Outcome(case=case, real_bytes=1000, estimate=MemoryEstimate(parameter_bytes=peak, **zeros))

    assert [outcome(peak).is_within for peak in (979, 981, 1199, 1201)] == [False, True, True, False]


def test_the_page_has_all_rows() -> None:
    table = table_in(script.PAGE, "estimates")
    rows = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith("| ")][2:]
    cases = [[f"| {case.model}", f"{case.rows} x {case.width}", case.name] for case in script.all_cases()]
    assert rows == cases
    assert len(rows) >= 80


# Against counts by hand


def test_parts_are_what_they_are_of() -> None:
    model = llama()
    size = sum(parameter.nbytes for parameter in model.parameters())
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    estimate = estimate_memory(model, 2, 16)
    assert estimate.parameter_bytes == size + buffers
    assert estimate.gradient_bytes == size
    steps = 4 * len(list(model.parameters()))
    assert estimate.optimizer_bytes == 2 * size + steps
    assert estimate_memory(model, 2, 16, optimizer="sgd").optimizer_bytes == 0
    momentum = estimate_memory(model, 2, 16, optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    assert momentum.optimizer_bytes == size


def test_the_peak_is_in_the_step_or_before() -> None:
    parts = {"parameter_bytes": 1, "gradient_bytes": 2, "optimizer_bytes": 4, "fixed_bytes": 8}
    assert MemoryEstimate(**parts, activation_bytes=100, step_bytes=50).peak_bytes == 115
    assert MemoryEstimate(**parts, activation_bytes=100, step_bytes=200).peak_bytes == 215


class Noise(nn.Module):
    """A layer normalisation and dropout, whose memory can be counted by hand."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.drop = 0.0

    def forward(self, values: torch.Tensor) -> Any:
        hidden = nn.functional.dropout(self.norm(values), self.drop)
        return SimpleNamespace(loss=hidden.float().sum())


def values(rows: int, width: int) -> dict[str, torch.Tensor]:
    return {"values": torch.zeros(rows, width, 64, dtype=torch.bfloat16)}


def test_dropout_on_cuda_keeps_a_byte_a_value() -> None:
    model = Noise(64)
    sizes = {}
    for device in ("cpu", "cuda"):
        for model.drop in (0.0, 0.5):
            estimate = estimate_memory(
                model, 4, 1000, inputs=lambda r, w: {"values": torch.zeros(r, w, 64)}, device=device
            )
            sizes[device, model.drop] = estimate.activation_bytes
    count = 4 * 1000 * 64
    assert sizes["cpu", 0.0] == sizes["cuda", 0.0]
    assert sizes["cpu", 0.5] - sizes["cuda", 0.5] == 3 * count


def test_autocast_on_cuda_normalises_in_float32() -> None:
    on_cpu, on_cuda = (
        estimate_memory(Noise(64), 4, 1000, inputs=values, bf16=True, device=device).activation_bytes
        for device in ("cpu", "cuda")
    )
    assert on_cuda - on_cpu >= 2 * 4 * 1000 * 64


def test_attention_on_cuda_keeps_no_scores() -> None:
    heads, width = 4, 256
    config = bert_config(num_attention_heads=heads, attention_probs_dropout_prob=0.1, max_position_embeddings=width)
    model = BertForSequenceClassification(config)
    scores = 4 * heads * width**2
    fused, eager = (
        estimate_memory(model, 1, width, device="cuda", attn_implementation=name).activation_bytes
        for name in ("sdpa", "eager")
    )
    assert eager - fused > 2 * scores  # of each of two layers


def test_checkpointing_goes_with_cuda() -> None:
    kept, recomputed = (
        estimate_memory(llama(num_hidden_layers=4), 4, 64, device="cuda", bf16=True, gradient_checkpointing=on)
        for on in (False, True)
    )
    assert recomputed.activation_bytes < 0.6 * kept.activation_bytes


# Models, inputs


def test_no_weights_are_needed() -> None:
    real = estimate_memory(llama(), 2, 16)
    with torch.device("meta"):
        assert estimate_memory(llama(), 2, 16) == real
    with FakeTensorMode():
        model = llama()
    assert estimate_memory(model, 2, 16) == real


def test_the_model_is_left_alone() -> None:
    model = llama().eval()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    estimate_memory(model, 2, 16, gradient_checkpointing=True, attn_implementation="eager")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not model.is_activation_checkpointing
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    "head", [BertForTokenClassification, BertForQuestionAnswering, BertForMultipleChoice, BertForSequenceClassification]
)
def test_inputs_fit_the_head(head: Any) -> None:
    model = head(bert_config(num_labels=2))
    small, large = (estimate_memory(model, rows, 32).activation_bytes for rows in (8, 16))
    assert small < large < 2.1 * small


def test_a_decoder_has_a_width_of_its_own() -> None:
    model = T5ForConditionalGeneration(t5_config())
    narrow, wide = (estimate_memory(model, 4, 64, target_width=width).activation_bytes for width in (8, None))
    assert narrow < 0.8 * wide


# Formulas


def test_eight_bits_by_formula() -> None:
    model = GPT2LMHeadModel(gpt2_config(n_embd=64))
    estimate = estimate_memory(model, 2, 16, optimizer="adamw_bnb_8bit")
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    large = [p.numel() for p in model.parameters() if p.numel() >= 4096 and id(p) not in embeddings]
    count = sum(parameter.numel() for parameter in model.parameters())
    assert len(large) == 2 * 4
    assert estimate.optimizer_bytes == 8 * (count - sum(large)) + sum(2 * n + 8 * n // 256 for n in large)
    assert "8 bits" in str(estimate)


def test_fsdp_by_formula() -> None:
    whole = estimate_memory(llama(), 2, 16)
    shards = estimate_memory(llama(), 2, 16, fsdp_ranks=4)
    assert shards.gradient_bytes == -(-whole.gradient_bytes // 4)
    assert shards.optimizer_bytes == -(-whole.optimizer_bytes // 4)
    layer = sum(parameter.nbytes for parameter in llama().model.layers[0].parameters())
    assert whole.activation_bytes + 3 * layer <= shards.activation_bytes
    assert "FSDP" in str(shards)
    assert "all of it counted" in str(whole)


def test_flash_attention_by_formula() -> None:
    model = llama()
    flash = estimate_memory(model, 2, 16, attn_implementation="flash_attention_2")
    assert flash.peak_bytes == estimate_memory(model, 2, 16, attn_implementation="sdpa").peak_bytes
    assert "flash attention" in str(flash)


# The budget of a card


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_budget_fills_the_memory(device: str) -> None:
    limit, width = 2**27, 32
    with torch.device("meta"):
        model = llama(hidden_size=64, num_hidden_layers=1)
    tokens = estimate_max_tokens(model, width, limit, device=device)
    rows = tokens // width
    assert tokens == rows * width
    assert estimate_memory(model, rows, width, device=device).peak_bytes <= 0.9 * limit
    assert estimate_memory(model, rows + rows // 20 + 1, width, device=device).peak_bytes > 0.9 * limit


def test_a_memory_that_is_too_small_is_told() -> None:
    with pytest.raises(
        ValueError, match=r"memory_limit='2MiB': a row of 32 tokens needs .*gradient_checkpointing=True"
    ):
        estimate_max_tokens(llama(hidden_size=64, vocab_size=10_000), 32, "2MiB")
    with pytest.raises(ValueError, match=r'memory_limit=0.8 is not a size. Write the memory of the device, as "24GiB"'):
        estimate_max_tokens(llama(), 32, 0.8)  # type: ignore[arg-type]


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", script.PAGE.read_text(), flags=re.DOTALL)
    (program,) = [block for block in blocks if "estimate_max_tokens" in block]
    exec(program, {})  # noqa: S102
    *table, tokens = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[:3]] == ["parameters", "gradients", "optimizer"]
    assert int(tokens.split()[0]) > 512


# Mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0 is not a number of rows. Write 1 or more"),
        ({"width": -1}, "width=-1"),
        ({"fsdp_ranks": 0}, "fsdp_ranks=0"),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True exclude each other"),
        ({"device": "tpu"}, 'device=\'tpu\': kernels are known of "cuda" and "cpu"'),
        ({"optimizer": "adam"}, "optimizer='adam' is not known. Write one of adamw_torch, "),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_memory(llama(), **{"rows": 2, "width": 8, **options})


def test_a_model_without_anything_to_train_is_told() -> None:
    with pytest.raises(ValueError, match="All parameters of the model are frozen"):
        estimate_memory(llama().requires_grad_(False), 2, 8)


def test_unknown_inputs_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"The inputs of BertModel are not known\. Pass inputs="):
        estimate_memory(BertModel(BertConfig(**BERT, **NO_DROPOUT, vocab_size=VOCABULARY)), 2, 8)


def test_operators_that_depend_on_values_are_told() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=VOCABULARY)
    )
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match='set_experts_implementation\\("grouped_mm"\\)'):
        estimate_memory(model, 2, 8)


class Custom(nn.Module):
    """A model that knows nothing of transformers, and returns its loss as it is told to."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.linear, self.wrap = nn.Linear(8, 3), wrap

    def forward(self, values: torch.Tensor) -> Any:
        return self.wrap(self.linear(values).sum())


def wide(rows: int, width: int) -> dict[str, torch.Tensor]:
    return {"values": torch.zeros(rows, width, 8)}


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss, "logits": 0}, lambda loss: (loss, 0)])
def test_the_loss_is_taken_as_trainer_takes_it(wrap: Any) -> None:
    expected = estimate_memory(Custom(lambda loss: SimpleNamespace(loss=loss)), 2, 16, inputs=wide)
    assert estimate_memory(Custom(wrap), 2, 16, inputs=wide) == expected
    assert expected.activation_bytes > 2 * 16 * 8 * 4


@pytest.mark.parametrize("wrap", [lambda loss: {"logits": loss}, lambda loss: (loss[None].expand(2),), lambda _: None])
def test_a_model_without_a_loss_is_told(wrap: Any) -> None:
    with pytest.raises(ValueError, match=r"Custom gives no loss for the inputs values\. Have inputs= make its labels"):
        estimate_memory(Custom(wrap), 2, 16, inputs=wide)


@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}]
)
def test_what_a_model_does_not_have_is_told(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}: Custom .* Leave it out"):
        estimate_memory(Custom(lambda loss: (loss,)), 2, 16, inputs=wide, **options)


def test_inputs_without_labels_are_told() -> None:
    with pytest.raises(ValueError, match="BertForSequenceClassification gives no loss for the inputs input_ids"):
        estimate_memory(
            BertForSequenceClassification(bert_config()),
            2,
            8,
            inputs=lambda rows, width: {"input_ids": torch.zeros(rows, width, dtype=torch.long)},
        )


@pytest.mark.parametrize(
    "model", [lambda: BertForSequenceClassification(bert_config()), lambda: GPT2LMHeadModel(gpt2_config())]
)
def test_rows_longer_than_the_positions_are_refused(model: Any) -> None:
    made = model()
    places = made.config.max_position_embeddings
    estimate_memory(made, 2, places)
    with pytest.raises(ValueError, match=f"width={places + 1}: the model has positions for {places} tokens only"):
        estimate_memory(made, 2, places + 1)
    estimate_memory(llama(max_position_embeddings=16), 2, 17)  # positions that are computed have no end


@pytest.mark.parametrize("rows", [2.5, "2", 1.0])
def test_a_number_of_rows_is_whole(rows: Any) -> None:
    with pytest.raises(ValueError, match=f"rows={rows!r} is not a number of rows. Write 1 or more"):
        estimate_memory(llama(), rows, 8)
