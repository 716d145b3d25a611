"""Rows are laid end to end where that gives the gradient of the whole batch, by plain PyTorch, and nowhere else."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BloomConfig,
    BloomForCausalLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5ForConditionalGeneration,
)

from hf_mbp import MBPConfig, layout_choice
from hf_mbp.plan import Layout
from tests.faults import Faults
from tests.flash import Kernels, install, with_flash
from tests.helpers import (
    VOCABULARY,
    Pad,
    Recorder,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    tokenizer,
    whole_gradients,
    with_labels,
)
from tests.test_equivalence import masked_rows, opt_config

IN_FLOAT64 = 1e-12
FLOAT32_INSIDE = 1e-7
LOSS_IN_FLOAT32 = 1e-6

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIRST_PASSES = 4
"""Passes of training mode before the first step, in which rows are compared: the whole, and three parts of it."""

WINDOW = 5
"""Tokens that attention with a window looks back, fewer than most rows have."""

CAUSAL = with_labels(token_rows(), masked_prefix)
MASKED = masked_rows()


def qwen2() -> Any:
    return build(Qwen2ForCausalLM, Qwen2Config(**SIZES, **SPECIAL, num_key_value_heads=1))


def mistral() -> Any:
    config = MistralConfig(**SIZES, **SPECIAL, num_key_value_heads=2, sliding_window=WINDOW)
    return build(MistralForCausalLM, config)


def modernbert() -> Any:
    config = ModernBertConfig(**SIZES, **SPECIAL, local_attention=2 * WINDOW, cls_token_id=1, sep_token_id=2)
    return build(ModernBertForMaskedLM, config)


def jamba() -> Any:
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
    return build(JambaForCausalLM, JambaConfig(**SIZES, **SPECIAL, **layers, num_key_value_heads=2))


def mamba() -> Any:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
    return build(MambaForCausalLM, MambaConfig(**sizes, **SPECIAL))


def bloom() -> Any:
    return build(BloomForCausalLM, BloomConfig(**SPECIAL, hidden_size=16, n_layer=2, n_head=2))


def llama() -> Any:
    return build(LlamaForCausalLM, llama_config())


def token_classes() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: [token % 4 for token in row["input_ids"]])


def next_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """In float64, where that of transformers is rounded to float32."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def plain(model: Any, rows: list[dict[str, Any]], loss: Any = None) -> tuple[float, dict[str, torch.Tensor]]:
    """The whole batch, padded, with stock attention."""
    inputs = Pad()(rows)
    if loss is None:
        return whole_gradients(model, lambda m: m(**inputs).loss)
    labels = inputs.pop("labels")
    return whole_gradients(model, lambda m: loss(m(**inputs), labels))


def trained(model: Any, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> Any:
    """A trainer after one step; gradients are in `trainer.recorder`."""
    recorder = Recorder()
    trainer = mbp_trainer(model, rows, folder, **{"callbacks": [recorder], "on_inexact": "error", **changes})
    trainer.recorder = recorder
    trainer.train()
    return trainer


def assert_whole(trainer: Any, expected: tuple[float, dict[str, torch.Tensor]], bound: float) -> None:
    loss, gradients = expected
    assert relative_error(gradients, trainer.recorder.gradients[0]) < bound
    assert trainer.recorder.logs[0]["loss"] == pytest.approx(loss, rel=LOSS_IN_FLOAT32)


class Calls:
    """Which inputs a model gets in training, and in evaluation."""

    def __init__(self, model: Any) -> None:
        self.training: list[dict[str, Any]] = []
        self.evaluation: list[dict[str, Any]] = []
        model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, model: Any, args: Any, kwargs: Any) -> None:
        (self.training if model.training and torch.is_grad_enabled() else self.evaluation).append(dict(kwargs))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return install(monkeypatch)


# Exact, where it is possible

CAUSAL_MODELS = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2, absolute positions": lambda: build(GPT2LMHeadModel, gpt2_config()),
    "mistral, with a window": mistral,
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_with_masks_of_transformers_if_asked(name: str, side: str, tmp_path: Path) -> None:
    make = CAUSAL_MODELS[name]
    trainer = trained(
        make(), CAUSAL, tmp_path, padding_free=True, data_collator=Pad(side), compute_loss_func=next_token_loss
    )
    assert trainer.mbp_rows.layout is Layout.ONE_ROW
    log = trainer.recorder.logs[0]
    assert log["mbp_cells"] == log["mbp_tokens"] == sum(len(row["input_ids"]) for row in CAUSAL)
    assert 3 <= log["mbp_micro_batches"] < len(CAUSAL)
    assert_whole(trainer, plain(make(), CAUSAL, next_token_loss), IN_FLOAT64)


