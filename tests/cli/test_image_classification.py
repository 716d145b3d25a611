"""Images are classified: from numbers, from folders of classes, by a new model and by a trained one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from hf_mbp.cli import check, plan
from hf_mbp.cli.arguments import DataArguments, ModelArguments
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.finetune import main
from hf_mbp.cli.models import load_config
from hf_mbp.cli.splits import Splits
from hf_mbp.cli.tasks import TASKS, load_processor
from hf_mbp.cli.tasks.base import TaskSetup

FEATURES = Features({"picture": List(List(Value("uint8"))), "kind": ClassLabel(names=["dark", "bright"])})


def picture(label: int, seed: int) -> list[list[int]]:
    """Noise, on a grey level that tells the label."""
    noise = np.random.default_rng(seed).integers(0, 60, (8, 8))
    return (noise + 150 * label).tolist()


def pictures(num_rows: int) -> Dataset:
    rows = {"picture": [picture(i % 2, i) for i in range(num_rows)], "kind": [i % 2 for i in range(num_rows)]}
    return Dataset.from_dict(rows, features=FEATURES)


def prepare(rows: Dataset, validation: Dataset | None = None, **options: Any) -> TaskSetup:
    model = ModelArguments(**{k: options.pop(k) for k in ("config_name", "model_name_or_path") if k in options})
    config = load_config(model)
    data = DataArguments(train_file="train.x", image_column="picture", label_column="kind", **options)
    splits = Splits(train=rows, validation=validation, train_origin="train.x", validation_origin="test.x")
    processor = load_processor("image_classification", model, config)
    return TASKS["image_classification"](splits, processor, config, model, data)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Pictures as files, in a folder for each class."""
    for name, num_rows in (("train", 32), ("test", 10)):
        for i in range(num_rows):
            path = tmp_path / name / ("bright" if i % 2 else "dark") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.array(picture(i % 2, i), dtype=np.uint8)).save(path)
    return tmp_path / "train", tmp_path / "test"


@pytest.fixture
def image_recipe(recipe: Callable[..., Path], image_model: Path, folders: tuple[Path, Path]) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        keys = {
            "task": "image_classification",
            "model_name_or_path": None,
            "config_name": str(image_model),
            "train_file": str(folders[0]),
            "validation_file": str(folders[1]),
        }
        return recipe(**{**keys, **changes})

    return write


def test_rows_are_pixel_values_and_ids(image_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = prepare(pictures(6), pictures(4), config_name=str(image_model))
    assert "train: 6 images of 3 x 8 x 8\nvalidation: 4 images of 3 x 8 x 8\n" in capsys.readouterr().out
    assert setup.model.config.id2label == {0: "dark", 1: "bright"}
    batch = setup.collator([setup.train[i] for i in (0, 1, 3)])
    assert batch["labels"].tolist() == [0, 1, 1]
    pixels = torch.tensor([picture(i % 2, i) for i in (0, 1, 3)])[:, None].expand(-1, 3, -1, -1)
    torch.testing.assert_close(batch["pixel_values"], pixels / 255 * 2 - 1, rtol=0, atol=1e-5)


def test_a_new_model_has_the_classes_of_the_data(image_model: Path, tmp_path: Path) -> None:
    """Not those of the trained model whose configuration it is made from."""
    trained = prepare(pictures(4), config_name=str(image_model))
    trained.model.save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(image_model).save_pretrained(tmp_path)
    other = pictures(4).cast_column("kind", ClassLabel(names=["low", "high"]))
    assert prepare(other, config_name=str(tmp_path)).model.config.id2label == {0: "low", 1: "high"}
    with pytest.raises(UserError, match=r"labels that the model .* does not have: 'high', 'low'"):
        prepare(other, model_name_or_path=str(tmp_path))


def test_the_trainer_does_not_drop_the_images(image_model: Path, tmp_path: Path) -> None:
    """Stock removes columns by name, before they are transformed."""
    setup = prepare(pictures(6), config_name=str(image_model))
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_train_batch_size=4)
    trainer = Trainer(model=setup.model, args=args, train_dataset=setup.train, data_collator=setup.collator)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (4, 3, 8, 8)


