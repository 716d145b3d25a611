"""Recipes, models, data and checkpoints of somebody else: none of them makes a command run code that nobody asked for.

What they would run leaves a mark, a folder. Where something could be read carelessly, the test does so, and sees it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from hf_mbp.cli.arguments import ModelArguments
from hf_mbp.cli.card import card_data
from hf_mbp.cli.finetune import main
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.training_arguments import TrainArguments

Recipe = Callable[..., Path]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "mark"


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def assert_marks(file: Path, mark: Path) -> None:
    """The pickle in the file would do it, in the hands of a careless reader."""
    torch.load(file, weights_only=False)
    mark.rmdir()


def test_a_recipe_is_read_by_the_safe_loader(recipe: Recipe, mark: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe()
    line = f"run_name: !!python/object/apply:os.mkdir ['{mark}']\n"
    file.write_text(f"{file.read_text()}\n{line}")
    assert main([str(file)]) == 2
    assert "could not determine a constructor for the tag" in capsys.readouterr().err
    assert not mark.exists()
    yaml.load(line, Loader=yaml.UnsafeLoader)  # noqa: S506 - what the safe one is for
    assert mark.exists()


# Code that comes with a model


@pytest.fixture
def model_with_code(tmp_path: Path, encoder: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose configuration names a class of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "with_code"
    shutil.copytree(encoder, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    own = f"import os\nfrom transformers import BertConfig\nos.mkdir({str(mark)!r})\nclass OwnConfig(BertConfig): ...\n"
    (folder / "own.py").write_text(own)
    return folder


def test_code_of_a_model_runs_only_if_that_is_typed(
    recipe: Recipe, model_with_code: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe(model_name_or_path=str(model_with_code)))]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    trusting = [str(recipe(model_name_or_path=str(model_with_code), trust_remote_code=True))]
    assert main(trusting) == 2
    assert "type --trust_remote_code, for a recipe cannot say so" in capsys.readouterr().err
    assert main([*trusting, "--trust_remote_code", "false"]) == 2
    assert not mark.exists()
    main([*trusting, "--trust_remote_code", "--dry_run"])
    assert mark.exists()


def test_a_kernel_of_the_hub_is_code_too(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(recipe(attn_implementation="somebody/attention@main:forward"))
    assert main([file]) == 2
    assert "such a kernel is code from the Hub; type --trust_remote_code to run it" in capsys.readouterr().err
    assert read_recipe([file, "--trust_remote_code"]).model.attn_implementation == "somebody/attention@main:forward"
    assert ModelArguments(attn_implementation="flash_attention_2").attn_implementation == "flash_attention_2"


# Pickles


@pytest.fixture
def model_of_pickles(tmp_path: Path, encoder: Path) -> Path:
    folder = tmp_path / "of_pickles"
    shutil.copytree(encoder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_weights_are_loaded_from_pickles_only_if_that_is_asked_for(
    recipe: Recipe, model_of_pickles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"model_name_or_path": str(model_of_pickles), "max_steps": 1, "eval_before_training": False}
    assert main([str(recipe(**changes))]) == 2
    assert "pytorch_model.bin, and you trust who made them, write pickled_weights: true" in capsys.readouterr().err
    assert main([str(recipe(**changes, pickled_weights=True))]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert not list((tmp_path / "run").glob("pytorch_model*"))


def test_a_pickle_that_is_asked_for_runs_no_code_either(recipe: Recipe, model_of_pickles: Path, mark: Path) -> None:
    weights = model_of_pickles / "pytorch_model.bin"
    torch.save({**torch.load(weights), "hostile": Hostile(mark)}, weights)
    assert_marks(weights, mark)
    assert main([str(recipe(model_name_or_path=str(model_of_pickles), pickled_weights=True))]) != 0
    assert not mark.exists()


def test_a_checkpoint_runs_no_code(recipe: Recipe, tmp_path: Path, mark: Path) -> None:
    """Trainer's own files of optimizer, schedule and random states are pickles, and so are its arguments."""
    file = str(recipe(save_strategy="steps", save_steps=2, eval_before_training=False))
    assert main([file]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    names = {path.name for path in checkpoint.iterdir() if path.suffix in (".pt", ".pth", ".bin")}
    assert names == {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    for name in sorted(names):
        kept = (checkpoint / name).read_bytes()
        torch.save(Hostile(mark), checkpoint / name)
        assert_marks(checkpoint / name, mark)
        code = main([file, "--resume_from_checkpoint", str(checkpoint)])
        assert (code == 0) == (name == "training_args.bin"), "which nothing reads"
        assert not mark.exists()
        (checkpoint / name).write_bytes(kept)


# Data


def test_a_data_set_is_no_program(
    recipe: Recipe, tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mails"
    folder.mkdir()
    (folder / "mails.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    assert main([str(recipe(train_file=None, validation_file=None, dataset_name=str(folder)))]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    assert not mark.exists()


def test_a_chat_template_is_no_program(
    recipe: Recipe,
    chat_model: Path,
    tmp_path: Path,
    write_rows: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "hostile_chat"
    shutil.copytree(chat_model, folder)
    (folder / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    talk = [{"role": "user", "content": "good"}, {"role": "assistant", "content": "bad"}]
    rows = write_rows("talks.jsonl", [{"messages": talk}] * 4)
    changes = {"task": "language_modeling", "messages_column": "messages", "validation_file": None}
    assert main([str(recipe(model_name_or_path=str(folder), train_file=str(rows), **changes))]) == 2
    assert "access to attribute '__class__' of 'list' object is unsafe" in capsys.readouterr().err


# What a run leaves


def test_no_file_of_a_run_has_the_token(recipe: Recipe, tmp_path: Path) -> None:
    token = "hf_only_for_this_test"  # noqa: S105 - of nobody
    assert TrainArguments(str(tmp_path), hub_token=token).hub_token == token
    file = str(recipe(max_steps=1, save_strategy="steps", save_steps=1, hub_token=token))
    assert main([file]) == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"recipe.yaml", "training_args.bin", "trainer_state.json", "README.md"} <= {path.name for path in files}
    assert [path.name for path in files if token.encode() in path.read_bytes()] == []


def test_names_in_a_card_are_no_markup(recipe: Recipe, reviews: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run <img src=x> ![a](b)\n# Owned"
    rows = tmp_path / "rows | `x` <b>\n## Owned.jsonl"
    rows.write_bytes(reviews[0].read_bytes())
    assert main([str(recipe(output_dir=str(folder), train_file=str(rows), max_steps=1))]) == 0
    card = ModelCard.load(folder / "README.md")
    lines = card.text.splitlines()
    assert "# run &#60;img src=x&#62; !&#91;a&#93;(b) # Owned" in lines
    assert [line for line in lines if line.lstrip().startswith(("# Owned", "## Owned"))] == []
    assert "<b>" not in card.text
    assert "| data | rows \\| &#96;x&#96; &#60;b&#62; ## Owned.jsonl, 40 rows |" in lines


def test_the_head_of_a_card_cannot_be_left(recipe: Recipe, encoder: Path, tmp_path: Path) -> None:
    """It is YAML between two lines, and the licence in it is what the card of the base model says."""
    base = tmp_path / "base"
    shutil.copytree(encoder, base)
    licence = "mit\n---\n# Owned\ntags: [owned]"
    (base / "README.md").write_text(f"---\n{yaml.safe_dump({'license': licence})}---\n")
    head = card_data(read_recipe([str(recipe(model_name_or_path=str(base)))]), {}, is_adapter=False).to_yaml()
    card = ModelCard(f"---\n{head}\n---\n\nbody\n")
    assert card.data.license == licence
    assert "owned" not in card.data.tags
    assert card.text.strip() == "body"
