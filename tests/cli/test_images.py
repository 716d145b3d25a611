"""Images as models read them, and the digits of scikit-learn."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from hf_mbp.cli.digits import load_digits
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.images import PixelTransform, as_array

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY + 50, GREY + 100], axis=-1)


@pytest.mark.parametrize(
    ("image", "num_channels", "expected"),
    [
        (GREY, 1, GREY[..., None]),
        (GREY.tolist(), 1, GREY[..., None]),
        (GREY[..., None], 3, np.stack([GREY] * 3, axis=-1)),
        (COLOURS.tolist(), 3, COLOURS),
        (GREY / 64, 1, GREY[..., None] / 64),
        (Image.fromarray(GREY), 3, np.stack([GREY] * 3, axis=-1)),
        (Image.fromarray(COLOURS), 3, COLOURS),
        (Image.fromarray(COLOURS).convert("RGBA"), 3, COLOURS),
        (Image.fromarray(GREY), 1, GREY[..., None]),
    ],
)
def test_images_become_arrays_of_the_channels_that_the_model_reads(
    image: Any, num_channels: int, expected: np.ndarray
) -> None:
    np.testing.assert_array_equal(as_array(image, num_channels), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, "the data must hold images, but has 'None'"),
        ("cat.png", "the data must hold images, but has 'cat.png'"),
        ([[1, 2], [3]], r"must hold images, but has '\[\[1, 2\], \[3\]\]'"),
        ([1, 2], r"must hold images, but has '\[1, 2\]'"),
        (np.zeros((8, 8, 4)), r"has an image of shape \[8, 8, 4\]; the model reads \[height, width, 3\]"),
        (np.zeros((2, 8, 8, 3)), r"has an image of shape \[2, 8, 8, 3\]"),
    ],
)
def test_what_is_no_image(image: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_array(image, 3)


def test_the_transform_gives_what_the_processor_gives(image_model: Any) -> None:
    processor = AutoImageProcessor.from_pretrained(image_model)
    transform = PixelTransform(processor=processor, num_channels=3, origin="the data")
    transform = pickle.loads(pickle.dumps(transform))  # noqa: S301 - as it is sent to workers
    batch = transform({"pixel_values": [GREY.tolist(), Image.fromarray(COLOURS)], "labels": [1, 0]})
    assert batch["labels"] == [1, 0]
    for values, image in zip(batch["pixel_values"], (np.stack([GREY] * 3, axis=-1), COLOURS), strict=True):
        scaled = torch.tensor(image).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (processor.image_mean, processor.image_std))
        torch.testing.assert_close(values, (scaled - mean) / std)
    assert transform({"labels": [1]}) == {"labels": [1]}


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    rows = load_digits()["train"]
    np.testing.assert_array_equal(np.array(rows["image"][:]).reshape(-1, 64), images)
    assert rows["label"][:] == labels.tolist()
    assert rows.features["label"].names == list("0123456789")


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(UserError, match="data set sklearn://digits needs scikit-learn; run: pip install scikit-learn"):
        load_digits()


def test_an_image_of_pillow_becomes_an_array_of_ones_own() -> None:
    """Processors that run on tensors share its memory, and torch warns of what cannot be written into."""
    array = as_array(Image.new("RGB", (4, 3)), num_channels=3)
    assert array.flags.writeable
    assert array.shape == (3, 4, 3)
