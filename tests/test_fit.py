"""Bytes of any shape are fitted to a few that were measured, never too small for those, and close for others."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import BertForMaskedLM

from hf_mbp.fit import SAFETY, _least_squares, fit_budget, held_out_error
from hf_mbp.memory import measure_activations
from hf_mbp.sizing import probe_shapes
from tests.examples import examples
from tests.helpers import VOCABULARY, bert_config, build

quick = examples(100)


@st.composite
def measurements(draw: Any) -> list[tuple[int, int, int]]:
    """Shapes as `measure_budget` takes them, and others beside them, of any model with a linear and a square part."""
    per_cell, per_pair, fixed = draw(st.integers(1, 10**5)), draw(st.integers(0, 10**3)), draw(st.integers(0, 10**7))
    widths = draw(st.lists(st.integers(32, 512), min_size=1, max_size=4, unique=True))
    rows = draw(st.integers(1, 16))
    return [(rows, width, rows * width * (per_cell + per_pair * width) + fixed) for width in widths]


@given(measured=measurements(), wider=st.integers(0, 1000))
@quick
def test_no_measured_shape_is_predicted_too_small(measured: list[tuple[int, int, int]], wider: int) -> None:
    budget = fit_budget(measured, max_bytes=10**9)
    for rows, width, size in measured:
        assert budget.bytes(rows, width) >= size * (1 + 1e-9)
        assert budget.bytes(rows, width + wider) >= size * (1 + 1e-9)


@given(
    per_cell=st.integers(1, 10**5),
    per_pair=st.integers(0, 10**3),
    widths=st.tuples(st.integers(1, 99), st.integers(100, 512)),
)
@quick
def test_what_grows_by_the_model_is_found(per_cell: int, per_pair: int, widths: tuple[int, int]) -> None:
    measured = [(3, width, 3 * width * (per_cell + per_pair * width)) for width in widths]
    budget = fit_budget(measured, max_bytes=10**9)
    assert budget.bytes_per_cell == pytest.approx(SAFETY * per_cell)
    assert budget.bytes_per_pair == pytest.approx(SAFETY * per_pair, abs=1e-6)
    assert budget.max_bytes == 10**9
    assert budget.max_tokens is None


def test_one_shape_is_enough_for_a_linear_budget() -> None:
    assert fit_budget([(4, 10, 4000)], max_bytes=12_000).tokens_at(10) == 100


@pytest.mark.parametrize("width", [1000, 7.3])
def test_shapes_of_one_width_do_not_make_narrower_rows_look_small(width: float) -> None:
    budget = fit_budget([(2, width, 2000), (8, width, 8000)], max_bytes=10**9)
    assert budget.bytes(100, width / 20) == pytest.approx(SAFETY * 5000)


def test_bytes_that_grow_faster_than_the_square_still_give_a_budget() -> None:
    measured = [(1, 10, 10), (1, 100, 100_000)]
    budget = fit_budget(measured, max_bytes=10**9)
    assert all(budget.bytes(rows, width) >= size for rows, width, size in measured)


# A real model


@pytest.fixture(scope="module")
def bytes_of() -> Callable[[int, int], int]:
    """Peak bytes of the activations of a BERT for `rows` and `width`."""
    config = bert_config(max_position_embeddings=512, hidden_dropout_prob=0.1, num_hidden_layers=3)
    model = build(BertForMaskedLM, config).train()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def measure(rows: int, width: int) -> int:
        token_ids = torch.randint(5, VOCABULARY, (rows, width))
        inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids), "labels": token_ids}
        return measure_activations(lambda: model(**inputs).loss.backward())

    return measure


MEASURED = [(8, 32), (1, 300)]
HELD_OUT = [(1, 40), (3, 37), (16, 48), (2, 200), (40, 33), (5, 100), (1, 512)]


def test_held_out_shapes_of_a_real_model_stay_under_the_prediction(bytes_of: Callable[[int, int], int]) -> None:
    budget = fit_budget([(rows, width, bytes_of(rows, width)) for rows, width in MEASURED], max_bytes=10**9)
    for rows, width in HELD_OUT:
        ratio = budget.bytes(rows, width) / bytes_of(rows, width)
        assert 1 <= ratio < 2, (rows, width, ratio)


@pytest.mark.parametrize("longest", [2, 12, 30, 33, 100])
def test_short_rows_do_not_make_shorter_ones_look_small(bytes_of: Callable[[int, int], int], longest: int) -> None:
    fitted, held_out = probe_shapes(longest, is_cut=True)
    measured = [(rows, width, bytes_of(rows, width)) for rows, width in [*fitted, held_out]]
    budget = fit_budget(measured, max_bytes=10**9)
    for rows, width in [(512, 2), (200, 5), (100, 10), (60, 30)]:
        if width <= longest:
            assert budget.bytes(rows, width) > bytes_of(rows, width), (rows, width)


@pytest.mark.parametrize("width", [24, 64, 150, 400])
def test_largest_micro_batch_that_a_budget_allows_stays_under_its_bytes(
    bytes_of: Callable[[int, int], int], width: int
) -> None:
    max_bytes = 20_000_000
    budget = fit_budget([(rows, at, bytes_of(rows, at)) for rows, at in MEASURED], max_bytes=max_bytes)
    rows = budget.tokens_at(width) // width
    assert budget.fits(rows, width)
    assert not budget.fits(rows + 1, width)
    assert 0.5 * max_bytes < bytes_of(rows, width) <= max_bytes


def peak_of_moments(rows: int, width: int) -> int:
    """A pass whose peak is at one of two moments: with a large gradient, or with all activations."""
    return max(30_000_000 + 100_000 * rows * width, rows * width * (220_000 + 300 * width))


def test_small_micro_batches_do_not_make_large_ones_look_small() -> None:
    fitted, held_out = probe_shapes(512, is_cut=True)
    measured = [(rows, width, peak_of_moments(rows, width)) for rows, width in [*fitted, held_out]]
    budget = fit_budget(measured, max_bytes=10**12)
    for rows, width in [(64, 64), (8, 512), (200, 20), (32, 256)]:
        assert 1 <= budget.bytes(rows, width) / peak_of_moments(rows, width) < 1.1 * SAFETY


def test_a_held_out_shape_is_judged_by_the_others() -> None:
    shapes = [(2, 32), (16, 32), (2, 512)]
    measured = [(rows, width, rows * width * (1000 + 10 * width)) for rows, width in shapes]
    assert held_out_error(measured, (4, 128, 4 * 128 * (1000 + 10 * 128))) == pytest.approx(0, abs=1e-6)
    assert held_out_error(measured, (4, 128, 2 * 4 * 128 * (1000 + 10 * 128))) == pytest.approx(0.5)


@pytest.mark.parametrize("longest", [1, 2, 3, 31, 33, 64, 65, 600, 10_000])
@pytest.mark.parametrize("is_cut", [True, False])
def test_shapes_that_are_measured_are_small_and_differ(longest: int, is_cut: bool) -> None:
    fitted, held_out = probe_shapes(longest, is_cut=is_cut)
    assert len({*fitted, held_out}) == len(fitted) + 1
    assert all(rows >= 2 and width <= longest for rows, width in [*fitted, held_out])
    assert not is_cut or longest == 1 or fitted[-1][1] >= 2 * fitted[0][1]
    assert not is_cut or all(rows * width <= 1024 for rows, width in [*fitted, held_out])


@given(
    columns=st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=2, max_size=5),
    count=st.integers(1, 2),
)
@quick
def test_least_squares_are_those_of_numpy(columns: list[tuple[float, float]], count: int) -> None:
    chosen = np.array(columns)[:, :count]
    expected, _, rank, singular = np.linalg.lstsq(chosen, np.ones(len(columns)), rcond=None)
    assume(rank == count and singular[-1] > 1e-3 * singular[0])
    np.testing.assert_allclose(_least_squares(chosen), expected, rtol=1e-6, atol=1e-6)


IN_LITTLE_ADDRESS_SPACE = """
import resource
from hf_mbp.fit import fit_budget
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 8 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(fit_budget([(2, 32, 5000), (16, 32, 30000), (2, 512, 90000)], max_bytes=10**6).tokens_at(100))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the size of a process is read from /proc")
def test_a_budget_is_fitted_where_there_is_no_address_space_left() -> None:
    """OpenBLAS would end the process: it takes 32 MiB in one piece when it is first called."""
    command = [sys.executable, "-c", IN_LITTLE_ADDRESS_SPACE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - its own text
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0
