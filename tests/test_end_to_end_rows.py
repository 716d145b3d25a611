"""Rows that lie end to end give the gradient of the whole batch, by plain PyTorch: with masks, and flash attention."""

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    BertForMaskedLM,
    BertForTokenClassification,
    DataCollatorForLanguageModeling,
    GPT2LMHeadModel,
    OPTForCausalLM,
)

from hf_mbp import layout_choice
from hf_mbp.plan import Layout
from tests.faults import Faults
from tests.flash import Kernels, install, with_flash
from tests.helpers import (
    Pad,
    bert_config,
    build,
    gpt2_config,
    mbp_trainer,
    token_rows,
    tokenizer,
)
from tests.laid_runs import (
    CAUSAL,
    FIRST_PASSES,
    FLOAT32_INSIDE,
    IN_FLOAT64,
    LOSS_IN_FLOAT32,
    MASKED,
    Calls,
    assert_whole,
    llama,
    mistral,
    modernbert,
    next_token_loss,
    plain,
    qwen2,
    token_classes,
    trained,
)
from tests.test_equivalence import opt_config


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return install(monkeypatch)


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