WITH_FLASH: dict[str, tuple[Any, list[dict[str, Any]], Any, float]] = {
    **{name: (make, CAUSAL, next_token_loss, IN_FLOAT64) for name, make in CAUSAL_MODELS.items()},
    "opt": (lambda: build(OPTForCausalLM, opt_config()), CAUSAL, next_token_loss, IN_FLOAT64),
    "bert, masked": (lambda: build(BertForMaskedLM, bert_config()), MASKED, None, IN_FLOAT64),
    "bert, token classes": (
        lambda: build(BertForTokenClassification, bert_config(num_labels=4)),
        token_classes(),
        None,
        IN_FLOAT64,
    ),
    "modernbert, masked, with a window": (modernbert, MASKED, None, FLOAT32_INSIDE),
}


@pytest.mark.parametrize("name", WITH_FLASH)
def test_with_flash_attention_unasked(name: str, kernels: Kernels, tmp_path: Path) -> None:
    """Against stock attention on the padded batch."""
    make, rows, loss, bound = WITH_FLASH[name]
    trainer = trained(with_flash(make()), rows, tmp_path, **({"compute_loss_func": loss} if loss else {}))
    assert trainer.mbp_rows.layout is Layout.SEGMENTS
    log = trainer.recorder.logs[0]
    assert log["mbp_cells"] == log["mbp_tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert log["mbp_micro_batches"] == -(-log["mbp_tokens"] // 64)  # as few as there can be
    assert any(len(ends) > 2 for ends in kernels.boundaries)
    assert_whole(trainer, plain(make(), rows, loss), bound)


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 4}, {"collate_in": "workers"}])
def test_however_rows_come(options: dict[str, Any], kernels: Kernels, tmp_path: Path) -> None:
    expected = plain(llama(), CAUSAL)
    size = 16 // options.get("gradient_accumulation_steps", 1)
    trainer = trained(with_flash(llama()), CAUSAL, tmp_path, per_device_train_batch_size=size, **options)
    assert trainer.recorder.logs[0]["mbp_padding_fraction"] == 0
    assert_whole(trainer, expected, FLOAT32_INSIDE)


def test_masks_drawn_by_the_collator(kernels: Kernels, tmp_path: Path) -> None:
    """The parts that are compared are cut out of one batch then, and have to be laid end to end, too."""
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4)
    model = with_flash(build(BertForMaskedLM, bert_config()))
    trainer = trained(model, token_rows(), tmp_path, data_collator=collator)
    assert trainer.mbp_rows.layout is Layout.SEGMENTS
    assert trainer.recorder.logs[0]["mbp_padding_fraction"] == 0


@pytest.mark.parametrize(("layout", "asked"), [(Layout.SEGMENTS, None), (Layout.ONE_ROW, True)])
@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_step_that_ran_out_of_memory(
    stage: str, layout: Layout, asked: bool | None, kernels: Kernels, tmp_path: Path
) -> None:
    expected = plain(llama(), CAUSAL)
    model = llama() if asked else with_flash(llama())
    options = {"padding_free": asked, "check_at_start": False}
    count = trained(copy.deepcopy(model), CAUSAL, tmp_path, **options).recorder.logs[0]["mbp_micro_batches"]
    compared = Calls(model)
    faults = Faults(model.model.layers[1], stage, {FIRST_PASSES + 1}).install(model)
    trainer = trained(model, CAUSAL, tmp_path, **options)
    log = trainer.recorder.logs[0]
    assert trainer.mbp_rows.layout is layout
    assert (faults.raised, log["mbp_oom_retries"]) == (1, 1)
    assert log["mbp_micro_batches"] > count
    assert log["mbp_padding_fraction"] == 0
    assert all(len(call["input_ids"]) == 1 for call in compared.training[FIRST_PASSES:])
    assert_whole(trainer, expected, FLOAT32_INSIDE)


