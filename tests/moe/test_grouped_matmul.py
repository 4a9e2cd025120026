"""Products of rows sorted by expert, against a loop over experts and `jax.lax.ragged_dot`."""

import functools
import json
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.hlo import Program
from upcycle.moe import grouped_matmul as grouped
from upcycle.moe import megablox
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
    """A program that is lowered for a TPU on this host holds the TPU's kernels, one for each product."""
    traced = jax.jit(functools.partial(results, grouped_matmul)).trace(*operands(CASES['uneven']))
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ('tpu', 'cpu', 'cuda')}
    assert texts['tpu'].count('@tpu_custom_call') == 3 and 'ragged_dot' not in texts['tpu']
    assert 'stablehlo.while' in texts['cpu'] and 'custom_call' not in texts['cpu']
    assert 'ragged_dot' in texts['cuda'] and 'tpu_custom_call' not in texts['cuda']


@pytest.mark.parametrize(('width', 'dtype'), [(2049, jnp.float32), (128, jnp.float16)])
def test_what_the_kernels_do_not_allow_is_left_to_jax(width, dtype):
    shapes = jax.ShapeDtypeStruct((256, 128), dtype), jax.ShapeDtypeStruct((2, 128, width), dtype)
    traced = jax.jit(grouped_matmul).trace(*shapes, jax.ShapeDtypeStruct((2,), jnp.int32))
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert 'ragged_dot' in text and 'tpu_custom_call' not in text


def interpreted(x_RxD, kernel_ExDxF, sizes_E, dy_RxF):
    axes = None, None
    y_RxF = megablox.product(x_RxD, kernel_ExDxF, sizes_E, axes, interpret=True)
    y_RxF = jnp.where(jnp.arange(len(y_RxF))[:, None] < sizes_E.sum(), y_RxF, 0)
    return y_RxF, *megablox.gradients(x_RxD, kernel_ExDxF, sizes_E, dy_RxF, axes, kernel_ExDxF.dtype, interpret=True)


# Of one shape, so that they are compiled once: 300 rows, no multiple of a tile, and several tiles for an expert.
KERNEL_CASES = [[5, 0, 250, 1, 44], [0, 0, 131, 0, 0], [0, 0, 0, 0, 0], [128, 0, 128, 0, 44]]
interpreted_once = jit(interpreted)


@pytest.mark.parametrize('sizes', KERNEL_CASES)
def test_kernels_of_tpus_interpreted(sizes):
    """Empty experts and rows without an expert, whose numbers do not matter and whose gradients are 0."""
    x_RxD, kernel_ExDxF, sizes_E, dy_RxF = operands(sizes, rows=300)
    no_expert = jnp.arange(300)[:, None] >= sum(sizes)
    spoilt = jnp.where(no_expert, jnp.nan, x_RxD), kernel_ExDxF, sizes_E, jnp.where(no_expert, jnp.inf, dy_RxF)
    for ours, expected in zip(interpreted_once(*spoilt), by_expert(x_RxD, kernel_ExDxF, sizes_E, dy_RxF), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize('kernel_type', [jnp.bfloat16, jnp.float32])
def test_kernels_of_tpus_round_bfloat16_once(kernel_type):
    """Sums are in float32, so a result is within half a unit of its last place, 2 ** -9, of the exact one, and errors of sums."""
    x_RxD, kernel_ExDxF, sizes_E, dy_RxF = operands(KERNEL_CASES[0], jnp.bfloat16, rows=300)
    ours = jit(interpreted)(x_RxD, kernel_ExDxF, sizes_E, dy_RxF)
    for result, expected in zip(ours, by_expert(x_RxD, kernel_ExDxF, sizes_E, dy_RxF), strict=True):
        assert result.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(result, np.float64), expected, rtol=2**-8, atol=1e-4)
    gradient = megablox.gradients(x_RxD, kernel_ExDxF, sizes_E, dy_RxF, (None, None), kernel_type, interpret=True)[1]
    assert gradient.dtype == kernel_type
    if kernel_type == jnp.float32:
        np.testing.assert_allclose(gradient, by_expert(x_RxD, kernel_ExDxF, sizes_E, dy_RxF)[2], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(('inner', 'outer'), [(4096, 14336), (14336, 4096), (576, 1536), (3584, 18944), (200, 72)])
@pytest.mark.parametrize(('rows', 'experts'), [(16384, 1), (16384, 8), (300, 128)])
@pytest.mark.parametrize('item', [2, 4])
def test_tiles_divide_the_matrices_and_fit_into_vector_memory(rows, experts, inner, outer, item):
    tiles = [of(rows, experts, inner, outer, item) for of in (megablox.product_tiles, megablox.gradient_tiles)]
    for tm, tk, tn in tiles:
        assert inner % tk == outer % tn == 0 and all(t % 128 == 0 or t in (inner, outer) for t in (tk, tn))
        assert tm == 128 or experts * tm <= 0.1 * rows
    assert all(item * (tm * tk + tk * tn + tm * tn) <= 8 * 2**20 for tm, tk, tn in tiles)


@pytest.mark.exhaustive
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'])
def test_kernels_compile_ahead_of_time(topology):
    """Of one layer of Llama-3.1-8B, with the compiler's FLOPs those of the rows; v4 with one device for each chip (megacore)."""
    pytest.importorskip('libtpu', reason='libtpu is not installed: pip install "upcycle[tpu]"')
    done = subprocess.run(
        [sys.executable, '-m', 'tests.moe.kernels_ahead_of_time', topology], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for line in json.loads(done.stdout.splitlines()[-1]):
        assert line['kernels'] == 3 and line['flops'] == pytest.approx(line['needed'], rel=0.01)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_tokamax(dtype):
    """Its signature is that of `jax.lax.ragged_dot` in each of its versions."""
    pytest.importorskip('tokamax', reason='tokamax is not installed: pip install "upcycle[tokamax]"')
    arguments = operands(CASES['some rows without expert'], dtype)
    product = functools.partial(grouped.tokamax_ragged_dot(), implementation='xla')
    with mock.patch.object(grouped, '_library_of_gpus', lambda: product):
        y_RxF = product(*arguments[:3])
        gradients = grouped._gradients_of_a_library(*arguments, dtype=dtype)
    expected = by_expert(*arguments)
    bound = 1e-5 if dtype == jnp.float32 else 2**-7
    for ours, exact in zip((y_RxF[:33], *gradients), (expected[0][:33], *expected[1:]), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float64), exact, rtol=bound, atol=2 * bound)
