"""Values and gradients of every kernel, as a model calls it, against plain JAX in float32."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from accelerator.device import Device
from upcycle import partitioning
from upcycle.models.head import Head, head_sums
from upcycle.models.layers.attention import attention, implementation
from upcycle.moe.grouped_matmul import grouped_matmul

Arrays = dict[str, jax.Array]
# Of the largest number in a leaf. Weights, their gradients, and a result are rounded to bfloat16, each by up to 2**-9 of its
# size; errors of sums partly cancel.
BFLOAT16, FLOAT32 = 4 * 2.0**-8, 1e-5


def row(name: str, device: Device) -> dict[str, Any]:
    """Compares one kernel with its reference.

    Raises:
      ArithmeticError: they differ by more than rounding.
    """
    dtype = jnp.float32 if device.toy else jnp.bfloat16
    kind, _, variant = name.partition('/')
    mesh = partitioning.make_mesh((1, 1, 1), None, jax.local_devices()[:1])
    with partitioning.use(mesh):
        kernel, reference, arrays, sizes = _CASES[kind](variant, device.toy, dtype)
        found = jax.jit(_results(kernel, dtype))(arrays)
        with jax.default_matmul_precision('highest'):
            wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
            expected = jax.jit(_results(reference, dtype))(wide)
    bound = FLOAT32 if device.toy else BFLOAT16
    differences = {leaf: _difference(found[leaf], expected[leaf]) for leaf in expected}
    worst = max(
        differences, key=lambda leaf: float('inf') if differences[leaf] != differences[leaf] else differences[leaf]
    )
    if not differences[worst] <= bound:
        raise ArithmeticError(
            f'{worst} differs from the reference by {differences[worst]:.2g} of its largest number, more than {bound:.2g}.'
        )
    return {'sizes': f'{sizes}, {jnp.dtype(dtype).name}', 'difference': differences[worst], 'bound': bound}


def _results(function: Callable[..., jax.Array], dtype: Any) -> Callable[[Arrays], Arrays]:
    """Returns the function's result and its gradients, for a cotangent without structure, rounded to a type."""

    def results(arrays: Arrays) -> Arrays:
        out, pull = jax.vjp(lambda arrays: function(**arrays), arrays)
        cotangent = jax.random.normal(jax.random.key(9), out.shape).astype(dtype).astype(out.dtype)
        return {'the result': out} | {f'the gradient of {name}': leaf for name, leaf in pull(cotangent)[0].items()}

    return results


def _difference(found: jax.Array, expected: jax.Array) -> float:
    distance = jnp.abs(found.astype(jnp.float32) - expected).max()
    return float(distance / jnp.maximum(jnp.abs(expected).max(), 1e-30))


# Heads, heads of keys, queries, keys, and what else `attention` is given.
_ATTENTION: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    'all': (12, 12, 197, 197, {}),
    'causal, grouped heads': (8, 2, 1024, 1024, {'causal': True}),
    'window': (8, 2, 1024, 1024, {'causal': True, 'window': 256}),
    'soft cap': (8, 2, 1024, 1024, {'causal': True, 'soft_cap': 20.0}),
    'packed': (8, 2, 1024, 1024, {'causal': True, 'segments': True}),
    'bias': (12, 12, 512, 512, {'bias': True}),
    'bias, causal, 114 long': (12, 12, 114, 114, {'bias': True, 'causal': True}),
    'cross, padded': (12, 12, 114, 512, {'segments': True}),
}


