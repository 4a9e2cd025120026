"""Self-attention of decoder-only models: grouped queries, rotary positions, norms of queries and keys, windows, and a cache."""

import functools
from typing import TYPE_CHECKING

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models.layers import Dense, LayerNorm
from upcycle.models.layers.attention import Segments, attention

if TYPE_CHECKING:
    from upcycle.models.decoder_config import DecoderConfig, LayerKind

kernel_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')


class SelfAttention(nn.Module):
    """Causal self-attention of one layer; see `decoder_config.DecoderConfig` for its options.

    With `max_length` keys and values are kept in the collection `cache` for that many positions; calls append to it.
    """

    config: 'DecoderConfig'
    kind: 'LayerKind'

    @nn.compact
    def __call__(
        self,
        x_BxQxD: jax.Array,
        position_BxQ: jax.Array,
        visible: Segments | jax.Array | None,
        index: jax.Array,
        max_length: int | None,
    ) -> jax.Array:
        """Applies attention.

        Args:
          x_BxQxD: input.
          position_BxQ: positions for RoPE.
          visible: with a cache bool (B, Q, K), True where a query may see a key, without the window; else segments that do not
            see each other, or None for one.
          index: of the first query among the keys; 0 without a cache.
          max_length: of the cache; None for no cache.
        """
        c = self.config
        query_BxQxHxN = self._heads(self._project('query', x_BxQxD, c.num_heads, 'joined_kv'), 'query_norm')
        y_BxQxHxN = self._attend(query_BxQxHxN, x_BxQxD, position_BxQ, visible, index, max_length)
        out = Dense(
            x_BxQxD.shape[-1],
            ('joined_kv', 'embed'),
            dtype=c.dtype,
            kernel_init=kernel_init,
            bias_init=nn.initializers.zeros if c.out_bias else None,
            name='out',
        )
        return out(y_BxQxHxN.reshape(*x_BxQxD.shape[:-1], -1))

    def _project(self, name: str, x_BxQxD: jax.Array, heads: int, axis: str) -> jax.Array:
        c = self.config
        bias = nn.initializers.zeros if c.qkv_bias else None
        axes = ('embed', axis)
        dense = Dense(heads * c.head_dim, axes, dtype=c.dtype, kernel_init=kernel_init, bias_init=bias, name=name)
        return dense(x_BxQxD)

    def _heads(self, x: jax.Array, norm: str | None) -> jax.Array:
        """Splits a projection into heads (B, L, heads, N), normed under that name and clipped."""
        c = self.config
        if norm and c.qk_norm == 'projection':
            x = LayerNorm(c.dtype, c.norm_epsilon, c.norm_offset, 'joined_kv', name=norm)(x)
        x = x.reshape(*x.shape[:-1], -1, c.head_dim)
        if norm and c.qk_norm == 'head':
            x = LayerNorm(c.dtype, c.norm_epsilon, c.norm_offset, 'kv', name=norm)(x)
        return x if c.clip_qkv is None else jnp.clip(x, -c.clip_qkv, c.clip_qkv)

    def _attend(
        self,
        query_BxQxHxN: jax.Array,
        x_BxQxD: jax.Array,
        position_BxQ: jax.Array,
        visible: Segments | jax.Array | None,
        index: jax.Array,
        max_length: int | None,
    ) -> jax.Array:
        """Projects keys and values, and returns their averages (B, Q, H, N) under the queries, which have no positions yet."""
        c, kind = self.config, self.kind
        key_BxQxMxN = self._heads(self._project('key', x_BxQxD, c.num_kv_heads, 'kv_heads'), 'key_norm')
        value_BxQxMxN = self._heads(self._project('value', x_BxQxD, c.num_kv_heads, 'kv_heads'), None)
        if (rope := c.rope(kind)) is not None:
            query_BxQxHxN, key_BxQxMxN = (rope.rotate(x, position_BxQ) for x in (query_BxQxHxN, key_BxQxMxN))
        attend = functools.partial(
            attention,
            query_BxQxHxN,
            scale=c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
            soft_cap=c.attention_soft_cap,
            keep_weights=c.remat.keeps_attention_weights,
        )
        if max_length is None:
            return attend(key_BxQxMxN, value_BxQxMxN, segment_ids=visible, causal=True, window=kind.window)
        key_BxKxMxN, value_BxKxMxN = (
            self._cached(name, x, index, max_length) for name, x in (('key', key_BxQxMxN), ('value', value_BxQxMxN))
        )
        if kind.window is not None:
            query_Qx1 = index + jnp.arange(x_BxQxD.shape[1])[:, None]
            visible &= query_Qx1 - jnp.arange(max_length) < kind.window
        return attend(key_BxKxMxN, value_BxKxMxN, mask=visible)

    def _cached(self, name: str, new_BxQxMxN: jax.Array, index: jax.Array, max_length: int) -> jax.Array:
        """Writes new keys or values into the cache, and returns all of it."""
        B, _, M, N = new_BxQxMxN.shape
        empty = jnp.zeros((B, max_length, M, N), new_BxQxMxN.dtype)
        cache = self.variable('cache', f'cached_{name}', lambda: empty)
        cache.value = jax.lax.dynamic_update_slice_in_dim(cache.value, new_BxQxMxN, index, axis=1)
        return cache.value
