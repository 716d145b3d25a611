"""Two processes with sentence-transformers: data sets that are first seen, and checked, when the model is wrapped."""

from pathlib import Path

import pytest

from tests.distributed.launching import launch
from tests.helpers import relative_error


def test_gradients_are_those_of_stock(tmp_path: Path) -> None:
    """Losses that are means over rows, as many on each rank: stock is right, too."""
    for rank in launch("sentence_worker", tmp_path):
        stock, mixed = rank["stock"], rank["mixed"]
        assert len(stock["gradients"]) == len(mixed["gradients"]) >= 4
        for expected, gradients in zip(stock["gradients"], mixed["gradients"], strict=True):
            assert relative_error(expected, gradients) < 1e-5
        assert mixed["losses"] == pytest.approx(stock["losses"], rel=1e-5)