def _attention(variant: str, toy: bool, dtype: Any) -> tuple[Callable, Callable, Arrays, str]:
    heads, key_heads, queries, keys, options = _ATTENTION[variant]
    batch, width = 2, 64
    if toy:
        heads, key_heads, queries, keys, width = 2, 1 + (heads == key_heads), 16, 16 if queries == keys else 24, 8
        options = {**options, **({'window': 4} if 'window' in options else {})}
    options = {**options}
    shapes = {'query': (queries, heads), 'key': (keys, key_heads), 'value': (keys, key_heads)}
    arrays = {
        name: jax.random.normal(jax.random.key(number), (batch, *shape, width)).astype(dtype)
        for number, (name, shape) in enumerate(shapes.items())
    }
    if options.pop('bias', False):
        arrays['bias'] = jax.random.normal(jax.random.key(3), (heads, queries, keys)).astype(dtype)
    if options.pop('segments', False):
        # Two examples in a row; or keys of which the last quarter is padding.
        first = jnp.arange(keys) < (keys // 2 if queries == keys else keys - keys // 4)
        ids = jnp.broadcast_to(jnp.where(first, 1, 2 if queries == keys else 0), (batch, keys))
        options['segment_ids'] = (ids if queries == keys else jnp.ones((batch, queries), jnp.int32), ids)
    options['scale'] = width**-0.5
    asked = {name: options.get(name) for name in ('segment_ids', 'window', 'soft_cap')}
    chosen = implementation(
        *(arrays[name] for name in shapes),
        mask=None,
        bias=arrays.get('bias'),
        causal=options.get('causal', False),
        **asked,
    )
    sizes = f'{chosen}: {batch} x {queries} x {keys}, {heads} heads of {width}, {key_heads} of keys'

    def kernel(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None = None) -> jax.Array:
        return attention(query, key, value, bias=bias, **options)

    return kernel, functools.partial(_plain_attention, **options), arrays, sizes


def _plain_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int | None = None,
    soft_cap: float | None = None,
    segment_ids: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    queries, keys = query.shape[1], key.shape[1]
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
    logits = scale * jnp.einsum('bqhn,bkhn->bhqk', query, key)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    logits = logits if bias is None else logits + bias
    behind = jnp.arange(queries)[:, None] - jnp.arange(keys)
    seen = (behind >= 0 if causal else True) & (behind < (window or keys))
    if segment_ids is not None:
        seen = seen & (segment_ids[0][:, None, :, None] == segment_ids[1][:, None, None, :])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    return jnp.einsum('bhqk,bkhn->bqhn', weights, value)


def _grouped(variant: str, toy: bool, dtype: Any) -> tuple[Callable, Callable, Arrays, str]:
    rows, experts, width, mlp_width = (64, 4, 16, 24) if toy else (4096, 8, 1024, 2816)
    share = rows // experts
    sizes = [share] * experts
    if variant != 'uniform':
        sizes = [rows // 2, *[rows // 2 // (experts - 2)] * (experts - 2), 0]
    sizes[1] += rows - sum(sizes) - 3  # three rows without an expert
    counts = jnp.asarray(sizes, jnp.int32)
    expert = jnp.repeat(jnp.arange(experts), counts, total_repeat_length=rows)
    has_one = (jnp.arange(rows) < counts.sum())[:, None]
    arrays = {
        'rows': jax.random.normal(jax.random.key(0), (rows, width)).astype(dtype),
        'kernels': (jax.random.normal(jax.random.key(1), (experts, width, mlp_width)) * width**-0.5).astype(dtype),
    }

    def kernel(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        return jnp.where(has_one, grouped_matmul(rows, kernels, counts), 0)

    def reference(rows: jax.Array, kernels: jax.Array) -> jax.Array:
        one_hot = jax.nn.one_hot(expert, experts) * has_one
        return sum(one_hot[:, e : e + 1] * (rows @ kernels[e]) for e in range(experts))

    return kernel, reference, arrays, f'{rows} rows, {experts} experts, {width} x {mlp_width}'


def _cross_entropy(variant: str, toy: bool, dtype: Any) -> tuple[Callable, Callable, Arrays, str]:
    tokens, width, vocabulary = (16, 8, 32) if toy else (1024, 1024, 32128)
    chunk = None if variant == 'all logits' else vocabulary // 4
    targets = jax.random.randint(jax.random.key(0), (tokens,), 0, vocabulary)
    arrays = {
        'activations': jax.random.normal(jax.random.key(1), (tokens, width)).astype(dtype),
        'embedding': jax.random.normal(jax.random.key(2), (vocabulary, width)) * width**-0.5,
    }

    losses = {'z_loss': 1e-4, 'label_smoothing': 0.0}

    def logits(embedding: jax.Array, activations: jax.Array) -> jax.Array:
        kernel = embedding.astype(activations.dtype)
        return jnp.einsum('...d,vd->...v', activations, kernel, preferred_element_type=jnp.float32)

    def kernel(activations: jax.Array, embedding: jax.Array) -> jax.Array:
        head = Head(embedding, ('vocab', 'embed'), logits)
        weights = jnp.ones((1, tokens))
        return head_sums(head, activations[None], targets[None], weights, chunk=chunk, **losses)['loss']

    def reference(activations: jax.Array, embedding: jax.Array) -> jax.Array:
        wide = activations @ embedding.T
        log_z = jax.nn.logsumexp(wide, axis=-1)
        wanted = jnp.take_along_axis(wide, targets[:, None], axis=-1)[:, 0]
        return (log_z - wanted + losses['z_loss'] * log_z**2).sum()

    return kernel, reference, arrays, f'{tokens} tokens, {vocabulary} classes'


_CASES = {'attention': _attention, 'grouped product': _grouped, 'cross entropy': _cross_entropy}
