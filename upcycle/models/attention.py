"""Attention and relative position biases."""

import enum
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from upcycle.models.layers import Dense, drop, drop_key
from upcycle.models.layers.attention import Segments, attention

_normal_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class PositionBiases(enum.StrEnum):
    """Tables of relative position biases."""

    SHARED = 'shared'  # one for each stack: T5, mT5
    EVERY_LAYER = 'every_layer'  # one for each layer: umT5, T5X's scalable_t5, flaxformer's scanned models


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
    causal: bool = False
    keep_weights: bool = True

    @nn.compact
    def __call__(
        self,
        x_BxQxD: jax.Array,
        x_BxKxD: jax.Array,
        segment_ids: Segments | None,
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
        mask_1x1xK = None
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
            mask_1x1xK = (jnp.arange(key_BxKxHxN.shape[1]) <= index)[None, None]
            if bias_1xHxQxK is not None:
                bias_1xHxQxK = jax.lax.dynamic_slice_in_dim(bias_1xHxQxK, index, 1, axis=2)

        # Weights are dropped for all queries of a sequence alike, so values can be dropped instead.
        dropout_key = drop_key(self, self.dropout_rate, training)
        out_BxQxHxN = attention(
            query_BxQxHxN,
            key_BxKxHxN,
            drop(value_BxKxHxN, dropout_key, self.dropout_rate, broadcast_axis=-1),
            mask=mask_1x1xK,
            bias=None if bias_1xHxQxK is None else bias_1xHxQxK[0],
            segment_ids=segment_ids,
            causal=self.causal and not decoding,
            float32_logits=self.float32_logits,
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


def flaxformer_decoder_tokens(decoder_input_tokens: jax.Array) -> jax.Array:
    """Returns which tokens are real, as flaxformer's `get_decoder_logit_mask`.

    Token 0 is padding, except that it is the start symbol if it is first or followed by a real token.
    """
    real = decoder_input_tokens > 0
    next_real = jnp.pad(real[:, 1:], ((0, 0), (0, 1)))
    return (real | next_real).at[:, 0].set(True)
