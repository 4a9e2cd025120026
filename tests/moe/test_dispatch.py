"""The two ways to add up slots: by scatter, and in sorted blocks, which is what a TPU runs."""

import functools

import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.moe.dispatch import sum_in_blocks, sum_scattered

ROWS, WIDTH = 40, 6


@pytest.mark.parametrize('longest', [1, 2, 3, 8, 11, 40])
def test_blocks_add_up_what_scattering_does(longest):
    rng = np.random.default_rng(longest)
    # Every row from 0 to `longest` times, one of them exactly that often, and empty slots, in any order.
    counts = rng.integers(0, longest + 1, ROWS)
    counts[[0, -1]] = longest, 0
    row_R = rng.permutation(np.concatenate([np.repeat(np.arange(ROWS), counts), np.full(7, ROWS)])).astype(np.int32)
    y_RxD = rng.normal(size=(row_R.size, WIDTH)).astype(np.float32)
    weight_R = np.where(row_R < ROWS, rng.random(row_R.size), 0).astype(np.float32)
    expected = np.zeros((ROWS + 1, WIDTH))
    np.add.at(expected, row_R, y_RxD.astype(np.float64) * weight_R[:, None])
    scattered = jit(lambda *given: sum_scattered(*given, num_rows=ROWS))(y_RxD, weight_R, row_R)
    in_blocks = jit(lambda *given: sum_in_blocks(*given, num_rows=ROWS, longest=longest, block=16))(
        y_RxD, weight_R, row_R
    )
    np.testing.assert_allclose(scattered, expected[:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(in_blocks, expected[:-1], rtol=1e-5, atol=1e-6)


def test_no_slots_at_all():
    given = np.ones((3, 2), np.float32), np.zeros(3, np.float32), np.full(3, 5, np.int32)
    nothing = jit(functools.partial(sum_in_blocks, num_rows=5, longest=4))(*given)
    np.testing.assert_array_equal(nothing, np.zeros((5, 2)))
