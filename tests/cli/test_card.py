"""The model card: a head that the Hub can read, and a body that says what was done."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from hf_mbp.cli import card as card_module
from hf_mbp.cli.card import card_data
from hf_mbp.cli.finetune import main
from hf_mbp.cli.recipe import Recipe, read_recipe
from hf_mbp.cli.tasks import TASKS

METRICS = {"eval_before_accuracy": 0.5, "eval_accuracy": 0.9, "eval_loss": 0.1, "eval_runtime": 2.0}


@pytest.fixture
def written(recipe: Callable[..., Path], tmp_path: Path) -> Path:
    assert main([str(recipe(max_steps=3, max_tokens_per_micro_batch=64, gradient_accumulation_steps=2))]) == 0
    return tmp_path / "run" / "README.md"


def test_what_it_says(written: Path, encoder: Path, tmp_path: Path) -> None:
    text = written.read_text(encoding="utf-8")
    results = json.loads((written.parent / "all_results.json").read_text(encoding="utf-8"))
    accuracies = [f"{results[key]:.4g}" for key in ("eval_before_accuracy", "eval_accuracy")]
    assert f"| accuracy | {accuracies[0]} | {accuracies[1]} |" in text
    rows = dict(re.findall(r"^\| ([\w -]+) \| (.+) \|$", text.split("## Training")[1], flags=re.MULTILINE))
    assert rows["base model"] == encoder.name
    assert rows["data"] == "train.jsonl, 40 rows"
    assert re.fullmatch(r"\d+ rows", rows["evaluated on"])
    assert rows["mini-batch"] == "32 rows, on 1 x cpu"
    assert re.fullmatch(r"3 \(1\.\d+ epochs\)", rows["optimizer steps"])
    assert rows["budget"] == "at most 64 tokens a micro-batch, as asked"
    assert rows["padding"].startswith(f"{results['mbp_padding_fraction']:.1%} of".replace("%", " %"))
    assert re.fullmatch(r"Checked to be exact: split and whole gradient differ by [\d.e-]+\.", rows["exactness"])
    assert "![loss](loss.png)" in text
    assert "![padding](padding.png)" in text
    assert "hf-mbp train recipe.yaml" in text
    assert "transformers " in text.split("## Versions")[1]
    assert str(tmp_path) not in text, "cards are made to be shared"


def test_it_says_of_which_step_the_weights_are(recipe: Callable[..., Path], tmp_path: Path) -> None:
    saving = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "learning_rate": 10.0}
    assert main([str(recipe(max_steps=3, **saving, **best))]) == 0
    logs = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = {log["step"]: log["eval_loss"] for log in reversed(logs) if "eval_loss" in log}  # the last is of the best
    step = min(losses, key=lambda at: losses[at])
    text = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    line = f"| weights | of step {step}, the best of those evaluated by eval_loss ({losses[step]:.4g}) |"
    assert line in text


def test_its_head_is_what_the_hub_takes(written: Path) -> None:
    head = ModelCard.load(written).data.to_dict()
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["hf_mbp", "generated_from_trainer", "text-classification"],
        "metrics": ["accuracy", "f1"],
    }


def test_its_head_names_known_tasks_only() -> None:
    assert set(TASKS) - set(card_module.PIPELINE_TAGS) == {"sequence_to_sequence"}
    assert set(card_module.PIPELINE_TAGS) <= set(TASKS)


def hub_recipe(recipe: Callable[..., Path], **changes: Any) -> Recipe:
    names = {"model_name_or_path": "google/bert_uncased_L-2_H-128_A-2", "dataset_name": "stanfordnlp/sst2"}
    return read_recipe([str(recipe(train_file=None, validation_file=None, **{**names, **changes}))])


def test_names_on_the_hub_are_in_the_head(recipe: Callable[..., Path]) -> None:
    head = card_data(hub_recipe(recipe), METRICS, is_adapter=True).to_dict()
    assert head["base_model"] == "google/bert_uncased_L-2_H-128_A-2"
    assert head["datasets"] == ["stanfordnlp/sst2"]
    assert head["library_name"] == "peft"
    assert "license" not in head
    validate_repo_id(head["base_model"])
    assert ModelCard(f"---\n{card_data(hub_recipe(recipe), METRICS, is_adapter=True).to_yaml()}\n---\n")


@pytest.mark.parametrize("is_cached", [True, False])
def test_the_license_is_that_of_the_base_model_if_its_card_is_at_hand(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_cached: bool
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    monkeypatch.setattr(card_module, "try_to_load_from_cache", lambda *_, **__: str(base / "README.md"))
    changes = {} if is_cached else {"model_name_or_path": str(base)}
    assert card_data(hub_recipe(recipe, **changes), METRICS, is_adapter=False).to_dict()["license"] == "apache-2.0"


def test_a_readme_of_the_user_is_left_alone(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    readme = tmp_path / "run" / "README.md"
    readme.write_text("# My project\n")
    assert main([str(recipe(max_steps=1))]) == 0
    assert readme.read_text() == "# My project\n"
    assert "no model card is written over it" in capsys.readouterr().out


def test_a_card_of_ours_is_replaced(written: Path, recipe: Callable[..., Path]) -> None:
    assert "| optimizer steps | 3 (" in written.read_text()
    assert main([str(recipe(max_steps=2)), "--overwrite_output_dir"]) == 0
    assert "| optimizer steps | 2 (" in written.read_text()


def test_a_new_model_has_a_base_without_weights(
    recipe: Callable[..., Path], byte_model: Path, write_rows: Any, tmp_path: Path
) -> None:
    rows = str(write_rows("letters.jsonl", [{"source": "a" * (1 + i % 5), "target": "b"} for i in range(16)]))
    files = {"train_file": rows, "validation_file": None}
    changes = {"task": "sequence_to_sequence", "model_name_or_path": None, "config_name": str(byte_model)}
    assert main([str(recipe(max_steps=1, **files, **changes))]) == 0
    text = (tmp_path / "run" / "README.md").read_text()
    assert f"\n{byte_model.name} with random weights, trained for sequence to sequence on letters.jsonl" in text
    assert f"| base model | {byte_model.name} with random weights |" in text
    assert "None" not in text


def test_an_upload_has_the_card_and_is_the_last_thing(
    recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []

    def push(self: Any, **_: Any) -> None:
        self.create_model_card()  # as the stock one does
        uploaded.append((tmp_path / "run" / "README.md").read_text())

    monkeypatch.setattr("hf_mbp.cli.trainers.FinetuneTrainer.init_hf_repo", lambda self: None)
    monkeypatch.setattr("hf_mbp.cli.trainers.FinetuneTrainer.push_to_hub", push)
    assert main([str(recipe(max_steps=1, push_to_hub=True))]) == 0
    assert "| accuracy |" in uploaded[-1]
    assert "![loss](loss.png)" in uploaded[-1]
