"""Options are checked when they are made, and read from a command line or a YAML file by HfArgumentParser."""

from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_mbp import MBPConfig, MBPTrainer
from tests.helpers import arguments

DEFAULTS = {"max_tokens_per_micro_batch": None, "memory_limit": None, "check_at_start": True, "on_inexact": "warn"}


def values_of(config: MBPConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEFAULTS}


def test_defaults() -> None:
    assert values_of(MBPConfig()) == DEFAULTS


def test_every_option_is_explained() -> None:
    assert all(field.metadata["help"].endswith(".") for field in fields(MBPConfig))


def test_options_cannot_change_after_they_were_checked() -> None:
    with pytest.raises(FrozenInstanceError):
        MBPConfig().max_tokens_per_micro_batch = -1  # type: ignore[misc]


def test_options_are_named() -> None:
    with pytest.raises(TypeError, match="positional"):
        MBPConfig(8192)  # type: ignore[misc]


@pytest.mark.parametrize("value", [0, -1, 10.5, "8192", True])
def test_tokens_must_be_a_positive_integer(value: Any) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_micro_batch must be a positive integer") as error:
        MBPConfig(max_tokens_per_micro_batch=value)
    assert f"got {value!r}. Write for example max_tokens_per_micro_batch=8192." in str(error.value)


@pytest.mark.parametrize("value", ["much", -1, 0, "0%"])
def test_memory_limit_must_be_a_size_or_a_fraction(value: Any) -> None:
    with pytest.raises(ValueError, match="is neither a size nor a fraction") as error:
        MBPConfig(memory_limit=value)
    assert f"memory_limit={value!r}" in str(error.value)


@pytest.mark.parametrize("value", [0.8, "0.8", "20GiB", 10**9])
def test_memory_limit_is_kept_as_it_was_written(value: Any) -> None:
    assert MBPConfig(memory_limit=value).memory_limit is value


@pytest.mark.parametrize("value", ["raise", "", "Warn", None])
def test_on_inexact_must_be_known(value: Any) -> None:
    with pytest.raises(ValueError, match=r"is unknown. Write one of warn, error\.") as error:
        MBPConfig(on_inexact=value)
    assert f"on_inexact={value!r}" in str(error.value)


# HfArgumentParser


def parser() -> HfArgumentParser:
    return HfArgumentParser((Seq2SeqTrainingArguments, MBPConfig))


def test_nothing_on_the_command_line_gives_the_defaults(tmp_path: Path) -> None:
    _, config = parser().parse_args_into_dataclasses(["--output_dir", str(tmp_path)])
    assert config == MBPConfig()


def test_command_line(tmp_path: Path) -> None:
    line = f"--output_dir {tmp_path} --max_tokens_per_micro_batch 4096 --memory_limit 20GiB --check_at_start false"
    training, config = parser().parse_args_into_dataclasses([*line.split(), "--on_inexact", "error"])
    assert values_of(config) == {
        "max_tokens_per_micro_batch": 4096,
        "memory_limit": "20GiB",
        "check_at_start": False,
        "on_inexact": "error",
    }
    assert training.output_dir == str(tmp_path)


def test_check_can_be_switched_off_with_a_flag(tmp_path: Path) -> None:
    _, config = parser().parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--no_check_at_start"])
    assert config.check_at_start is False


@pytest.mark.parametrize(("written", "read"), [("0.8", "0.8"), ("500MB", "500MB")])
def test_memory_limit_of_the_command_line_is_understood(written: str, read: str, tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--memory_limit", written]
    assert parser().parse_args_into_dataclasses(line)[1].memory_limit == read


def test_unknown_choice_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--on_inexact", "ignore"])
    assert "--on_inexact" in capsys.readouterr().err


def test_bad_value_on_the_command_line_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Write for example max_tokens_per_micro_batch=8192"):
        parser().parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--max_tokens_per_micro_batch", "0"])


@pytest.mark.parametrize("limit", [0.5, "20GiB", 10**9])
def test_dictionary(limit: Any, tmp_path: Path) -> None:
    options = {"max_tokens_per_micro_batch": 100, "memory_limit": limit, "check_at_start": False, "on_inexact": "error"}
    training, config = parser().parse_dict({"output_dir": str(tmp_path), "learning_rate": 0.5, **options})
    assert values_of(config) == options
    assert training.learning_rate == 0.5


def test_yaml_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nmax_tokens_per_micro_batch: 512\nmemory_limit: 0.5\n"
        "check_at_start: no\non_inexact: error\n"
    )
    _, config = parser().parse_yaml_file(str(file))
    assert values_of(config) == {
        "max_tokens_per_micro_batch": 512,
        "memory_limit": 0.5,
        "check_at_start": False,
        "on_inexact": "error",
    }


def test_mistyped_option_in_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_tokens_per_microbatch"):
        parser().parse_dict({"output_dir": str(tmp_path), "max_tokens_per_microbatch": 512})


# The trainer


def test_trainer_takes_the_defaults_if_no_options_are_given(tmp_path: Path) -> None:
    trainer = MBPTrainer(model=torch.nn.Linear(1, 1), args=arguments(tmp_path))
    assert trainer.mbp_config == MBPConfig()


def test_trainer_takes_no_other_options(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mbp_config must be an MBPConfig, got dict"):
        MBPTrainer(model=torch.nn.Linear(1, 1), args=arguments(tmp_path), mbp_config={"memory_limit": 0.5})
