"""A decoder-only Transformer for the layouts of Llama, Mistral, Qwen, Gemma, SmolLM, OLMo, Phi-3, Granite and JetMoE.

Parameter names are T5X's. Any MLP can be an MoE layer; a dense model and its upcycled one differ only in `mlp/expert/*` and
`mlp/router/*`. Attention can have experts, too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models.attention_experts import AttentionExperts
from upcycle.models.decoder_config import DecoderConfig, LayerKind, NormPlacement
from upcycle.models.grouped_attention import SelfAttention
from upcycle.models.head import Head
from upcycle.models.layers import (
    Dense,
    Dropout,
    Embed,
    LayerNorm,
    MlpBlock,
    products_with_columns,
    products_with_rows,
)
from upcycle.models.layers.attention import Segments, segments
from upcycle.models.stack import apply_layers

# Standard deviation of a new embedding.
_EMBEDDING_STDDEV = 0.02


class DecoderLayer(nn.Module):
    """Causal self-attention, then MLP or MoE, each with its norms."""

    config: DecoderConfig
    kind: LayerKind

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        position_BxL: jax.Array,
        real_BxL: jax.Array,
        visible: Segments | jax.Array | None,
        index: jax.Array,
        training: bool,
        max_length: int | None,
    ) -> jax.Array:
        """Applies the layer; see `SelfAttention` for the arguments."""
        config, moe = self.config, self.kind.moe

        def attention(y_BxLxD: jax.Array) -> jax.Array:
            if self.kind.attention_moe is None:
                dense = SelfAttention(config, self.kind, name='self_attention')
                return dense(y_BxLxD, position_BxL, visible, index, max_length)
            experts = AttentionExperts(config, self.kind, name='self_attention')
            return experts(y_BxLxD, real_BxL, position_BxL, visible, index, training, max_length)

        def mlp(y_BxLxD: jax.Array) -> jax.Array:
            if moe is None:
                return MlpBlock(**config.mlp_arguments, name='mlp')(y_BxLxD, training)
            layer = config.moe_layer(moe, name='mlp')
            return layer(y_BxLxD, real_BxL, training=training, decoding=max_length is not None)

        x_BxLxD = self._add('self_attention', x_BxLxD, attention, training)
        return self._add('mlp', x_BxLxD, mlp, training)

    def _add(
        self, name: str, x_BxLxD: jax.Array, sublayer: Callable[[jax.Array], jax.Array], training: bool
    ) -> jax.Array:
        """Applies a sublayer with its norms, and adds the result to its input."""
        c = self.config

        def norm(place: str) -> LayerNorm:
            return LayerNorm(c.dtype, c.norm_epsilon, c.norm_offset, name=f'{place}_{name}_layer_norm')

        y_BxLxD = x_BxLxD if c.norm_placement is NormPlacement.POST else norm('pre')(x_BxLxD)
        y_BxLxD = sublayer(y_BxLxD)
        if c.norm_placement is not NormPlacement.PRE:
            y_BxLxD = norm('post')(y_BxLxD)
        y_BxLxD = Dropout(c.dropout_rate)(y_BxLxD, training)
        return x_BxLxD + (y_BxLxD if c.residual_multiplier == 1 else c.residual_multiplier * y_BxLxD)


class Decoder(nn.Module):
    """The layers, the last norm, and the head unless it is tied to the embedding."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        position_BxL: jax.Array,
        real_BxL: jax.Array,
        visible: Segments | jax.Array | None,
        index: jax.Array,
        training: bool,
        max_length: int | None,
        features_only: bool,
    ) -> jax.Array:
        """Applies the stack, with `features_only` without the head; see `SelfAttention` for the other arguments."""
        c = self.config
        arrays = (position_BxL, real_BxL, visible, index)
        switches = (training, max_length)
        scan = max_length is None
        x_BxLxD = apply_layers(self, DecoderLayer, c.kinds(), x_BxLxD, arrays, switches, last=True, scan=scan)
        epsilon = c.norm_epsilon if c.final_norm_epsilon is None else c.final_norm_epsilon
        x_BxLxD = LayerNorm(c.dtype, epsilon, c.norm_offset, name='decoder_norm')(x_BxLxD)
        if c.tied_embeddings or features_only:
            return x_BxLxD
        return Dense(c.vocab_size, ('embed', 'vocab'), both_gradients=True, name='logits_dense')(x_BxLxD)


