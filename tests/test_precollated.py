"""Batches that the workers collate give the gradients that rows collated by the step give, and no more padding."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from hf_mbp import MBPConfig, MBPTrainer, check_equivalence
from hf_mbp.collate import Inputs
from hf_mbp.precollated import Collated, CollateInWorkers, cut_out
from tests.helpers import (
    Pad,
    Recorder,
    bert_config,
    build,
    gpt2_config,
    llama_config,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    whole_gradients,
    with_labels,
)
from tests.test_check import ClassWeighted
from tests.test_equivalence import HEAD_IN_FLOAT32, HEADS, IN_FLOAT64, causal_rows, class_rows

ROOT = Path(__file__).parents[1]

pytestmark = [
    # Of Python 3.12 and of the data loader, where there are fewer cores than workers.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]


def seq2seq_rows(num_masked: int = 0) -> list[dict[str, Any]]:
    """The first `num_masked` tokens of every target do not count, as the prompt of a transcript does not."""
    targets = token_rows(seed=7, low=5, high=12)
    return with_labels(token_rows(), lambda i, row: [-100] * num_masked + targets[i]["input_ids"][num_masked:])


def classifier() -> Any:
    return build(BertForSequenceClassification, bert_config(num_labels=3))


def in_workers(model: Any, rows: Any, folder: Path, **changes: Any) -> MBPTrainer:
    options = {"collate_in": "workers", "dataloader_num_workers": 2, "on_inexact": "error"}
    return mbp_trainer(model, rows, folder, **{**options, **changes})


def trained(trainer: MBPTrainer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of the first step, and the metrics of the run."""
    recorder = Recorder()
    trainer.add_callback(recorder)
    metrics = trainer.train().metrics
    assert metrics["mbp_micro_batches"] >= 3
    return recorder.gradients[0], metrics


def calls_of(model: Any) -> list[Inputs]:
    """Fills with the inputs of the calls that train; probing has no gradients."""
    calls: list[Inputs] = []

    def note(module: Any, args: Any, kwargs: Inputs) -> None:
        if torch.is_grad_enabled():
            calls.append(kwargs)

    model.register_forward_pre_hook(note, with_kwargs=True)
    return calls


# Gradients

SPLIT_BY_BATCH = [(head, accumulation) for head in HEADS for accumulation in (1, 4)]
SPLIT_BY_BATCH.remove(("question_answering", 4))  # its loss depends on the width, which each batch has for itself


