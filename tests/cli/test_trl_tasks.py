"""Instruction and preference tuning from end to end, on a tiny model; numbers are compared with plain PyTorch."""

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_mbp.cli import check
from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.finetune import build_trainer, main
from hf_mbp.cli.models import load_config, load_tokenizer
from hf_mbp.cli.recipe import find_task_name, read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.tasks import TASKS
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.preference_tuning import other_answers
from hf_mbp.cli.training_arguments import TRL_TASKS, training_arguments

pytestmark = [
    # TRL uses old names of transformers, and PEFT looks for a configuration to compare with.
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]
ROOT = Path(__file__).parents[2]
LETTERS = "abcdefghijklmnop"


def question(index: int) -> str:
    return f"user {LETTERS[index % 7]}"


def answer(index: int, good: bool = True) -> str:
    return " ".join(["good" if good else "bad", *LETTERS[: 1 + index % 9]])


@pytest.fixture
def sft(recipe: Callable[..., Path], chat_model: Path, write_rows: Any) -> Callable[..., Path]:
    """Writes a recipe of instruction tuning; ``None`` leaves a key out."""
    rows = write_rows("sft.jsonl", [{"q": question(i), "a": answer(i)} for i in range(23)])
    keys = {"prompt_column": "q", "answer_column": "a", **columns("instruction_tuning", rows, chat_model)}
    return lambda **changes: recipe(**{**keys, **changes})


@pytest.fixture
def dpo(recipe: Callable[..., Path], chat_model: Path, write_rows: Any) -> Callable[..., Path]:
    """Writes a recipe of preference tuning; ``None`` leaves a key out."""
    rows = write_rows(
        "dpo.jsonl", [{"q": question(i), "yes": answer(i), "no": answer(3 * i, good=False)} for i in range(23)]
    )
    keys = {"prompt_column": "q", "chosen_column": "yes", "rejected_column": "no"}
    return lambda **changes: recipe(**{**keys, **columns("preference_tuning", rows, chat_model), **changes})


def columns(task: str, rows: Path, model: Path) -> dict[str, Any]:
    return {
        "task": task,
        "model_name_or_path": str(model),
        "train_file": str(rows),
        "validation_file": str(rows),
        "bf16": False,
        "gradient_checkpointing": False,
        "max_tokens_per_micro_batch": 128,
        "per_device_eval_batch_size": 5,
    }


LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj", "up_proj"]}


def results_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "all_results.json").read_text(encoding="utf-8")))


@torch.no_grad()
def loss_by_hand(model: Any, rows: Dataset) -> float:
    """Of a mean over all labels of all rows, each run by itself."""
    losses = [
        torch.nn.functional.cross_entropy(
            model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1],
            torch.tensor(row["labels"][1:]),
            reduction="sum",
        )
        for row in rows
    ]
    return float(sum(losses)) / sum(label != -100 for row in rows for label in row["labels"][1:])


def log_likelihood(model: Any, row: dict[str, Any], side: str) -> torch.Tensor:
    """Of an answer, given its prompt."""
    ids = torch.tensor([row["prompt_ids"] + row[side]])
    chances = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return chances[range(ids.shape[1] - 1), ids[0, 1:]][len(row["prompt_ids"]) - 1 :].sum()


@torch.no_grad()
def rewards_by_hand(model: Any, reference: Any, rows: Dataset, beta: float) -> torch.Tensor:
    """Of the chosen and the rejected answer of each row, ``[rows, 2]``."""
    sides = ("chosen_ids", "rejected_ids")
    of_models = [[[log_likelihood(m, row, side) for side in sides] for row in rows] for m in (model, reference)]
    return beta * (torch.tensor(of_models[0]) - torch.tensor(of_models[1]))


# Instruction tuning