class DecoderOnly(nn.Module):
    """The whole model."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        training: bool = False,
        max_length: int | None = None,
        features_only: bool = False,
    ) -> jax.Array:
        """Computes logits (B, L, V) in float32.

        With `max_length` the collection `cache` must be mutable: the first call makes it (prefill), later ones append to it.
        Prompts of different lengths are padded on the left. MoE layers are then dropless.

        Args:
          tokens: int32 (B, L).
          positions: int32 (B, L), for RoPE; None: padding is not counted, and each segment begins at 0.
          segment_ids: int32 (B, L), of packed documents, which do not see each other; None for one document a row.
          mask: bool (B, L), False at padding, which no query sees and no expert takes; None without padding.
          training: turns dropout on and selects the training capacity factor.
          max_length: positions of the key/value cache; None for no cache.
          features_only: return the input of the head, (B, L, D).

        Raises:
          ValueError: segments with a cache.
        """
        c = self.config
        real_BxL = jnp.ones(tokens.shape, bool) if mask is None else mask
        if max_length is None:
            if positions is None:
                positions = default_positions(real_BxL, segment_ids)
            index = jnp.zeros((), jnp.int32)
            visible = None
            if mask is not None or segment_ids is not None:
                visible = segments(jnp.ones_like(real_BxL), real_BxL, segment_ids, segment_ids)
        elif segment_ids is None:
            positions, visible, index = self._append(real_BxL, positions, max_length)
        else:
            raise ValueError('segment_ids cannot be used with a cache.')
        embedder = Embed(c.vocab_size, c.emb_dim, c.dtype, _EMBEDDING_STDDEV, name='token_embedder')
        x_BxLxD = embedder(tokens)
        if c.embedding_multiplier != 1:
            # The factor is rounded to the type of activations, as in transformers.
            x_BxLxD *= jnp.asarray(c.embedding_multiplier, x_BxLxD.dtype)
        x_BxLxD = Dropout(c.dropout_rate)(x_BxLxD, training)
        decoder = Decoder(c, name='decoder')
        x_BxLxD = decoder(x_BxLxD, positions, real_BxL, visible, index, training, max_length, features_only)
        if features_only:
            return x_BxLxD
        return _scaled(c, embedder.attend(x_BxLxD) if c.tied_embeddings else x_BxLxD)

    def _append(
        self, real_BxL: jax.Array, positions: jax.Array | None, max_length: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Appends to the cache which positions are real; returns positions, mask (B, L, max_length) and the first index."""
        B, L = real_BxL.shape
        index = self.variable('cache', 'index', lambda: jnp.zeros((), jnp.int32))
        cached_BxK = self.variable('cache', 'real', lambda: jnp.zeros((B, max_length), bool))
        start = index.value
        if positions is None:
            before_Bx1 = cached_BxK.value.sum(axis=1, keepdims=True, dtype=jnp.int32)
            positions = before_Bx1 + default_positions(real_BxL, None)
        cached_BxK.value = jax.lax.dynamic_update_slice_in_dim(cached_BxK.value, real_BxL, start, axis=1)
        earlier_LxK = jnp.arange(max_length) <= start + jnp.arange(L)[:, None]
        index.value = start + L
        return positions, earlier_LxK & cached_BxK.value[:, None], start


def head_of(config: DecoderConfig, params: Mapping[str, Any]) -> Head:
    """Returns the head of a model, as `DecoderOnly` applies it."""
    if config.tied_embeddings:
        kernel, axes, products = params['token_embedder']['embedding'], ('vocab', 'embed'), products_with_rows
    else:
        kernel, axes, products = params['decoder']['logits_dense']['kernel'], ('embed', 'vocab'), products_with_columns
    return Head(kernel, axes, lambda kernel, x: _scaled(config, products(kernel, x)))


def _scaled(config: DecoderConfig, logits: jax.Array) -> jax.Array:
    """Divides and caps logits as the configuration says."""
    if config.logits_divisor != 1:
        logits /= config.logits_divisor
    if config.logits_soft_cap is not None:
        logits = config.logits_soft_cap * jnp.tanh(logits / config.logits_soft_cap)
    return logits


def default_positions(real_BxL: jax.Array, segment_ids_BxL: jax.Array | None) -> jax.Array:
    """Returns int32 positions (B, L): the number of earlier real tokens, of the same segment if there are segments."""
    position_BxL = jnp.cumsum(real_BxL, axis=1, dtype=jnp.int32) - 1
    if segment_ids_BxL is not None:
        first_BxL = jnp.pad(segment_ids_BxL[:, 1:] != segment_ids_BxL[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        position_BxL -= jax.lax.cummax(jnp.where(first_BxL, position_BxL, 0), axis=1)
    return jnp.maximum(position_BxL, 0)
