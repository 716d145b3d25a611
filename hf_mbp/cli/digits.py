"""The handwritten digits that come with scikit-learn, as a data set of images that needs no network."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from hf_mbp.cli.errors import user_errors

DIGITS = "sklearn://digits"
"""The name that stands for them where a data set on the Hub has its own."""


def load_digits() -> DatasetDict:
    """Return 1,797 images of 8 x 8 grey levels from 0 to 16, with their digits, all in the split ``train``.

    Raises:
        UserError: scikit-learn is not installed.
    """
    with user_errors(f"data set {DIGITS} needs scikit-learn; run: pip install scikit-learn", ImportError):
        from sklearn import datasets
    digits = datasets.load_digits()
    images = digits.images.astype(np.uint8).tolist()
    features = Features(
        {"image": List(List(Value("uint8"))), "label": ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    rows = Dataset.from_dict({"image": images, "label": digits.target.tolist()}, features=features)
    return DatasetDict(train=rows)