def test_adapters_learn_and_are_saved(sft: Callable[..., Path], tmp_path: Path, chat_model: Path) -> None:
    assert main([str(sft(max_steps=30, learning_rate="3e-2", **LORA))]) == 0
    run = tmp_path / "run"
    results = results_of(run)
    assert results["eval_perplexity"] < 0.85 * results["eval_before_perplexity"]
    assert results["mbp_cells"] > results["mbp_tokens"] > 0
    assert not (run / "model.safetensors").exists()
    rows = build_trainer(read_recipe([str(sft()), "--output_dir", str(tmp_path / "other")])).eval_dataset
    base = AutoModelForCausalLM.from_pretrained(chat_model)
    assert results["eval_before_loss"] == pytest.approx(loss_by_hand(base, rows), rel=1e-5)
    adapted = PeftModel.from_pretrained(base, run)
    assert results["eval_loss"] == pytest.approx(loss_by_hand(adapted, rows), rel=1e-5)
    assert results["eval_perplexity"] == pytest.approx(math.exp(results["eval_loss"]))
    assert AutoTokenizer.from_pretrained(run).chat_template is not None


@pytest.mark.parametrize("options", [LORA, {}], ids=["adapters", "all weights"])
def test_the_readme_is_the_users_or_ours(
    sft: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    """And neither the card that TRL writes with each checkpoint nor the form that PEFT saves with a model."""
    readme = tmp_path / "run" / "README.md"
    file = str(sft(max_steps=1, save_strategy="steps", save_steps=1, eval_before_training=False, **options))
    assert main([file]) == 0
    assert "<!-- This card was written by hf-mbp train. -->" in readme.read_text()
    readme.write_text("# My project\n")
    assert main([file, "--overwrite_output_dir"]) == 0
    assert readme.read_text() == "# My project\n"
    assert "no model card is written over it" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_evaluation_does_not_depend_on_the_batch_size(task: str, request: pytest.FixtureRequest) -> None:
    """23 rows: the mean of the batches' means would give the last, smaller batch too much weight."""
    write = request.getfixturevalue(task)
    trainer = build_trainer(read_recipe([str(write(max_steps=2, learning_rate=0.03))]))
    trainer.train()
    outcomes = []
    for size in (1, 5, 23):
        trainer.args.per_device_eval_batch_size = size
        outcomes.append({name: value for name, value in trainer.evaluate().items() if is_metric(name)})
    assert len(outcomes[0]) >= 4
    for outcome in outcomes[1:]:
        assert outcome == pytest.approx(outcomes[0], rel=1e-4, abs=1e-6)


def is_metric(name: str) -> bool:
    return name.startswith("eval_") and not name.endswith(("_runtime", "_per_second", "_time"))


def test_the_loss_may_be_on_all_of_the_conversation(sft: Callable[..., Path]) -> None:
    answers, everything = (
        build_trainer(read_recipe([str(sft()), "--assistant_only_loss", value])).train_dataset
        for value in ("true", "false")
    )
    assert everything["input_ids"][:] == answers["input_ids"][:] == everything["labels"][:]
    assert all(-100 in labels for labels in answers["labels"])


def test_options_of_trl_reach_its_trainer(sft: Callable[..., Path], dpo: Callable[..., Path]) -> None:
    tuned = build_trainer(read_recipe([str(sft(packing=True, max_length=48)), "--loss_type", "dft"]))
    assert (tuned.args.loss_type, tuned.args.packing, tuned.args.learning_rate) == ("dft", True, 1e-2)
    assert len(tuned.train_dataset) < 23
    assert max(map(len, tuned.train_dataset["input_ids"])) <= 48
    preferring = build_trainer(read_recipe([str(dpo(loss_type="ipo")), "--beta", "0.3"]))
    assert (preferring.loss_types, preferring.beta) == (["ipo"], 0.3)


def test_packed_rows_are_trained_on(sft: Callable[..., Path], tmp_path: Path) -> None:
    assert main([str(sft(packing=True, max_length=48, max_steps=2))]) == 0
    assert results_of(tmp_path / "run")["train_loss"] > 0


# Preference tuning


def test_preferences_are_learned(dpo: Callable[..., Path], tmp_path: Path, chat_model: Path) -> None:
    assert main([str(dpo(max_steps=20, learning_rate="1e-2", beta=0.3))]) == 0
    results = results_of(tmp_path / "run")
    assert results["eval_before_loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert results["eval_before_rewards/accuracies"] == 0  # no reward differs yet
    assert results["eval_rewards/accuracies"] > 0.9
    rows = build_trainer(read_recipe([str(dpo()), "--output_dir", str(tmp_path / "other")])).eval_dataset
    reference, trained = (AutoModelForCausalLM.from_pretrained(folder) for folder in (chat_model, tmp_path / "run"))
    rewards = rewards_by_hand(trained, reference, rows, 0.3)
    margins = rewards[:, 0] - rewards[:, 1]
    assert results["eval_rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-4)
    assert results["eval_rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))
    expected = -float(torch.nn.functional.logsigmoid(margins).mean())
    assert results["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_the_reference_of_adapters_is_the_model_without_them(
    dpo: Callable[..., Path], tmp_path: Path, chat_model: Path
) -> None:
    assert main([str(dpo(max_steps=20, learning_rate="3e-2", **LORA))]) == 0
    results = results_of(tmp_path / "run")
    assert results["eval_before_loss"] == pytest.approx(math.log(2), rel=1e-5)
    rows = build_trainer(read_recipe([str(dpo()), "--output_dir", str(tmp_path / "other")])).eval_dataset
    base, other = (AutoModelForCausalLM.from_pretrained(chat_model) for _ in range(2))
    rewards = rewards_by_hand(PeftModel.from_pretrained(other, tmp_path / "run"), base, rows, 0.1)
    assert results["eval_rewards/chosen"] == pytest.approx(float(rewards[:, 0].mean()), rel=1e-3)
    assert float((rewards[:, 0] - rewards[:, 1]).mean()) > 0.1


def prepare(model: Path, rows: list[dict[str, Any]], **options: Any) -> TaskSetup:
    arguments = ModelArguments(model_name_or_path=str(model))
    splits = Splits(train=Dataset.from_list(rows), validation=None, train_origin="train.x", validation_origin="test.x")
    config = load_config(arguments)
    data = DataArguments(train_file="train.x", **options)
    return TASKS["preference_tuning"](splits, load_tokenizer(arguments, config), config, arguments, data)


TEXTS = {"prompt_column": "q", "chosen_column": "yes", "rejected_column": "no"}
WHOLE = {"chosen_column": "yes", "rejected_column": "no"}


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize("form", ["texts", "conversations", "whole conversations"])
def test_pairs_as_texts_or_conversations(chat_model: Path, form: str) -> None:
    ask, yes, no = [said("user", "a b")], [said("assistant", "good")], [said("assistant", "bad c")]
    row = {
        "texts": {"q": "a b", "yes": "good", "no": "bad c"},
        "conversations": {"q": ask, "yes": yes, "no": no},
        "whole conversations": {"q": "ignored", "yes": ask + yes, "no": ask + no},
    }[form]
    setup = prepare(chat_model, [row], **(WHOLE if form == "whole conversations" else TEXTS))
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    (made,) = setup.train
    texts = [tokenizer.decode(made[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    start = "<|im_start|> user a b <|im_end|> <|im_start|> assistant"
    assert texts == [start, "good <|im_end|>", "bad c <|im_end|>"]


def test_answers_are_cut_and_pairs_without_a_difference_left_out(
    chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"q": "a", "yes": "b c d", "no": "e"},
        {"q": "a", "yes": "b c d", "no": "b c e"},
        {"q": "a b c d e f", "yes": "g", "no": "h"},
    ]
    setup = prepare(chat_model, rows, max_length=8, **TEXTS)
    (made,) = setup.train
    assert [len(made[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] == [6, 2, 2]
    out = capsys.readouterr().out
    assert "train: 1 rows, tokens a pair of rows: median 16, longest 16; 1 rows cut after 8 tokens (max_length)" in out
    assert "2 rows left out" in out


def test_another_rows_answer_is_as_long_and_the_same_each_time() -> None:
    answers = ["x" * (1 + (7 * i) % 40) + str(i) for i in range(200)]
    others = other_answers(answers, "x")
    assert others == other_answers(answers, "x")
    assert all(other in answers and other != own for own, other in zip(answers, others, strict=True))
    assert max(abs(len(own) - len(other)) for own, other in zip(answers, others, strict=True)) <= 3
    assert len(set(others)) > 100  # not the same few
    assert other_answers(["a", "a", "b"], "x") == ["b", "b", "a"]


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({}, {"prompt_column": None}, "chosen_column is missing"),
        ({}, {"prompt_column": "q", "chosen_column": "yes"}, "write either rejected_column, .* or rejected_from_other"),
        ({}, {**TEXTS, "rejected_from_other_rows": True}, "write either rejected_column"),
        (
            {},
            {"chosen_column": "yes", "rejected_from_other_rows": True},
            "rejected_from_other_rows needs prompt_column",
        ),
        ({}, {**TEXTS, "rejected_column": "none"}, r"no column 'none' \(option rejected_column\)"),
        ({}, WHOLE, "has no question before it; write prompt_column"),
        ({"no": None}, TEXTS, r"column 'no' \(option rejected_column\): 1 of 1 rows are empty"),
        ({"no": 3}, TEXTS, "must hold texts, or conversations .* but one has 3"),
        ({"yes": [said("user", "a")]}, TEXTS, "must be alike up to the last message"),
        ({"yes": [said("user", "b"), said("assistant", "a")]}, TEXTS, "must be alike up to the last message"),
        (
            {},
            {"prompt_column": "q", "chosen_column": "yes", "rejected_from_other_rows": True},
            "needs two rows with different answers",
        ),
        (
            {"yes": [said("assistant", "a")]},
            {"prompt_column": "q", "chosen_column": "yes", "rejected_from_other_rows": True},
            "needs texts in chosen_column",
        ),
        ({"yes": "same", "no": "same"}, TEXTS, "none of the 1 train rows has anything to learn from"),
    ],
)
def test_mistakes_in_preferences(chat_model: Path, row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(chat_model, [{"q": "a", "yes": "b", "no": "c", **row}], **options)


def test_a_model_without_a_chat_template(encoder: Path) -> None:
    with pytest.raises(UserError, match="has no chat template for conversations"):
        prepare(encoder, [{"q": "a", "yes": "b", "no": "c"}], **TEXTS)


# Two processes


@pytest.mark.slow
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_two_processes_report_what_one_does(task: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """With the same 16 rows in each step, and 20 for the evaluation, which fill its batches."""
    samples = {"max_train_samples": 16, "max_eval_samples": 20}
    keys = {"max_steps": 2, "learning_rate": 0.03, **samples, **LORA}
    write = request.getfixturevalue(task)
    assert main([str(write(output_dir=str(tmp_path / "one"), **keys))]) == 0
    recipe = write(output_dir=str(tmp_path / "two"), per_device_train_batch_size=8, **keys)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [*launch, "-m", "hf_mbp.cli", "train", str(recipe)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    one, two = results_of(tmp_path / "one"), results_of(tmp_path / "two")
    metrics = [key for key in one if is_metric(key)]
    assert len(metrics) >= 6
    assert {key: two[key] for key in metrics} == pytest.approx({key: one[key] for key in metrics}, rel=1e-4)
    assert two["mbp_tokens"] == one["mbp_tokens"]
    assert abs(one["eval_loss"] - one["eval_before_loss"]) > 0.01


# The other scripts


@pytest.mark.parametrize("adapters", [{}, LORA])
def test_check(
    sft: Callable[..., Path], dpo: Callable[..., Path], adapters: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for write in (sft, dpo):
        assert check.main([str(write(**adapters))]) == 0
        assert "\nexact: micro-batches give the gradient of the whole batch\n" in capsys.readouterr().out


def test_dry_run_of_adapters(
    sft: Callable[..., Path], dpo: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer takes the model without them; the plan is that of the model with them."""
    for write in (sft, dpo):
        assert main([str(write(dry_run=True, **LORA))]) == 0
        out = capsys.readouterr().out
        assert "of which 384 are trained" in out  # 3 x (4 x 16 + 16 x 4)
        assert "first step           16 rows in" in out
    assert not (tmp_path / "run").exists()


def test_plan(sft: Callable[..., Path], dpo: Callable[..., Path]) -> None:
    cpu = torch.device("cpu")
    plain, adapted = (
        plan_run(read_recipe([str(sft(**adapters)), "--memory_limit", "4GiB"]), cpu) for adapters in ({}, LORA)
    )
    lengths = [8 + 2 + i % 9 for i in range(23)]  # the question and its template, the answer
    assert plain.lengths.tolist() == adapted.lengths.tolist() == lengths
    assert adapted.largest[1].optimizer_bytes < 0.5 * plain.largest[1].optimizer_bytes
    packed = plan_run(read_recipe([str(sft(packing=True, max_length=48)), "--memory_limit", "4GiB"]), cpu)
    assert max(packed.lengths) <= 48
    assert sum(packed.lengths) == sum(lengths)
    pairs, paired_adapters = (
        plan_run(read_recipe([str(dpo(**adapters)), "--memory_limit", "4GiB"]), cpu) for adapters in ({}, LORA)
    )
    assert pairs.lengths.tolist() == [2 * (8 + max(2 + i % 9, 2 + 3 * i % 9)) for i in range(23)]
    # the reference is a second model, that of adapters is the same
    assert pairs.largest[1].parameter_bytes == 2 * plain.largest[1].parameter_bytes
    assert paired_adapters.largest[1].parameter_bytes == adapted.largest[1].parameter_bytes


# Options


def test_the_task_says_what_the_options_are(sft: Callable[..., Path], recipe: Callable[..., Path]) -> None:
    assert find_task_name(["--beta", "0.1", str(sft()), "--seed", "1"]) == "instruction_tuning"
    assert find_task_name([str(sft()), "--task=preference_tuning"]) == "preference_tuning"
    assert find_task_name(["--seed", "1"]) == "text_classification"
    assert not hasattr(read_recipe([str(recipe())]).train, "beta")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_only_loss": True}, "'completion_only_loss' is not a known key"),
        ({"beta": 0.1}, "'beta' is not a known key"),
        ({"loss_type": "hinge"}, "invalid choice: 'hinge'"),
        ({"packing": True}, "packing needs max_length"),
        ({"eval_packing": True, "max_length": 48}, "eval_packing goes with packing"),
        ({"lora_r": 0}, "lora_r is 0; write a whole number from 1"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5; write a number from 0"),
        ({"task": "language_modeling", "use_peft": True}, "adapters are trained by instruction_tuning and preference"),
        ({**LORA, "lora_target_modules": ["nowhere"]}, "the trainer refuses: Target modules"),
    ],
)
def test_mistakes_are_told_in_one_line(
    sft: Callable[..., Path], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sft(**changes))]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize("adapters", [{}, LORA])
@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_a_dry_run_shows_the_plan(
    task: str, adapters: dict[str, Any], request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """TRL changes how a model computes its loss, and moves the reference, as soon as a trainer is made."""
    assert main([str(request.getfixturevalue(task)(**adapters)), "--dry_run"]) == 0
    assert "dry run: nothing was trained" in capsys.readouterr().out


def test_losses_with_two_denominators_are_refused(dpo: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(dpo(loss_type=["sigmoid", "sft"]))]) == 2
    assert "two denominators" in capsys.readouterr().err


@pytest.mark.parametrize(("package", "changes"), [("trl", {}), ("peft", LORA)])
def test_what_is_missing_is_named(
    sft: Callable[..., Path],
    package: str,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "hf_mbp.cli.training_arguments.find_spec",
        lambda name: None if name == package else importlib.util.find_spec(name),
    )
    assert main([str(sft(**changes))]) == 2
    assert f"needs the package {package}; run: pip install 'hf-mbp[trl]'" in capsys.readouterr().err


def test_help_of_a_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--task", "preference_tuning", "--help_all"]) == 0
    text = capsys.readouterr().out
    assert "training (trl.DPOConfig):" in text
    assert "--beta" in text


@pytest.mark.parametrize("task", TRL_TASKS)
def test_the_arguments_are_pickled_without_the_token(task: str, tmp_path: Path) -> None:
    token = "hf_only_for_this_test"  # noqa: S105 - of nobody
    arguments = training_arguments(task)(str(tmp_path), hub_token=token, use_cpu=True)
    assert arguments.hub_token == token
    assert token.encode() not in pickle.dumps(arguments)
