"""The configurations for `accelerate launch` say to the training process what they say to the reader, and run."""

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import (
    DeepSpeedPlugin,
    FullyShardedDataParallelPlugin,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from hf_mbp.cli.finetune import main
from tests.cli.conftest import review, word_tokenizer
from tests.distributed.reference import DEEPSPEED
from tests.helpers import build

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "recipes" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
SECONDS = 150
"""Several times what a launch needs; one whose processes wait for each other forever fails then."""

SECTIONS = ("deepspeed_config", "fsdp_config")
HANDLED_APART = {"compute_environment", "distributed_type", *SECTIONS}
"""Keys that do not become an argument of the launcher under their own name."""


def launch_arguments(name: str, *changes: str) -> argparse.Namespace:
    """What `accelerate launch` makes of a file, before it starts anything."""
    line = ["--config_file", str(FOLDER / f"{name}.yaml"), *changes, "scripts/finetune.py", "recipe.yaml"]
    parser = launch_command_parser()
    arguments, *_ = _validate_launch_command(parser.parse_args(line))
    return arguments


def set_environment(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """The environment that the launcher gives the training process."""
    for name, value in environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def settings_of(file: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(file.read_text()))


# What Accelerate reads


def test_the_files_there_are() -> None:
    names = ["deepspeed_zero3", "fsdp2", "one_gpu", "several_gpus", "several_machines"]
    assert [file.stem for file in FILES] == names
    page = (FOLDER / "README.md").read_text()
    assert all(f"| `{name}.yaml` |" in page for name in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_key_is_known_and_reaches_the_launcher(file: Path) -> None:
    """Accelerate refuses unknown keys, but not inside a section; and it ignores some that it knows (`same_network`)."""
    options = {action.dest for action in launch_command_parser()._actions}
    settings, arguments = settings_of(file), launch_arguments(file.stem)
    assert load_config_from_file(str(file)).num_processes == settings["num_processes"]
    flat = {key: value for key, value in settings.items() if key not in HANDLED_APART}
    for section in SECTIONS:
        flat |= settings.get(section, {})
    assert flat.keys() <= options
    assert {key: getattr(arguments, key) for key in flat} == flat


def test_a_mistyped_key_is_found(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text((FOLDER / "one_gpu.yaml").read_text() + "num_process: 2\n")
    with pytest.raises(ValueError, match="num_process"):
        load_config_from_file(str(file))


@pytest.mark.parametrize("name", ["several_gpus", "fsdp2", "deepspeed_zero3"])
def test_the_number_of_processes_can_be_changed(name: str) -> None:
    assert launch_arguments(name, "--num_processes", "8").num_processes == 8


# What the training process is told


def test_one_gpu_starts_one_process_that_sees_one_gpu() -> None:
    arguments = launch_arguments("one_gpu")
    assert not arguments.multi_gpu
    command, environment = prepare_simple_launcher_cmd_env(arguments)
    assert command == [sys.executable, "scripts/finetune.py", "recipe.yaml"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["ACCELERATE_USE_CPU"] == "False"


def test_several_gpus_start_as_many_processes() -> None:
    arguments = launch_arguments("several_gpus", "--num_processes", "3")
    environment = prepare_multi_gpu_env(arguments)
    assert arguments.nproc_per_node == "3"
    assert int(arguments.master_port) > 0
    assert environment.get("CUDA_VISIBLE_DEVICES") == os.environ.get("CUDA_VISIBLE_DEVICES")
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_USE_DEEPSPEED" not in environment


def test_several_machines_share_the_processes() -> None:
    changes = ("--main_process_ip", "10.0.0.1", "--machine_rank", "1", "--num_processes", "8")
    arguments = launch_arguments("several_machines", *changes)
    prepare_multi_gpu_env(arguments)
    assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "4", 1)
    assert arguments.rdzv_endpoint == "10.0.0.1:29500"
    assert arguments.rdzv_backend == "static"


def test_fsdp_is_version_2(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2"))
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    set_environment(monkeypatch, environment)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    assert caplog.records == []  # where it would complain about options that are deprecated


def test_deepspeed_is_stage_3_and_takes_the_rest_from_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = launch_arguments("deepspeed_zero3")
    arguments.deepspeed_fields_from_accelerate_config = ""  # as `launch_command` does
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment.pop("ACCELERATE_USE_DEEPSPEED") == "true"  # which would need the package
    set_environment(monkeypatch, environment)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3
    assert plugin.zero3_init_flag is True
    settings = plugin.deepspeed_config
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert settings["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert settings["zero_optimization"]["offload_param"]["device"] == "none"
    from_recipe = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
    assert {key for key, value in settings.items() if value == "auto"} == {*from_recipe, "gradient_clipping"}


@pytest.mark.parametrize("name", [file.stem for file in FILES])
def test_the_recipe_decides_about_precision(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arguments = launch_arguments(name)
    if name == "one_gpu":
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", environment["ACCELERATE_MIXED_PRECISION"])
    for bf16 in (False, True):
        training = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", bf16=bf16)
        assert training.mixed_precision == ("bf16" if bf16 else "no")


# Running them


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe for two steps of a tiny classifier on reviews."""
    folder = tmp_path_factory.mktemp("recipe")
    tokenizer = word_tokenizer(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_max_length=32)
    tokenizer.save_pretrained(folder / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **sizes, **labels, **no_dropout)
    build(BertForSequenceClassification, config).save_pretrained(folder / "model")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(review(index)) + "\n" for index in range(40)))
    settings = {
        "task": "text_classification",
        "model_name_or_path": str(folder / "model"),
        "train_file": str(rows),
        "validation_file": str(rows),
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_tokens_per_micro_batch": 64,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def launch(
    launchers: list[list[str]], recipe: Path, run: Path, *, command: str = "scripts/finetune.py", **environment: str
) -> dict[str, Any]:
    """Runs the recipe by launchers that run at the same time; the results, or a failure if they hang."""
    cache = {"HF_HOME": str(run / "cache"), "HF_HUB_OFFLINE": "1"}
    on_cpus = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment = {**os.environ, **cache, **on_cpus, **environment}
    script = [str(ROOT / command), str(recipe), "--output_dir", str(run / "out"), "--use_cpu", "true"]
    run.mkdir()
    processes: list[Any] = []
    for number, options in enumerate(launchers):
        line = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options, *script]
        with (run / f"errors{number}").open("w") as errors:
            processes.append(
                subprocess.Popen(  # noqa: S603
                    [*line, "--per_device_train_batch_size", str(16 // 2)], env=environment, cwd=ROOT, stderr=errors
                )
            )
    wait(processes)
    told = "\n".join((run / f"errors{number}").read_text()[-4000:] for number in range(len(launchers)))
    assert [process.returncode for process in processes] == [0] * len(launchers), told
    return dict(json.loads((run / "out" / "all_results.json").read_text()))


def wait(processes: list[Any]) -> None:
    """Until all have ended; those that have not when the time is up are ended, with the processes they started."""
    end = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(timeout=max(0.1, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # the launcher ends its own processes
                process.wait(timeout=60)


@pytest.fixture(scope="module")
def one_process(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of one process with the same rows a step."""
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "datasets"))
        monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(folder / "metrics"))
        options = ["--output_dir", str(folder / "out"), "--use_cpu", "true", "--per_device_train_batch_size", "16"]
        assert main([str(recipe), *options]) == 0
    return dict(json.loads((folder / "out" / "all_results.json").read_text()))


def assert_same_results(expected: dict[str, Any], results: dict[str, Any]) -> None:
    assert results["eval_before_loss"] == pytest.approx(expected["eval_before_loss"], rel=1e-5)
    assert results["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert results["eval_loss"] != pytest.approx(expected["eval_before_loss"], rel=1e-2)  # it did train
    assert results["mbp_tokens"] == expected["mbp_tokens"]


def test_several_gpus_run(recipe: Path, one_process: dict[str, Any], tmp_path: Path) -> None:
    options = ["--config_file", "recipes/accelerate/several_gpus.yaml", "--num_processes", "2"]
    assert_same_results(one_process, launch([options], recipe, tmp_path / "run"))


def test_several_machines_run(recipe: Path, one_process: dict[str, Any], tmp_path: Path) -> None:
    """Two launchers with a process each, as on two machines."""
    options = ["--config_file", "recipes/accelerate/several_machines.yaml", "--main_process_ip", "127.0.0.1"]
    options += ["--main_process_port", str(free_port()), "--num_processes", "2", "--machine_rank"]
    results = launch([[*options, "0"], [*options, "1"]], recipe, tmp_path / "run")
    assert_same_results(one_process, results)


@pytest.mark.skipif(not DEEPSPEED.is_dir(), reason="DeepSpeed is not installed; scripts/test.sh does that")
def test_deepspeed_runs(recipe: Path, one_process: dict[str, Any], tmp_path: Path) -> None:
    """The model is spread while it is loaded, evaluated, trained and evaluated again."""
    options = ["--config_file", "recipes/accelerate/deepspeed_zero3.yaml", "--num_processes", "2"]
    environment = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), str(DEEPSPEED)])}
    command = "tests/distributed/deepspeed_command.py"
    assert_same_results(one_process, launch([options], recipe, tmp_path / "run", command=command, **environment))
