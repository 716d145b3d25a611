"""Images as models read them: pixel values, made when a row is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_mbp.cli.errors import UserError

PIXELS = "pixel_values"
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class PixelTransform:
    """For ``Dataset.with_transform``: the images in the column ``pixel_values`` become what the model reads.

    Pixel values of a whole data set would not fit: three times 224 x 224 numbers an image. A class, because the
    workers of a data loader have to be sent it. ``origin`` says in messages where the images are from. With a ``shape``
    all have to be like that, since those of a micro-batch are stacked.
    """

    processor: Any
    num_channels: int
    origin: str
    shape: torch.Size | None = None

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the batch with float tensors [channels, height, width] in the place of images.

        Raises:
            UserError: one is no image, or of another size.
        """
        if PIXELS not in batch:
            return dict(batch)  # another column was asked for by itself
        images = [as_array(image, self.num_channels, self.origin) for image in batch[PIXELS]]
        processed = self.processor(images, input_data_format="channels_last")
        return {**batch, PIXELS: [self._checked(torch.as_tensor(pixels)) for pixels in processed[PIXELS]]}

    def _checked(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.shape is not None and pixels.shape != self.shape:
            raise UserError(
                f"{self.origin} has images that become {in_words(self.shape)} and {in_words(pixels.shape)}, but all "
                "have to be alike; write do_resize: true and a size into the model's preprocessor_config.json, or "
                "bring the images to one size"
            )
        return pixels


def in_words(shape: torch.Size) -> str:
    """Return a shape such as ``3 x 224 x 224``.

    >>> in_words(torch.Size([3, 8, 8]))
    '3 x 8 x 8'
    """
    return " x ".join(map(str, shape))


def as_array(image: Any, num_channels: int, origin: str = "the data") -> Array:
    """Return an image, of Pillow or as (nested lists of) numbers, as an array [height, width, channels].

    Grey images are repeated where a model reads colours.

    Raises:
        UserError: it is no image, or has another number of channels.

    Example:
        >>> as_array([[0, 16], [16, 0]], num_channels=3).shape
        (2, 2, 3)
    """
    if hasattr(image, "convert"):  # of Pillow, which need not be there for images that are numbers
        image = image.convert("L" if num_channels == 1 else "RGB")
    array = _numbers(image, origin)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim == 3 and array.shape[-1] == 1:
        array = np.repeat(array, num_channels, axis=-1)
    if array.ndim != 3 or array.shape[-1] != num_channels:
        raise UserError(
            f"{origin} has an image of shape {list(array.shape)}; the model reads [height, width, {num_channels}], or "
            "[height, width] of grey levels"
        )
    return array


def _numbers(image: Any, origin: str) -> Array:
    try:
        array = np.array(image)  # a copy: processors that run on tensors warn of what they may not write into
    except ValueError:  # rows of unlike lengths
        array = np.asarray(None)
    if array.dtype.kind not in "uif" or array.ndim < 2:
        raise UserError(f"{origin} must hold images, but has {str(image)[:80]!r}")
    return array if array.dtype.kind == "f" or array.dtype.itemsize == 1 else array.astype(np.float32)
