"""Attention and relative position biases."""

import enum
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle.models import memory
from upcycle.models.layers import Dense, drop, drop_key

_normal_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class PositionBiases(enum.StrEnum):
    """Tables of relative position biases."""

    SHARED = 'shared'  # one for each stack: T5, mT5
    EVERY_LAYER = 'every_layer'  # one for each layer: umT5, T5X's scalable_t5, flaxformer's scanned models


def mask_value(dtype: Any) -> float:
    """Returns the bias of masked positions (T5X: -1e10), finite in the type with room for other biases.

    With infinities a row in which everything is masked would be nan, and so would every gradient.
    """
    return float(jnp.finfo(dtype).min) / 2


def attend(
    query_BxQxHxN: jax.Array,
    key_BxKxHxN: jax.Array,
    value_BxKxHxN: jax.Array,
    biases: Sequence[jax.Array] = (),
    drop: Callable[[jax.Array, jax.Array | None], jax.Array] = lambda weights, key: weights,
    key: jax.Array | None = None,
    *,
    keep_weights: bool = True,
) -> jax.Array:
    """Averages values under softmax(query . key + biases), unscaled: (B, Q, H, N) in the values' type.

    Args:
      query_BxQxHxN: queries.
      key_BxKxHxN: keys.
      value_BxKxHxN: values.
      biases: of the logits, each broadcast to (B, H, Q, K).
      drop: dropout of the weights, called as `drop(weights, key)`.
      key: random key for `drop`.
      keep_weights: for the backward pass, which recomputes them otherwise. They grow with the square of the length.
    """

    def average(rest: Any, query_BxQxHxN: jax.Array) -> jax.Array:
        key_BxKxHxN, value_BxKxHxN, biases, key = rest
        # Heads before positions: XLA:CPU multiplies the other order up to four times slower.
        parts = (query_BxQxHxN, key_BxKxHxN, value_BxKxHxN)
        query_BxHxQxN, key_BxHxKxN, value_BxHxKxN = (x.swapaxes(1, 2) for x in parts)
        logits_BxHxQxK = jnp.einsum('bhqn,bhkn->bhqk', query_BxHxQxN, key_BxHxKxN)
        if biases:
            logits_BxHxQxK += functools.reduce(operator.add, biases).astype(logits_BxHxQxK.dtype)
        weights_BxHxQxK = drop(memory.softmax(logits_BxHxQxK).astype(value_BxKxHxN.dtype), key)
        return jnp.einsum('bhqk,bhkn->bhqn', weights_BxHxQxK, value_BxHxKxN).swapaxes(1, 2)

    rest = (key_BxKxHxN, value_BxKxHxN, tuple(biases), key)
    return average(rest, query_BxQxHxN) if keep_weights else memory.recomputed(average, rest, query_BxQxHxN)