def test_evaluation_is_as_it_was(kernels: Kernels, tmp_path: Path) -> None:
    model = with_flash(llama())
    expected = mbp_trainer(copy.deepcopy(model), CAUSAL, tmp_path, eval_dataset=CAUSAL, padding_free=False).evaluate()
    trainer = mbp_trainer(model, CAUSAL, tmp_path, eval_dataset=CAUSAL, learning_rate=0.0)
    trainer.train()
    calls = Calls(model)
    metrics = trainer.evaluate()
    assert trainer.mbp_rows.layout is Layout.SEGMENTS
    assert calls.evaluation
    assert all("attention_mask" in call and "position_ids" not in call for call in calls.evaluation)
    assert metrics["eval_loss"] == pytest.approx(expected["eval_loss"], rel=LOSS_IN_FLOAT32)


def test_rows_that_cannot_be_laid_run_padded_among_the_others(
    kernels: Kernels, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest row, which is not among those that are looked at first, has a hole in its mask."""
    monkeypatch.setattr(layout_choice, "ROWS_TO_CHOOSE_FROM", 8)
    rows = copy.deepcopy(CAUSAL)
    longest = max(rows, key=lambda row: len(row["input_ids"]))
    longest["attention_mask"][3] = 0
    longest["labels"][3:5] = [-100, -100]  # neither is predicted, nor does it predict
    expected = plain(llama(), rows)
    model = with_flash(llama())
    calls = Calls(model)
    trainer = trained(model, rows, tmp_path, check_at_start=False)
    padded = ["attention_mask" in call for call in calls.training[FIRST_PASSES:]]
    assert True in padded
    assert False in padded
    assert "some micro-batches are padded all the same, because their attention_mask is not" in capsys.readouterr().out
    assert_whole(trainer, expected, FLOAT32_INSIDE)


# Padded, where it is not


def test_without_flash_attention_nobody_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trained(llama(), CAUSAL, tmp_path)
    assert trainer.mbp_rows.layout is Layout.PADDED
    assert "end to end" not in capsys.readouterr().out


def test_never(kernels: Kernels, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = trained(with_flash(llama()), CAUSAL, tmp_path, padding_free=False)
    assert trainer.mbp_rows.layout is Layout.PADDED
    assert "end to end" not in capsys.readouterr().out


OTHER_GRADIENT = "rows have another gradient than padded"
NO_POSITIONS = "the model takes no position_ids"

IMPOSSIBLE: dict[str, tuple[Any, list[dict[str, Any]], str]] = {
    "bert, whose masks do not know": (lambda: build(BertForMaskedLM, bert_config()), MASKED, OTHER_GRADIENT),
    "opt, whose masks do not know": (lambda: build(OPTForCausalLM, opt_config()), CAUSAL, OTHER_GRADIENT),
    "jamba, half a state space model": (jamba, CAUSAL, OTHER_GRADIENT),
    "mamba": (mamba, CAUSAL, NO_POSITIONS),
    "bloom": (bloom, CAUSAL, NO_POSITIONS),
    "t5": (lambda: build(T5ForConditionalGeneration, t5_config()), CAUSAL, "an encoder-decoder has two sequences"),
    "classes of rows": (
        lambda: build(BertForSequenceClassification, bert_config(num_labels=3)),
        with_labels(token_rows(), lambda index, row: index % 3),
        "labels has not one value for each token",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_is_not_possible_is_refused_if_it_was_asked_for(name: str, tmp_path: Path) -> None:
    make, rows, reason = IMPOSSIBLE[name]
    remedy = r"Leave padding_free at None, which pads where that is needed\."
    with pytest.raises(ValueError, match=rf"padding_free=True cannot be met: .*{reason}.* {remedy}"):
        trained(make(), rows, tmp_path, padding_free=True)


def test_a_collator_that_lays_rows_end_to_end_itself(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the collator does not return one row for each that it gets"):
        trained(llama(), CAUSAL, tmp_path, padding_free=True, data_collator=DataCollatorWithFlattening())


def test_a_compiled_model(tmp_path: Path) -> None:
    model = llama()
    model.model.compile(backend="eager")
    with pytest.raises(ValueError, match="the model is compiled, which has not been tried"):
        trained(model, CAUSAL, tmp_path, padding_free=True)


def test_flash_attention_that_knows_no_chunks(kernels: Kernels, tmp_path: Path) -> None:
    """It refuses sequences longer than a chunk, which rows become together."""
    model = with_flash(llama())
    model.config.attention_chunk_size = 40
    trainer = trained(model, CAUSAL, tmp_path)
    assert trainer.mbp_rows.layout is Layout.PADDED


class Watched(LlamaForCausalLM):
    """A model that does something with rows that follow each other."""

    def forward(self, input_ids: Any = None, position_ids: Any = None, **kwargs: Any) -> Any:
        if position_ids is not None:
            position_ids, kwargs = self.misled(position_ids, kwargs)
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)

    def misled(self, position_ids: Any, kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Leaky(Watched):
    """Lets the last row see the one before."""

    def misled(self, position_ids: Any, kwargs: dict[str, Any]) -> Any:
        ends = kwargs["cu_seq_lens_q"]
        if len(ends) > 2:
            ends = torch.cat([ends[:-2], ends[-1:]])
            longest = int(ends.diff().max())
            kwargs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return position_ids, kwargs


class Counting(Watched):
    """Counts in steps of two."""

    def misled(self, position_ids: Any, kwargs: dict[str, Any]) -> Any:
        return 2 * position_ids, kwargs


class Failing(Watched):
    """Does not take positions after all."""

    def misled(self, position_ids: Any, kwargs: dict[str, Any]) -> Any:
        raise RuntimeError("not here")


class Short(Watched):
    """Has a table that ends, as a model has whose token types are as many as its positions."""

    def misled(self, position_ids: Any, kwargs: dict[str, Any]) -> Any:
        if position_ids.numel() > self.config.max_position_embeddings:
            raise IndexError("index out of range")
        return position_ids, kwargs


OTHER = f"laid end to end, {OTHER_GRADIENT} (relative error 0."
FAILS = "the model or its loss fails on rows laid end to end"

MISLED = {
    Leaky: OTHER,
    Counting: OTHER,
    Failing: f"{FAILS} (RuntimeError: not here)",
    Short: f"{FAILS} (IndexError: index out of range)",
}


@pytest.mark.parametrize("model_class", MISLED)
def test_a_model_that_is_misled_stays_padded(
    model_class: Any, kernels: Kernels, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More positions than the shortest eight rows have tokens, which are compared, and fewer than all rows have."""
    config = llama_config(max_position_embeddings=150)
    expected = plain(build(LlamaForCausalLM, config), CAUSAL)
    model = with_flash(build(model_class, config))
    trainer = trained(model, CAUSAL, tmp_path, max_tokens_per_micro_batch=160)
    assert trainer.mbp_rows.layout is Layout.PADDED
    assert f"Rows are not laid end to end, because {MISLED[model_class]}" in capsys.readouterr().out
    assert_whole(trainer, expected, FLOAT32_INSIDE)


def test_more_rows_than_positions_change_nothing_where_that_works(kernels: Kernels, tmp_path: Path) -> None:
    model = with_flash(build(LlamaForCausalLM, llama_config(max_position_embeddings=150)))
    calls = Calls(model)
    trainer = trained(model, CAUSAL, tmp_path, max_tokens_per_micro_batch=160)
    assert trainer.mbp_rows.layout is Layout.SEGMENTS
    assert max(call["input_ids"].numel() for call in calls.evaluation) > 150


# The option


@pytest.mark.parametrize("value", ["yes", 1, 0])
def test_the_option_is_one_of_three(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"padding_free={value!r} is none of True, False and None\. Write one\."):
        MBPConfig(padding_free=value)
    assert MBPConfig().padding_free is None


def test_all_ranks_or_none() -> None:
    class Ranks:
        def __init__(self, *others: tuple[bool, bool]) -> None:
            self.others = others

        def gather(self, *values: Any) -> list[Any]:
            return [values, *self.others]

    well, bad, unknown = (True, False), (True, True), (False, False)
    finding = layout_choice.Finding
    assert layout_choice._agreed(finding(), Ranks(well)) == ""
    assert layout_choice._agreed(finding(), Ranks(well, bad)) == "another process says so"
    assert layout_choice._agreed(finding(reason="mine"), Ranks(well)) == "mine"
    assert layout_choice._agreed(finding(reason="nothing to compare", is_known=False), Ranks(well)) == ""
    assert layout_choice._agreed(finding(reason="nothing to compare", is_known=False), Ranks(unknown)) != ""
