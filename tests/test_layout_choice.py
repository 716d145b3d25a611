"""Rows are laid end to end where that was found to be exact, and nowhere else; and the reader is told."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    OPTForCausalLM,
    T5ForConditionalGeneration,
)

from hf_mbp import MBPConfig, layout_choice
from hf_mbp.plan import Layout
from tests.flash import Kernels, install, with_flash
from tests.helpers import (
    bert_config,
    build,
    llama_config,
    mbp_trainer,
    t5_config,
    token_rows,
    tokenizer,
    with_labels,
)
from tests.laid_runs import (
    CAUSAL,
    FLOAT32_INSIDE,
    MASKED,
    Calls,
    assert_whole,
    bloom,
    jamba,
    llama,
    mamba,
    plain,
    trained,
)
from tests.test_equivalence import opt_config


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    return install(monkeypatch)


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


def test_where_ranks_wait_for_each_other_a_failing_trial_ends_the_run(
    kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Going on would leave the other ranks inside the model."""
    trainer = mbp_trainer(with_flash(build(Failing, llama_config())), CAUSAL, tmp_path)
    rows = trainer.train_dataset
    monkeypatch.setattr(layout_choice.wrapped, "is_fsdp2", lambda trainer: True)
    with pytest.raises(RuntimeError, match=r"RuntimeError: not here\)\. MBPConfig\(padding_free=False\) pads them"):
        layout_choice.choose_layout(trainer, trainer._ranks, rows, trainer.mbp_rows.sizes(rows))
    assert trainer.mbp_rows.layout is Layout.PADDED


def test_more_rows_than_positions_change_nothing_where_that_works(kernels: Kernels, tmp_path: Path) -> None:
    model = with_flash(build(LlamaForCausalLM, llama_config(max_position_embeddings=150)))
    calls = Calls(model)
    trainer = trained(model, CAUSAL, tmp_path, max_tokens_per_micro_batch=160)
    assert trainer.mbp_rows.layout is Layout.SEGMENTS
    assert max(call["input_ids"].numel() for call in calls.evaluation) > 150


def test_nothing_is_left_of_the_choice(kernels: Kernels, tmp_path: Path) -> None:
    """Random states, which collators and dropout draw from, weights, and the mode of the model."""
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.4, seed=7)
    model = with_flash(build(BertForMaskedLM, bert_config(hidden_dropout_prob=0.1)))
    trainer = mbp_trainer(model, token_rows(), tmp_path, data_collator=collator)
    rows = trainer.train_dataset

    def state() -> str:
        generators = (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())
        weights = [float(parameter.detach().sum()) for parameter in model.parameters()]
        drawn = copy.deepcopy(collator)(rows)["labels"].tolist()
        return repr((generators, weights, drawn, model.training, trainer.mbp_rows.layout))

    before = state()
    choice = layout_choice.choose_layout(trainer, trainer._ranks, rows, trainer.mbp_rows.sizes(rows))
    assert choice.layout is Layout.SEGMENTS
    assert state() == before


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
