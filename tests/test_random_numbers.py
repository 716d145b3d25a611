"""Blocks with random numbers of their own leave those outside as they were."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from hf_mbp.random_numbers import seeded


def draw() -> tuple[float, float, tuple[float, ...]]:
    return random.random(), float(np.random.random()), tuple(torch.rand(3).tolist())


def states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    return random.getstate(), numpy_state[1].tolist(), numpy_state[2], torch.random.get_rng_state().tolist()


def test_seeded_numbers_depend_on_the_key_alone() -> None:
    with seeded(1, 2, 3):
        first = draw()
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    with seeded(1, 2, 3):
        assert draw() == first


@pytest.mark.parametrize("key", [(1, 2, 4), (1, 3, 3), (2, 2, 3), (1, 2), (3, 2, 1)])
def test_every_part_of_the_key_counts(key: tuple[int, ...]) -> None:
    with seeded(1, 2, 3):
        first = draw()
    with seeded(*key):
        other = draw()
    assert all(one != another for one, another in zip(first, other, strict=True))


def test_seeded_leaves_the_states_as_they_were() -> None:
    before = states()
    with seeded(5):
        draw()
        assert states() != before
    assert states() == before


def test_seeded_leaves_the_states_as_they_were_after_an_error() -> None:
    before = states()
    with pytest.raises(ZeroDivisionError), seeded(5):
        draw()[0] / 0
    assert states() == before


def test_seeded_blocks_nest() -> None:
    with seeded(7):
        expected = (draw(), draw())
    with seeded(7):
        first = draw()
        with seeded(8):
            draw()
        assert (first, draw()) == expected
