"""Attention kernels: on CPUs in interpret mode against the reference, and compiled for accelerators."""

import contextlib
import dataclasses
import os
import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from tests.moe.quick import jit
from tests.test_compile import requires_libtpu
from upcycle import compile as compile_module
from upcycle import partitioning
from upcycle.models.layers import attention as module
from upcycle.models.layers.attention import Implementation, attention, implementation, segments


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem: sizes, and what `attention` is given."""

    queries: int
    keys: int
    heads: int = 2
    key_heads: int = 2
    head_dim: int = 64
    bias: bool = False
    packed: bool = False
    causal: bool = False
    window: int | None = None
    soft_cap: float | None = None
    scale: float = 1.0
    batch: int = 2

    def arguments(self, dtype):
        """Arrays by name. Packed segments have padding at the end; every query with a gradient sees a key."""
        rng = np.random.default_rng(0)

        def normal(*shape):
            return jnp.asarray(rng.normal(size=shape), dtype)

        arrays = {
            'query': normal(self.batch, self.queries, self.heads, self.head_dim) * self.head_dim**-0.5 / self.scale,
            'key': normal(self.batch, self.keys, self.key_heads, self.head_dim),
            'value': normal(self.batch, self.keys, self.key_heads, self.head_dim),
            'towards': normal(self.batch, self.queries, self.heads, self.head_dim),
        }
        if self.bias:
            arrays['bias'] = normal(self.heads, self.queries, self.keys)
        if self.packed:

            def ids(length):
                return jnp.arange(length)[None] * 3 // length + jnp.zeros((self.batch, 1), jnp.int32)

            def real(length):
                return jnp.arange(length)[None] < length - jnp.array([[length // 8]] + [[0]] * (self.batch - 1))

            pair = self.queries, self.keys
            arrays['segment_ids'] = segments(*map(real, pair), *map(ids, pair))
            arrays['towards'] *= real(self.queries)[..., None, None]
        return arrays


ROWS = {
    'encoder': Case(130, 130, bias=True, packed=True),
    'decoder': Case(114, 114, heads=4, key_heads=4, bias=True, packed=True, causal=True),
    'one block of queries is not enough': Case(300, 1100, bias=True),
    'cross': Case(20, 150, packed=True),
    'images': Case(197, 197, heads=3, key_heads=3, scale=0.125),
    'heads of 80': Case(9, 12, heads=16, key_heads=16, head_dim=80, bias=True),
}
SPLASH = {
    'causal': Case(256, 256, heads=4, causal=True, scale=0.125),
    'window, packed': Case(200, 200, causal=True, window=70, packed=True),
    'soft cap': Case(130, 130, heads=4, key_heads=1, causal=True, soft_cap=2.0),
    'long': Case(140, 2100, batch=1),
}
OFTEN = ('decoder', 'window, packed')
CASES = [
    pytest.param(case, implementation, id=name, marks=[] if name in OFTEN else pytest.mark.exhaustive)
    for implementation, cases in ((Implementation.ROWS, ROWS), (Implementation.SPLASH, SPLASH))
    for name, case in cases.items()
]


def output_and_gradients(case, arrays):
    """Outputs that count, and gradients of all arguments that have one."""
    given = dict(arrays)
    towards = given.pop('towards')
    ids = given.pop('segment_ids', None)
    options = {name: getattr(case, name) for name in ('causal', 'window', 'soft_cap', 'scale')}

    def loss(given):
        query, key, value = (given[name] for name in ('query', 'key', 'value'))
        out = attention(query, key, value, bias=given.get('bias'), segment_ids=ids, **options)
        counted = jnp.where(towards == 0, 0, out.astype(jnp.float32))
        return (counted * towards).sum(), counted

    (_, out), gradients = jit(jax.value_and_grad(loss, has_aux=True))(given)
    return {'out': out, **gradients}


def chosen(case, arrays):
    return implementation(
        arrays['query'],
        arrays['key'],
        arrays['value'],
        mask=None,
        bias=arrays.get('bias'),
        segment_ids=arrays.get('segment_ids'),
        causal=case.causal,
        window=case.window,
        soft_cap=case.soft_cap,
    )


@pytest.mark.parametrize(('case', 'expected'), CASES)
def test_a_kernel_is_the_reference_in_float32(case, expected, monkeypatch):
    arrays = case.arguments(jnp.float32)
    reference = output_and_gradients(case, arrays)
    monkeypatch.setattr(module, 'interpreted', True)
    assert chosen(case, arrays) is expected
    ours = output_and_gradients(case, arrays)
    assert ours.keys() == reference.keys()
    for name, array in reference.items():
        assert np.abs(ours[name] - array).max() <= 1e-5 * np.abs(array).max(), name


def exact(case, arrays):
    """Output and gradients in float64, and for each the sum of the absolute values of what is added up."""
    query, key, value, towards = (
        np.asarray(arrays[name], np.float64).swapaxes(1, 2) for name in ('query', 'key', 'value', 'towards')
    )
    groups = case.heads // case.key_heads
    key, value = (np.repeat(x, groups, axis=1) for x in (key, value))
    logits = case.scale * query @ key.swapaxes(2, 3)
    if case.bias:
        logits += np.asarray(arrays['bias'], np.float64)
    visible = np.ones((case.queries, case.keys), bool)
    distance = np.arange(case.queries)[:, None] - np.arange(case.keys)
    if case.causal:
        visible = (distance >= 0) & (distance < (case.window or case.keys))
    visible = visible[None]
    if case.packed:
        query_ids, key_ids = map(np.asarray, arrays['segment_ids'])
        visible = visible & (query_ids[:, :, None] == key_ids[:, None])
    logits = np.where(visible[:, None], logits, -1e30)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    dweights = towards @ value.swapaxes(2, 3)
    dlogits = weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    # A kernel may take the sum from its rounded output.
    loose = np.abs(dlogits) + weights * (np.abs(weights @ value) * np.abs(towards)).sum(axis=-1, keepdims=True)
    counts = (towards != 0).any(axis=-1, keepdims=True)
    columns = np.swapaxes(weights, 2, 3), np.swapaxes(dlogits, 2, 3), np.swapaxes(loose, 2, 3)
    products = {
        'out': (weights * counts, value, weights * counts),
        'query': (case.scale * dlogits, key, case.scale * loose),
        'key': (case.scale * columns[1], query, case.scale * columns[2]),
        'value': (columns[0], towards, columns[0]),
    }

    def summed(name, product):
        if name in ('key', 'value'):
            product = product.reshape(case.batch, case.key_heads, groups, *product.shape[2:]).sum(axis=2)
        return product.swapaxes(1, 2)

    sums = {
        name: (summed(name, left @ right), summed(name, np.abs(most) @ np.abs(right)))
        for name, (left, right, most) in products.items()
    }
    if case.bias:
        sums['bias'] = dlogits.sum(axis=0), np.abs(loose).sum(axis=0)
    return sums


@pytest.mark.parametrize(('case', 'expected'), [c for c in CASES if not c.values[0].soft_cap])
def test_in_bfloat16_it_errs_by_its_roundings(case, expected, monkeypatch):
    """Two of relative size 2 ** -8: of what a product sums up, and of the result. What is summed up is float32 before."""
    arrays = case.arguments(jnp.bfloat16)
    monkeypatch.setattr(module, 'interpreted', True)
    ours = output_and_gradients(case, arrays)
    for name, (result, absolute) in exact(case, arrays).items():
        assert (
            np.abs(np.asarray(ours[name], np.float64) - result) <= 2**-7 * absolute + 1e-6 * absolute.max()
        ).all(), name


def shapes_of(case, dtype, sharding=None):
    """Shapes of query, key, value, bias and segments, those that a case has."""
    shapes = jax.eval_shape(lambda: case.arguments(dtype))
    return {
        name: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes.get(name))
        for name in ('query', 'key', 'value', 'bias', 'segment_ids')
    }


def gradients(case):
    """A function of the arrays of `shapes_of`, without dtype float0."""
    options = {name: getattr(case, name) for name in ('causal', 'window', 'soft_cap', 'scale')}

    def run(query, key, value, bias, segment_ids):
        def loss(query, key, value, bias):
            out = attention(query, key, value, bias=bias, segment_ids=segment_ids, **options)
            return jnp.square(out.astype(jnp.float32)).sum()

        return jax.grad(loss, argnums=(0, 1, 2) if bias is None else (0, 1, 2, 3))(query, key, value, bias)

    return run


def compile_for(topology):
    """Compiles all cases for a TPU; prints how many kernels each has. Called in a process: see `tests/test_compile.py`."""
    (device, *_) = compile_module._devices(topology, 1)
    partitioning._DEVICE.set(device)
    sharding = jax.sharding.SingleDeviceSharding(device)
    for name, case in (ROWS | SPLASH).items():
        shapes = shapes_of(case, jnp.bfloat16, sharding)
        text = jax.jit(gradients(case)).lower(**shapes).compile().as_text()
        print(f'{name}: {text.count("tpu_custom_call")} kernels', flush=True)


@requires_libtpu
@pytest.mark.exhaustive
@pytest.mark.parametrize('topology', ['v4:2x2x1', 'v5p:2x2x1', 'v6e:2x2'])
def test_all_kernels_compile_for_tpus(topology):
    code = f'from tests.models.test_attention_kernels import compile_for; compile_for({topology!r})'
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'TPU_SKIP_MDS_QUERY': '1', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = dict(line.split(': ') for line in done.stdout.splitlines())
    assert kernels.keys() == (ROWS | SPLASH).keys()
    # Forward and backward; the bias's gradient apart; queries apart from keys and values.
    apart = {'one block of queries is not enough', *SPLASH}
    assert {name for name, count in kernels.items() if count == '2 kernels'} == kernels.keys() - apart
    assert {name for name, count in kernels.items() if count == '3 kernels'} == apart


V5P, V3 = (mock.Mock(platform='tpu', device_kind=kind) for kind in ('TPU v5', 'TPU v3'))
H100, V100, AMD = (mock.Mock(platform='gpu', compute_capability=c) for c in ('9.0', '7.0', 'gfx942'))


@pytest.mark.parametrize(
    ('case', 'dtype', 'device', 'expected'),
    [
        (ROWS['encoder'], 'bfloat16', V5P, 'rows'),
        (ROWS['images'], 'float32', V5P, 'rows'),
        (SPLASH['causal'], 'bfloat16', V5P, 'splash'),
        (SPLASH['long'], 'bfloat16', V5P, 'splash'),
        (dataclasses.replace(SPLASH['long'], bias=True), 'bfloat16', V5P, 'reference'),
        (dataclasses.replace(ROWS['encoder'], queries=1), 'bfloat16', V5P, 'reference'),
        (ROWS['encoder'], 'bfloat16', V3, 'reference'),
        (SPLASH['causal'], 'bfloat16', H100, 'cudnn'),
        (SPLASH['window, packed'], 'bfloat16', H100, 'cudnn'),
        (SPLASH['causal'], 'float32', H100, 'reference'),
        (SPLASH['soft cap'], 'bfloat16', H100, 'reference'),
        (ROWS['images'], 'bfloat16', H100, 'reference'),
        (ROWS['cross'], 'bfloat16', H100, 'cudnn'),
        (ROWS['encoder'], 'bfloat16', H100, 'reference'),
        (SPLASH['causal'], 'bfloat16', V100, 'reference'),
        (SPLASH['causal'], 'bfloat16', AMD, 'reference'),
        (SPLASH['causal'], 'bfloat16', jax.devices()[0], 'reference'),
    ],
)
def test_the_device_chooses(case, dtype, device, expected, monkeypatch):
    monkeypatch.setattr(partitioning, 'device', lambda: device)
    assert chosen(case, shapes_of(case, dtype)) == expected


@pytest.mark.parametrize('case', [SPLASH['causal'], SPLASH['window, packed'], ROWS['cross']])
def test_cudnns_attention_is_lowered_for_gpus(case, monkeypatch):
    """Lowered only: JAX asks the library for its version, which needs a GPU."""
    monkeypatch.setattr(partitioning, 'device', lambda: H100)
    monkeypatch.setattr(fused_attention_stablehlo, 'check_cudnn_version', lambda: 91000)
    traced = jax.jit(gradients(case)).trace(**shapes_of(case, jnp.bfloat16))
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert 'cudnn$fmha' in text and 'Backward' in text
    assert 'stablehlo.exponential' not in text


def test_a_program_is_traced_for_the_devices_of_the_mesh_in_use(monkeypatch):
    here, there = jax.devices()[0], V5P
    monkeypatch.setattr(partitioning.jax, 'set_mesh', lambda mesh: contextlib.nullcontext())
    with partitioning.use(mock.Mock(devices=np.array([there]))):
        assert partitioning.device() is there
        with partitioning.on_one_device(here):
            assert partitioning.device() is here
    assert partitioning.device() is here
