"""Attention kernels: on CPUs in interpret mode against the reference, and compiled for accelerators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
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