@pytest.mark.parametrize(("head", "accumulation"), SPLIT_BY_BATCH)
def test_head_equals_the_whole_batch(head: str, accumulation: int, tmp_path: Path) -> None:
    model_class, config, make_rows, collate, bound = HEADS[head]
    model, rows = build(model_class, config()), make_rows()
    whole_loss, expected = whole_gradients(model, lambda m: m(**collate(rows)).loss)
    trainer = in_workers(
        model,
        rows,
        tmp_path,
        data_collator=collate,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    gradients, _ = trained(trainer)
    assert relative_error(expected, gradients) < bound
    assert trainer.state.log_history[0]["loss"] == pytest.approx(whole_loss, rel=max(bound, 1e-7))


LEFT_PADDED = {"gpt2": (GPT2LMHeadModel, gpt2_config), "llama": (LlamaForCausalLM, llama_config)}


@pytest.mark.parametrize("head", LEFT_PADDED)
def test_left_padded_rows_equal_the_whole_batch_padded_on_the_right(head: str, tmp_path: Path) -> None:
    """On the right padding follows the tokens: it moves no position and predicts no label."""
    model_class, config = LEFT_PADDED[head]
    model, rows = build(model_class, config()), causal_rows()
    _, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    calls = calls_of(model)
    gradients, _ = trained(in_workers(model, rows, tmp_path, data_collator=Pad(side="left"), check_at_start=False))
    assert relative_error(expected, gradients) < HEAD_IN_FLOAT32
    assert all(call["attention_mask"][:, -1].all() for call in calls)
    assert all(call["attention_mask"][:, 0].any() for call in calls)


def test_masked_first_target_tokens_keep_their_place(tmp_path: Path) -> None:
    """The decoder is fed with the labels: without their first columns it would start in the middle."""
    model, rows = build(T5ForConditionalGeneration, t5_config()), seq2seq_rows(num_masked=3)
    _, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    trainer = in_workers(model, rows, tmp_path)
    gradients, _ = trained(trainer)
    assert relative_error(expected, gradients) < IN_FLOAT64
    sizes = [[len(row["input_ids"]), len(row["labels"])] for row in rows]
    assert trainer.mbp_rows.sizes(trainer.mbp_rows.sample(16)).tolist() == sizes


def test_decoder_inputs_of_the_collator(tmp_path: Path) -> None:
    """As DataCollatorForSeq2Seq makes them if it knows the model; here the end of each target does not count."""
    rows = [
        {
            **row,
            "decoder_input_ids": [0, *row["labels"][:-1]],
            "decoder_attention_mask": [1] * len(row["labels"]),
            "labels": [*row["labels"][:-1], -100],
        }
        for row in seq2seq_rows()
    ]
    model = build(T5ForConditionalGeneration, t5_config())
    _, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    gradients, _ = trained(in_workers(model, rows, tmp_path))
    assert relative_error(expected, gradients) < IN_FLOAT64


SAME_AS_IN_MAIN: dict[str, tuple[Any, Any, Any]] = {
    "labels": (classifier, class_rows, Pad()),
    "left padding": (lambda: build(GPT2LMHeadModel, gpt2_config()), causal_rows, Pad(side="left")),
    "targets": (lambda: build(T5ForConditionalGeneration, t5_config()), seq2seq_rows, Pad()),
}


@pytest.mark.parametrize("case", SAME_AS_IN_MAIN)
def test_workers_and_main_give_the_same(case: str, tmp_path: Path) -> None:
    model, rows, collate = SAME_AS_IN_MAIN[case]
    ours, metrics = trained(in_workers(model(), rows(), tmp_path, data_collator=collate))
    in_main, metrics_in_main = trained(mbp_trainer(model(), rows(), tmp_path, data_collator=collate))
    assert relative_error(in_main, ours) < IN_FLOAT64
    counts = ("mbp_micro_batches", "mbp_cells", "mbp_tokens", "mbp_padding_fraction", "mbp_padding_fraction_unsplit")
    assert {name: metrics[name] for name in counts} == {name: metrics_in_main[name] for name in counts}


# Widths


@pytest.mark.parametrize("side", ["right", "left"])
def test_no_column_is_padding_in_all_rows(side: str, tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config())
    calls = calls_of(model)
    trainer = in_workers(model, causal_rows(), tmp_path, data_collator=Pad(side=side), check_at_start=False)
    _, metrics = trained(trainer)
    widths = [call["input_ids"].shape[1] for call in calls]
    assert widths == [int(call["attention_mask"].sum(dim=1).max()) for call in calls]
    assert metrics["mbp_cells"] == sum(call["input_ids"].numel() for call in calls)
    assert metrics["mbp_tokens"] == sum(len(row["input_ids"]) for row in causal_rows())
    assert metrics["mbp_padding_fraction"] < metrics["mbp_padding_fraction_unsplit"] / 2


def test_targets_are_as_wide_as_the_longest(tmp_path: Path) -> None:
    model = build(T5ForConditionalGeneration, t5_config())
    calls = calls_of(model)
    _, metrics = trained(in_workers(model, seq2seq_rows(), tmp_path, check_at_start=False))
    assert all((call["labels"] != -100).any(dim=0).all() for call in calls)
    assert all(call["attention_mask"].any(dim=0).all() for call in calls)
    assert metrics["mbp_padding_fraction"] < metrics["mbp_padding_fraction_unsplit"]


def test_question_answering_keeps_the_width(tmp_path: Path) -> None:
    model_class, config, make_rows, collate, _ = HEADS["question_answering"]
    model, rows = build(model_class, config()), make_rows()
    calls = calls_of(model)
    trained(in_workers(model, rows, tmp_path, check_at_start=False))
    assert {call["input_ids"].shape[1] for call in calls} == {collate(rows)["input_ids"].shape[1]}


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_multiple_of_the_collator_is_kept(side: str, tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config())
    calls = calls_of(model)
    collate = Pad(side=side, pad_to_multiple_of=8)
    trainer = in_workers(model, causal_rows(), tmp_path, data_collator=collate, check_at_start=False)
    trained(trainer)
    widths = [call["input_ids"].shape[1] for call in calls]
    longest = [int(call["attention_mask"].sum(dim=1).max()) for call in calls]
    assert widths == [-(-length // 8) * 8 for length in longest]
    assert len(set(widths)) >= 2


# What is refused, and what is found


def test_an_unknown_place_is_refused() -> None:
    with pytest.raises(ValueError, match=r"collate_in='x' is unknown\. Write one of main, workers\."):
        MBPConfig(collate_in="x")


def test_rows_laid_end_to_end_are_refused(tmp_path: Path) -> None:
    def flatten(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {
            "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
            "labels": torch.tensor([[token for row in rows for token in row["labels"]]]),
        }

    model = build(LlamaForCausalLM, llama_config())
    trainer = in_workers(model, causal_rows(), tmp_path, data_collator=flatten)
    with pytest.raises(ValueError, match=r"'input_ids' has 1 entries for 16 rows\. Set collate_in='main'\."):
        trainer.train()


def test_rows_that_are_all_alike_do_not_hide_a_wrong_count(tmp_path: Path) -> None:
    """The eight shortest rows have one length and one class, with which any count would pass."""
    alike = [{"input_ids": [7, 8, 9], "attention_mask": [1] * 3, "labels": 0}] * 20
    others = [{"input_ids": [7, 8, 9, 5], "attention_mask": [1] * 4, "labels": 1 + index % 2} for index in range(12)]
    trainer = in_workers(classifier(), alike + others, tmp_path, trainer_class=ClassWeighted)
    report = check_equivalence(trainer)
    assert not report.is_exact
    assert any("mean over other items than num_items" in finding for finding in report.findings)


# A batch cut into rows


def collated() -> Collated:
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]),
        "labels": torch.tensor([0, 1, 2]),
        "targets": torch.arange(15.0).view(3, 5),
        "images": torch.arange(36.0).view(3, 3, 2, 2),
        "texts": ["a", "b", "c"],
        "pairs": (("a", 1), ("b", 2), ("c", 3)),
        "names": ["x", "y"],
        "return_loss": True,
        "scale": torch.tensor(0.5),
        "nothing": None,
    }
    return Collated(inputs, 3)


def cut(batch: Collated, indices: list[int], **changes: Any) -> Inputs:
    rows = batch.unpack()
    options = {"has_targets": False, "multiple_of": 1, "keep_width": False}
    return cut_out([rows[index] for index in indices], **{**options, **changes})


def test_rows_are_cut_out_in_the_order_asked_for() -> None:
    inputs = cut(collated(), [2, 1])
    assert inputs["input_ids"].tolist() == [[5, 6], [4, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert inputs["labels"].tolist() == [2, 1]
    assert inputs["targets"].tolist() == [[10, 11, 12, 13, 14], [5, 6, 7, 8, 9]]
    assert torch.equal(inputs["images"], torch.arange(36.0).view(3, 3, 2, 2)[[2, 1]])
    assert inputs["texts"] == ["c", "b"]
    assert inputs["pairs"] == [("c", 3), ("b", 2)]


def test_what_has_no_entries_for_rows_is_kept() -> None:
    batch = collated()
    inputs = cut(batch, [2, 1])
    assert inputs.keys() == batch.inputs.keys()
    assert all(inputs[key] is batch.inputs[key] for key in ("names", "return_loss", "scale", "nothing"))


def test_the_width_is_kept_if_asked() -> None:
    assert cut(collated(), [1], keep_width=True)["input_ids"].tolist() == [[4, 0, 0, 0]]


def test_cutting_out_leaves_the_batch_as_it_was() -> None:
    batch = collated()
    cut(batch, [1])["input_ids"].fill_(9)
    assert torch.equal(batch.inputs["input_ids"], collated().inputs["input_ids"])


def test_a_row_tells_its_fields_and_lengths() -> None:
    row = collated().unpack()[2]
    assert row.parts == (2,)
    fields = row.fields()
    assert fields["input_ids"].tolist() == [5, 6, 0, 0]
    assert (fields["texts"], fields["pairs"], fields["names"]) == ("c", ("c", 3), ["x", "y"])
    assert int(fields["labels"]) == 2


def test_a_row_of_several_columns_has_several_lengths() -> None:
    masks = {"a_attention_mask": torch.tensor([[1, 1, 0]]), "b_attention_mask": torch.tensor([[0, 1]])}
    decoder = {"decoder_attention_mask": torch.ones(1, 9), "labels": torch.tensor([[3, 4, -100]])}
    (row,) = Collated({**masks, **decoder}, 1).unpack()
    assert row.parts == (2, 1)
    assert row.num_targets == 2


def test_a_row_without_labels_has_no_targets() -> None:
    (row,) = Collated({"input_ids": torch.ones(1, 3, dtype=torch.long)}, 1).unpack()
    assert row.num_targets == 0


MEDIA = {"pixel_values": (2, 3, 2, 2), "input_features": (2, 3, 5)}


@pytest.mark.parametrize("key", MEDIA)
def test_images_and_sounds_stay_whole_beside_a_text_as_wide_as_they_are_high(key: str) -> None:
    media = torch.randn(*MEDIA[key])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    sound = {"feature_attention_mask": torch.ones(2, 5)} if key == "input_features" else {}
    inputs = cut(Collated({"input_ids": mask * 7, "attention_mask": mask, key: media, **sound}, 2), [1])
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert torch.equal(inputs[key], media[1:])


def test_embeddings_are_cut_like_tokens() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    inputs = cut(Collated({"inputs_embeds": torch.ones(2, 3, 8), "attention_mask": mask}, 2), [1])
    assert inputs["inputs_embeds"].shape == (1, 1, 8)


def test_tensors_in_a_dictionary_are_cut_too() -> None:
    """A dictionary whose tensors have an entry a row is one column of several parts."""
    nested = {"scale": torch.tensor([0.1, 0.2, 0.3]), "more": {"texts": ["a", "b", "c"]}}
    inputs = cut(Collated({"labels": torch.arange(3), "extra": nested}, 3), [2, 0])
    assert inputs["extra"]["scale"].tolist() == pytest.approx([0.3, 0.1])
    assert inputs["extra"]["more"]["texts"] == ["c", "a"]


def test_a_collator_may_return_any_mapping() -> None:
    class Encoding(dict[str, Any]):
        pass

    batch = CollateInWorkers(lambda rows: Encoding(labels=torch.tensor([row["labels"] for row in rows])))(class_rows())
    assert [int(row.fields()["labels"]) for row in batch.unpack()] == [row["labels"] for row in class_rows()]


def test_the_collator_keeps_the_attributes_that_trainers_ask_for() -> None:
    collator = CollateInWorkers(Pad(side="left", pad_to_multiple_of=8))
    assert (collator.side, collator.pad_to_multiple_of) == ("left", 8)


# Processes of their own


def run_script(folder: Path, script: str, *arguments: str, seconds: float) -> str:
    """Output of a program; one that hangs is ended and fails."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(file), str(folder), *arguments]
    done = subprocess.run(command, env=environment, timeout=seconds, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SPAWNED = """
    import sys
    import torch
    from transformers import BertForSequenceClassification
    from tests.helpers import *

    if __name__ == "__main__":
        torch.multiprocessing.set_start_method("spawn")
        model = build(BertForSequenceClassification, bert_config(num_labels=3))
        rows = with_labels(token_rows(), lambda index, row: index % 3)
        _, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
        recorder = Recorder()
        options = {"collate_in": "workers", "dataloader_num_workers": 2, "callbacks": [recorder]}
        metrics = mbp_trainer(model, rows, sys.argv[1], **options).train().metrics
        assert metrics["mbp_micro_batches"] >= 3, metrics
        assert relative_error(expected, recorder.gradients[0]) < 1e-12
        print("same gradient from", torch.multiprocessing.get_start_method())
"""


def test_spawned_workers_collate(tmp_path: Path) -> None:
    assert "same gradient from spawn" in run_script(tmp_path, SPAWNED, seconds=120)


FEW_DESCRIPTORS = """
    import resource, sys
    import torch
    from hf_mbp import MBPConfig, MBPTrainer
    from tests.helpers import Pad, Recorder, arguments, lengths, relative_error, whole_gradients

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(60, 1, dtype=torch.float64)

        def forward(self, input_ids, attention_mask, labels, extra):
            values = self.embedding(input_ids)[..., 0] * attention_mask
            value = values.sum(dim=1) / attention_mask.sum(dim=1) * extra["scale"]
            return {"loss": (value - labels).square().mean()}

    class Collate(Pad):
        def __call__(self, rows):
            extra = {"scale": torch.stack([row["extra"]["scale"] for row in rows])}
            padded = super().__call__([{k: v for k, v in row.items() if k != "extra"} for row in rows])
            return {**padded, "extra": extra}

    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    torch.multiprocessing.set_sharing_strategy("file_descriptor")
    rows = [
        {
            "input_ids": torch.arange(length) + index % 30,
            "attention_mask": torch.ones(length, dtype=torch.long),
            "labels": torch.tensor(index / 4096, dtype=torch.float64),
            "extra": {"scale": torch.tensor(1.0 + index % 7, dtype=torch.float64)},
        }
        for index, length in enumerate(lengths(4096))
    ]
    model, recorder = Model(), Recorder()
    _, expected = whole_gradients(model, lambda m: m(**Collate()(rows))["loss"])
    trainer = MBPTrainer(
        model=model,
        args=arguments(
            sys.argv[1], per_device_train_batch_size=512, gradient_accumulation_steps=8, dataloader_num_workers=4
        ),
        train_dataset=rows,
        data_collator=Collate(),
        callbacks=[recorder],
        mbp_config=MBPConfig(max_tokens_per_micro_batch=4096, collate_in=sys.argv[2]),
    )
    metrics = trainer.train().metrics
    assert metrics["mbp_micro_batches"] >= 16, metrics
    error = relative_error(expected, recorder.gradients[0])
    assert error < 1e-12, error
    print("4096 rows in", metrics["mbp_micro_batches"], "micro-batches, error", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are shared on Linux only")
@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_many_rows_of_tensors_need_few_file_descriptors(collate_in: str, tmp_path: Path) -> None:
    """4,096 rows of 4 tensors from 4 workers: one descriptor a tensor would be 16 times the usual limit, and hang."""
    assert "4096 rows in" in run_script(tmp_path, FEW_DESCRIPTORS, collate_in, seconds=60)


def test_tensors_inside_of_mappings_need_an_entry_a_row() -> None:
    inner = {"patches": torch.zeros(6, 2)}
    with pytest.raises(ValueError, match="'patches' has 6 entries for 3 rows"):
        Collated({"input_ids": torch.zeros(3, 4), "vision": inner}, 3).unpack()


def test_arrays_are_cut_as_tensors_are() -> None:
    batch = Collated({"input_ids": torch.zeros(3, 4), "weights": np.array([1.0, 2.0, 3.0])}, 3)
    assert cut(batch, [2, 0])["weights"].tolist() == [3.0, 1.0]


def test_a_collator_that_returns_no_mapping_is_named(tmp_path: Path) -> None:
    for place in ("main", "workers"):
        trainer = mbp_trainer(
            build(BertForSequenceClassification, bert_config(num_labels=3)),
            class_rows(),
            tmp_path,
            data_collator=list,
            collate_in=place,
        )
        with pytest.raises(TypeError, match="The data collator returned a list, and must return a dictionary"):
            trainer.train()