class MultiHeadDotProductAttention(nn.Module):
    """T5's attention: no biases in projections, and no 1/sqrt(depth), which is part of the query's initialisation.

    With `decoding`, the first call (over the full length) makes the cache and later calls take one position each. Cross
    attention caches the projected encoder output, which does not change.
    """

    num_heads: int
    head_dim: int
    dtype: Any = jnp.float32
    dropout_rate: float = 0.0
    float32_logits: bool = False
    cross: bool = False
    keep_weights: bool = True

    @nn.compact
    def __call__(
        self,
        x_BxQxD: jax.Array,
        x_BxKxD: jax.Array,
        mask_Bx1xQxK: jax.Array | None,
        bias_1xHxQxK: jax.Array | None = None,
        *,
        training: bool,
        decoding: bool = False,
    ) -> jax.Array:
        H, N = self.num_heads, self.head_dim

        def project(name: str, init: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
            dense = Dense(H * N, ('embed', 'joined_kv'), dtype=self.dtype, kernel_init=init, name=name)
            return dense(x).reshape(*x.shape[:-1], H, N)

        def query_init(*arguments: Any) -> jax.Array:
            return _normal_init(*arguments) / jnp.sqrt(N)

        query_BxQxHxN = project('query', query_init, x_BxQxD)
        cached = decoding and self.has_variable('cache', 'key')
        if cached and self.cross:
            key_BxKxHxN = self.get_variable('cache', 'key')
            value_BxKxHxN = self.get_variable('cache', 'value')
        else:
            key_BxKxHxN = project('key', _normal_init, x_BxKxD)
            value_BxKxHxN = project('value', _normal_init, x_BxKxD)
        if decoding and not cached:
            start = (lambda x: x) if self.cross else jnp.zeros_like
            self.put_variable('cache', 'key', start(key_BxKxHxN))
            self.put_variable('cache', 'value', start(value_BxKxHxN))
            if not self.cross:
                self.put_variable('cache', 'index', jnp.zeros((), jnp.int32))
        if cached and not self.cross:
            index = self.get_variable('cache', 'index')

            def write(name: str, new_Bx1xHxN: jax.Array) -> jax.Array:
                old = self.get_variable('cache', name)
                full = jax.lax.dynamic_update_slice_in_dim(old, new_Bx1xHxN.astype(old.dtype), index, axis=1)
                self.put_variable('cache', name, full)
                return full

            key_BxKxHxN = write('key', key_BxKxHxN)
            value_BxKxHxN = write('value', value_BxKxHxN)
            self.put_variable('cache', 'index', index + 1)
            length = key_BxKxHxN.shape[1]
            mask_Bx1xQxK = (jnp.arange(length) <= index)[None, None, None, :]
            if bias_1xHxQxK is not None:
                bias_1xHxQxK = jax.lax.dynamic_slice_in_dim(bias_1xHxQxK, index, 1, axis=2)

        if self.float32_logits:
            query_BxQxHxN = query_BxQxHxN.astype(jnp.float32)
            key_BxKxHxN = key_BxKxHxN.astype(jnp.float32)
        biases = [] if bias_1xHxQxK is None else [bias_1xHxQxK]
        if mask_Bx1xQxK is not None:
            biases.insert(0, jnp.where(mask_Bx1xQxK, 0.0, mask_value(self.dtype)).astype(self.dtype))
        out_BxQxHxN = attend(
            query_BxQxHxN,
            key_BxKxHxN,
            value_BxKxHxN,
            biases,
            functools.partial(drop, rate=self.dropout_rate, broadcast_axis=-2),
            drop_key(self, self.dropout_rate, training),
            keep_weights=self.keep_weights,
        )
        return Dense(x_BxQxD.shape[-1], ('joined_kv', 'embed'), dtype=self.dtype, kernel_init=_normal_init, name='out')(
            out_BxQxHxN.reshape(*x_BxQxD.shape[:-1], H * N)
        )


class RelativePositionBiases(nn.Module):
    """T5's learned biases by bucketed distance between query and key: half of the buckets exact, half logarithmic."""

    num_heads: int
    dtype: Any = jnp.float32
    num_buckets: int = 32
    max_distance: int = 128

    @nn.compact
    def __call__(self, query_length: int, key_length: int, bidirectional: bool) -> jax.Array:
        """Returns biases (1, H, query_length, key_length)."""
        table_HxR = self.param(
            'rel_embedding',
            nn.with_logical_partitioning(
                nn.initializers.variance_scaling(1.0, 'fan_avg', 'uniform'), ('heads', 'relpos_buckets')
            ),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        )
        distance_QxK = np.arange(key_length)[None, :] - np.arange(query_length)[:, None]
        bucket_QxK = relative_position_bucket(distance_QxK, bidirectional, self.num_buckets, self.max_distance)
        return table_HxR.astype(self.dtype)[:, bucket_QxK][None]


def relative_position_bucket(
    distance: np.ndarray, bidirectional: bool, num_buckets: int = 32, max_distance: int = 128
) -> np.ndarray:
    """Returns the buckets of distances (key position minus query position), as mesh-tensorflow and T5X compute them.

    Causal attention (`bidirectional=False`) maps the future to bucket 0. Computed in NumPy with T5X's epsilon, because distances
    such as 16 lie on a bucket's edge, where a device's rounding of the logarithm would change the model.
    """
    ahead = np.zeros_like(distance)
    behind = -distance
    if bidirectional:
        num_buckets //= 2
        ahead = np.where(behind < 0, num_buckets, 0)
        behind = np.abs(behind)
    else:
        behind = np.maximum(behind, 0)
    exact = num_buckets // 2
    ratio = np.log(behind.astype(np.float32) / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    logarithmic = exact + (ratio * (num_buckets - exact)).astype(np.int32)
    return ahead + np.where(behind < exact, behind, np.minimum(logarithmic, num_buckets - 1))


def same_segment(query_BxQ: jax.Array | None, key_BxK: jax.Array | None) -> jax.Array:
    """Returns bool (B, 1, Q, K), True where query and key belong to one segment; (1, 1, 1, 1) without segments."""
    if query_BxQ is None or key_BxK is None:
        return jnp.ones((1, 1, 1, 1), bool)
    return query_BxQ[:, None, :, None] == key_BxK[:, None, None, :]


def flaxformer_decoder_tokens(decoder_input_tokens: jax.Array) -> jax.Array:
    """Returns which tokens are real, as flaxformer's `get_decoder_logit_mask`.

    Token 0 is padding, except that it is the start symbol if it is first or followed by a real token.
    """
    real = decoder_input_tokens > 0
    next_real = jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    return (real | next_real).at[:, 0].set(True)
