"""Reading a recipe: types, precedence, and what a mistake in it is told like."""

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import OWN_CLASSES, dump_recipe, field_types, read_recipe, read_yaml, recipe_parser
from hf_mbp.cli.training_arguments import TRL_TASKS, training_arguments

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return recipe_parser()


def parse_yaml(parser: argparse.ArgumentParser, tmp_path: Path, text: str) -> dict[str, Any]:
    file = tmp_path / "r.yaml"
    file.write_text(text, encoding="utf-8")
    return read_yaml(parser, file)


@pytest.mark.parametrize("task", ["text_classification", *TRL_TASKS])
def test_no_option_is_in_two_classes(task: str) -> None:
    classes = (*OWN_CLASSES, training_arguments(task))
    counts = Counter(name for arguments in classes for name in field_types(arguments))
    assert [name for name, count in counts.items() if count > 1] == []


def test_command_line_wins_over_the_file_and_the_file_over_defaults(recipe: Callable[..., Path]) -> None:
    read = read_recipe([str(recipe(seed=3, max_length=20)), "--seed", "5"])
    assert read.train.seed == 5
    assert read.data.max_length == 20
    assert read.data.text_column == "text"
    assert read.run.task == "text_classification"


def test_works_without_a_file(reviews: tuple[Path, Path]) -> None:
    read = read_recipe(
        ["--train_file", str(reviews[0]), "--model_name_or_path", "m", "--output-dir", "out", "--use_cpu"]
    )
    assert (read.model.model_name_or_path, read.train.output_dir, read.train.use_cpu) == ("m", "out", True)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 3e-5", 3e-5),  # YAML reads this as text
        ("learning_rate: 1", 1.0),
        ("max_length: 12", 12),
        ("bf16: true", True),
        ("bf16: 'true'", True),
        ('eval_strategy: "no"', "no"),
        ("memory_limit: 0.5", 0.5),
        ("memory_limit: 20GiB", "20GiB"),
        ("max_length: null", None),
        ("max_length:", None),
        ("lr_scheduler_kwargs: {a: 1}", {"a": 1}),
        ("report_to: [none]", ["none"]),
        ("text_column: '-x'", "-x"),
        ("text_column: 'two words'", "two words"),
        ("resume_from_checkpoint: true", "true"),
        ("resume_from_checkpoint: false", None),
        ("model_revision: 12", "12"),
    ],
)
def test_values_get_the_type_of_their_field(
    parser: argparse.ArgumentParser, tmp_path: Path, line: str, value: Any
) -> None:
    (read,) = parse_yaml(parser, tmp_path, line).values()
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "'learning_rat' is not a known key; did you mean learning_rate"),
        ("zzzzz: 1", "'zzzzz' is not a known key$"),
        ("7: 1", "7 is not a known key"),
        ("learning_rate: fast", "key 'learning_rate': --learning_rate: invalid float value: 'fast'"),
        ("max_length: 1.5", "key 'max_length': --max_length: invalid int value: '1.5'"),
        ("max_length: true", "key 'max_length': it is a bool, but must be int"),
        ("seed:", "key 'seed': it is empty, but must be int"),
        ("text_column: [a, b]", "key 'text_column': it is a list, but must be str"),
        ("text_column: {a: b}", "key 'text_column': it is a dict, but must be str"),
        ("eval_strategy: no", "key 'eval_strategy': YAML reads yes, no, on and off as true and false; .* quotes"),
        ("eval_strategy: weekly", "key 'eval_strategy': .*invalid choice: 'weekly'"),
        ("seed: 1\nseed: 2", "'seed' is written twice"),
        ("- seed", "must be a mapping of keys to values"),
        ("seed", "must be a mapping of keys to values"),
        ("", "must be a mapping of keys to values"),
        ("a: [", "while parsing a flow"),
        ("a: " + "[" * 3000, "recursion"),
        ("seed: 2020-13-45", "month must be in 1..12"),
        ("seed: !!float x", "could not convert string to float"),
        ("seed: !!bool x", "'x'"),
        ("seed: " + "1" * 5000, "integer string"),
        ("!!set {seed}", "must be a mapping of keys to values"),
    ],
)
def test_mistakes_in_the_file_name_the_key_and_the_file(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_yaml(parser, tmp_path, text)
    assert str(caught.value).startswith(f"recipe {tmp_path / 'r.yaml'}: ")


def test_a_missing_file_is_named(parser: argparse.ArgumentParser) -> None:
    with pytest.raises(UserError, match=r"recipe nowhere.yaml: .*No such file"):
        read_yaml(parser, Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning-rat", "1"], "command line: --learning-rat is not an option; did you mean learning_rate"),
        (["--learn", "1"], "command line: --learn is not an option"),  # no abbreviations
        (["--seed", "x"], "command line: --seed: invalid int value: 'x'"),
        (["--seed"], "command line: --seed: expected one argument"),
        (["a.yaml", "b.yaml"], "command line: b.yaml is not an option"),
        (["my_recipe.txt"], r"my_recipe.txt is no recipe; give it a name that ends in .yaml or .yml"),
        ([], "either dataset_name .* or train_file"),
        (["--train_file", "a", "--dataset_name", "b"], "either dataset_name .* or train_file"),
        (["--dataset_name", "b", "--validation_file", "c"], "for a data set on the Hub write validation_split"),
        (
            ["--train_file", "a", "--validation_file", "b", "--validation_fraction", "0.1"],
            "both say what to evaluate on",
        ),
        (["--train_file", "a", "--validation_fraction", "1.5"], "validation_fraction is 1.5; write a number between"),
        (["--train_file", "a", "--max_length", "0"], "max_length is 0; write a whole number from 1"),
        (
            ["--task", "language_modeling", "--train_file", "a", "--prompt_column", "p"],
            "prompt_column and answer_column go together",
        ),
        (
            [
                *("--task", "language_modeling", "--train_file", "a"),
                *("--prompt_column", "p", "--answer_column", "a", "--messages_column", "m"),
            ],
            "write either prompt_column and answer_column, or messages_column",
        ),
        (
            ["--train_file", "a", "--config_name", "c", "--model_name_or_path", "m"],
            r"write either model_name_or_path \(its weights\) or config_name \(random weights\), not both",
        ),
        (
            ["--task", "sequence_to_sequence", "--train_file", "a", "--max_target_length", "0"],
            "max_target_length is 0; write a whole number from 1",
        ),
        (
            ["--train_file", "a", "--doc_stride", "9"],
            "doc_stride is an option of question_answering, not of text_classification; leave it out",
        ),
        (
            ["--task", "embedding", "--train_file", "a", "--label_column", "kind"],
            "label_column is an option of text_classification and image_classification, not of embedding",
        ),
        (
            ["--train_file", "a", "--predict_with_generate"],
            "predict_with_generate is an option of sequence_to_sequence",
        ),
        (["--train_file", "a", "--dtype", "int8"], "dtype is 'int8'; write one of float32"),
        (["--train_file", "a", "--memory_limit", "lots"], "memory_limit='lots'"),
        (["--train_file", "a", "--max_tokens_per_micro_batch", "0"], "max_tokens_per_micro_batch"),
        (
            ["--train_file", "a", "--report_to", "paper"],
            "bad option: report_to is 'paper': paper is not supported",
        ),
        (
            ["--train_file", "a", "--per_device_train_batch_size", "0"],
            "option: per_device_train_batch_size is 0; ",
        ),
        (["--train_file", "a", "--gradient_accumulation_steps", "-1"], "gradient_accumulation_steps is -1"),
        (["--train_file", "a", "--seed", "-1"], "seed is -1; write a whole number from 0 to 4294967295"),
        (["--train_file", "a", "--data_seed", str(2**32)], "data_seed is 4294967296; write a whole number"),
        (["--train_file", "a", "--num_train_epochs", "nan"], "num_train_epochs is nan; write a number from 0"),
        (["--train_file", "a", "--lr_scheduler_kwargs", "x"], "lr_scheduler_kwargs is 'x'; write a mapping"),
        (["--train_file", "a", "--generation_config", "no/where"], "generation_config is 'no/where'; write a folder"),
        (["--train_file", "a", "--use_cpu", "--deepspeed", "no.json"], "bad option: .*deepspeed"),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_recipe(argv)


def test_the_saved_recipe_repeats_the_run(recipe: Callable[..., Path], tmp_path: Path, reviews: Any) -> None:
    first = read_recipe([str(recipe(train_file="train.jsonl")), "--max_length", "9", "--overwrite_output_dir"])
    saved = tmp_path / "elsewhere" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(dump_recipe(first), encoding="utf-8")
    again = read_recipe([str(saved)])
    assert again.data == dataclasses.replace(first.data, train_file=str(reviews[0]), validation_file=str(reviews[1]))
    assert (again.model, again.mbp) == (first.model, first.mbp)
    assert again.train.learning_rate == first.train.learning_rate
    assert not again.run.overwrite_output_dir  # or repeating a run would delete it


def test_a_configuration_beside_the_recipe_is_found(recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    (folder / "new_model").mkdir(parents=True)
    file = recipe(model_name_or_path=None, config_name="new_model").rename(folder / "recipe.yaml")
    first = read_recipe([str(file)])
    assert first.model.config_name == str(folder / "new_model")
    (tmp_path / "recipe.yaml").write_text(dump_recipe(first), encoding="utf-8")
    assert read_recipe([str(tmp_path / "recipe.yaml")]).model == first.model
    assert read_recipe([str(file), "--config_name", "owner/model"]).model.config_name == "owner/model"


def test_the_saved_recipe_has_no_secrets(recipe: Callable[..., Path]) -> None:
    assert "hf_secret" not in dump_recipe(read_recipe([str(recipe()), "--hub_token", "hf_secret"]))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
@pytest.mark.parametrize(
    "file",
    [file for file in sorted(RECIPES.glob("*/*.yaml")) if file.parent.name != "accelerate"],  # those are no recipes
    ids=lambda file: file.stem,
)
def test_every_recipe_is_valid(file: Path) -> None:
    """The recipes for data sets on the Hub cannot run without a network; their keys and values are checked here."""
    read = read_recipe([str(file), "--use_cpu"])
    assert set(yaml.safe_load(file.read_text())) <= set(read.given)
    assert read.data.train_file is None or (file.parent / read.data.train_file).is_file()
    assert read.train.per_device_train_batch_size >= 8
    assert read.train.gradient_accumulation_steps == 1
    assert read.model.config_name is None or Path(read.model.config_name, "config.json").is_file()
