"""Products of rows sorted by expert, against a loop over experts and `jax.lax.ragged_dot`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.hlo import Program
from upcycle.moe.grouped_blocks import block_size
from upcycle.moe.grouped_matmul import grouped_matmul

D, F, R = 24, 40, 64
# Rows of each expert; the others have none.
CASES = {
    'uneven': [5, 0, 37, 1, 20],
    'one expert': [0, 64, 0, 0, 0],
    'some rows without expert': [3, 9, 0, 4, 17],
    'all rows without expert': [0, 0, 0, 0, 0],
    'one row': [0, 0, 1, 0, 0],
    'whole blocks': [8, 16, 8, 0, 32],
}


def operands(sizes, dtype=jnp.float32, rows=R):
    """Rows, matrices, sizes, and what the result is multiplied with."""
    rng = np.random.default_rng(0)
    shapes = (rows, D), (len(sizes), D, F), (rows, F)
    x_RxD, kernel_ExDxF, dy_RxF = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    return x_RxD, kernel_ExDxF / np.sqrt(D).astype(dtype), jnp.asarray(sizes, jnp.int32), dy_RxF


def results(product, x_RxD, kernel_ExDxF, sizes_E, dy_RxF):
    """The result with rows without an expert at 0, and both gradients."""
    y_RxF, pull = jax.vjp(lambda x, kernel: product(x, kernel, sizes_E), x_RxD, kernel_ExDxF)
    return jnp.where(jnp.arange(len(y_RxF))[:, None] < sizes_E.sum(), y_RxF, 0), *pull(dy_RxF)


compiled = jit(functools.partial(results, grouped_matmul))


def by_expert(x_RxD, kernel_ExDxF, sizes_E, dy_RxF):
    x_RxD, kernel_ExDxF, dy_RxF = (np.asarray(a, np.float64) for a in (x_RxD, kernel_ExDxF, dy_RxF))
    y_RxF, dx_RxD, dkernel_ExDxF = np.zeros_like(dy_RxF), np.zeros_like(x_RxD), np.zeros_like(kernel_ExDxF)
    ends = np.cumsum(sizes_E)
    for e, (end, size) in enumerate(zip(ends, np.asarray(sizes_E), strict=True)):
        rows = slice(end - size, end)
        y_RxF[rows] = x_RxD[rows] @ kernel_ExDxF[e]
        dx_RxD[rows] = dy_RxF[rows] @ kernel_ExDxF[e].T
        dkernel_ExDxF[e] = x_RxD[rows].T @ dy_RxF[rows]
    return y_RxF, dx_RxD, dkernel_ExDxF


@pytest.mark.parametrize('case', CASES)
def test_result_and_gradients(case):
    arguments = operands(CASES[case])
    for ours, expected in zip(compiled(*arguments), by_expert(*arguments), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('sizes', 'rows'), [([1, 0, 0, 1, 0, 1, 0, 0], 4), ([1], 1), ([150, 362], 512)])
def test_other_sizes(sizes, rows):
    """Fewer rows than experts, one row, and blocks of 64 rows."""
    arguments = operands(sizes, rows=rows)
    for ours, expected in zip(compiled(*arguments), by_expert(*arguments), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_sums_in_float32():
    """The kernel's gradient is a sum over blocks: rounded once, it is within a unit of the last place."""
    arguments = operands(CASES['uneven'], jnp.bfloat16)
    for ours, expected in zip(compiled(*arguments), by_expert(*arguments), strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_rows_do_not_see_the_others(dtype):
    """Bit for bit, wherever a row lies in its block, and even if rows without an expert are not finite."""
    x_RxD, kernel_ExDxF, sizes_E, dy_RxF = operands([5, 30, 0, 8, 0], dtype)
    y_RxF, dx_RxD, dkernel_ExDxF = compiled(x_RxD, kernel_ExDxF, sizes_E, dy_RxF)
    other = compiled(x_RxD.at[43:].set(jnp.nan), kernel_ExDxF, sizes_E, dy_RxF.at[43:].set(jnp.inf))
    for a, b in zip((y_RxF, dx_RxD, dkernel_ExDxF), other, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not dx_RxD[43:].any()
    # One row fewer of the first expert, so that all others move up by one.
    fewer = compiled(jnp.roll(x_RxD, -1, axis=0), kernel_ExDxF, sizes_E.at[0].set(4), jnp.roll(dy_RxF, -1, axis=0))
    np.testing.assert_array_equal(fewer[0][:42], y_RxF[1:43])
    np.testing.assert_array_equal(fewer[1][:42], dx_RxD[1:43])
    np.testing.assert_array_equal(fewer[2][1:], dkernel_ExDxF[1:])


def test_flops_are_those_of_the_chosen_experts():
    """1,024 tokens, Top-2 of 8: at most 1.35 times the work of 2,048 rows, in all three products, loops multiplied out."""
    R, E, D, F = 2048, 8, 32, 64
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((R, D), (E, D, F), (R, F))]
    sizes_E = jax.ShapeDtypeStruct((E,), jnp.int32)
    x_RxD, kernel_ExDxF, dy_RxF = shapes
    program = compiled.lower(x_RxD, kernel_ExDxF, sizes_E, dy_RxF).compile()
    ideal = 3 * 2 * R * D * F
    assert ideal <= Program(program.as_text()).matmul_flops() <= 1.35 * ideal
    assert program.cost_analysis()['flops'] <= 1.35 * ideal
    expanded = jit(functools.partial(results, jax.lax.ragged_dot)).lower(x_RxD, kernel_ExDxF, sizes_E, dy_RxF).compile()
    assert Program(expanded.as_text()).matmul_flops() >= 0.9 * E * ideal


@pytest.mark.parametrize(
    ('rows', 'experts', 'block'), [(2, 8, 8), (512, 8, 16), (2048, 8, 64), (4096, 8, 128), (10**6, 8, 128)]
)
def test_block_size(rows, experts, block):
    assert block_size(rows, experts) == block


def test_the_platform_decides_when_lowered():
    """A program that is lowered for a TPU on this host holds the TPU's product."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((64, D), (4, D, F))]
    sizes_E = jax.ShapeDtypeStruct((4,), jnp.int32)
    traced = jax.jit(jax.grad(lambda x, k, sizes: grouped_matmul(x, k, sizes).sum(), (0, 1))).trace(*shapes, sizes_E)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ('tpu', 'cpu')}
    assert 'ragged_dot' in texts['tpu'] and 'stablehlo.while' not in texts['tpu']
    assert 'ragged_dot' not in texts['cpu'] and 'stablehlo.while' in texts['cpu']