def test_learns_from_a_folder_of_files_and_saves_what_is_needed(
    image_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--max_tokens_per_micro_batch", "5", "--max_steps", "8"]
    assert main([str(image_recipe()), *words]) == 0
    run = tmp_path / "run"
    results = json.loads((run / "all_results.json").read_text())
    assert results["eval_loss"] < 0.05 < results["eval_before_loss"]
    assert results["eval_accuracy"] == results["eval_f1"] == 1
    assert results["mbp_cells"] == results["mbp_tokens"] == 8 * 16  # an image counts as one
    model = AutoModelForImageClassification.from_pretrained(run)
    assert model.config.id2label == {0: "bright", 1: "dark"}
    assert AutoImageProcessor.from_pretrained(run).size == {"height": 8, "width": 8}
    again = ["--model_name_or_path", str(run), "--output_dir", str(tmp_path / "again"), "--max_steps", "1"]
    assert main([str(image_recipe(config_name=None)), *again]) == 0
    again_results = json.loads((tmp_path / "again" / "all_results.json").read_text())
    assert again_results["eval_before_loss"] == pytest.approx(results["eval_loss"], rel=1e-4)


def test_plan_and_check(image_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = str(image_recipe(max_tokens_per_micro_batch=5, validation_file=None))
    assert check.main([file]) == 0
    assert plan.main([file, "--output", "plan.svg"]) == 0
    out = capsys.readouterr().out
    assert "first step           16 rows in 4 micro-batches" in out
    assert "plain Trainer        16 rows x 1 " in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, "has no column 'photo' (option image_column); its columns are image, label"),
        ({"label_column": "name"}, "has no column 'name' (option label_column)"),
        ({"train_file": "nothing"}, "no file nothing (train_file, validation_file); looked in"),
        ({"train_file": "empty"}, "/empty (train_file, validation_file) cannot be read as images"),
        ({"config_name": "/no/such"}, "model /no/such cannot be loaded"),
        ({"config_name": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "x/y"}, "write either model_name_or_path (its weights) or config_name"),
    ],
)
def test_mistakes_are_told_in_one_line(
    image_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(image_recipe(**changes))]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_model_without_an_image_processor(image_recipe: Callable[..., Path], encoder: Path) -> None:
    with pytest.raises(UserError, match=f"image processor of {encoder} cannot be loaded"):
        load_processor("image_classification", ModelArguments(model_name_or_path=str(encoder)), None)


def with_processor(image_model: Path, folder: Path, **changes: Any) -> Path:
    """The same model with another image processor."""
    folder.mkdir()
    (folder / "config.json").write_text((image_model / "config.json").read_text())
    processor = json.loads((image_model / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, **changes}))
    return folder


def test_images_of_a_size_that_the_model_does_not_take(
    image_recipe: Callable[..., Path], image_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_processor(image_model, tmp_path / "other", size={"height": 12, "width": 12})
    for words in ([], ["--dry_run"]):
        assert main([str(image_recipe(config_name=str(model))), *words]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert "column 'image', has images that become 3 x 12 x 12, which ViTForImageClassification does not" in line
        assert "Input image size (12*12) doesn't match model (8*8). Write a size for it" in line


def test_the_model_is_as_it_was_after_an_image_was_tried(image_model: Path) -> None:
    assert prepare(pictures(2), config_name=str(image_model)).model.training


def test_images_of_unlike_sizes(image_model: Path, tmp_path: Path) -> None:
    model = with_processor(image_model, tmp_path / "other", do_resize=False)
    small = {"picture": picture(0, 0), "kind": "dark"}
    large = {"picture": np.zeros((9, 9), dtype=int).tolist(), "kind": "bright"}
    rows = prepare(Dataset.from_list([small, large]), config_name=str(model)).train
    assert rows[0]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(UserError, match=r"column 'picture', has images that become 3 x 8 x 8 and 3 x 9 x 9, but all"):
        rows[:2]


def test_what_is_no_image_is_named_with_its_column(image_model: Path) -> None:
    rows = Dataset.from_dict({"picture": ["cat.png", "dog.png"], "kind": ["cat", "dog"]})
    with pytest.raises(UserError, match=r"train.x, column 'picture', must hold images, but has 'cat.png'"):
        prepare(rows, config_name=str(image_model))


def test_a_length_says_nothing_of_images(image_model: Path) -> None:
    with pytest.raises(UserError, match="max_length says nothing of images"):
        prepare(pictures(4), config_name=str(image_model), max_length=8)
