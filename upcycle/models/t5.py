"""T5 1.1 (and 1.0): an encoder-decoder Transformer with T5X's parameter names and shapes.

Any MLP of either stack can be an MoE layer. A dense model and its upcycled one differ only in `mlp/expert/*` and `mlp/router/*`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.errors import UserError, refuse
from upcycle.models.attention import (
    MultiHeadDotProductAttention,
    PositionBiases,
    RelativePositionBiases,
    flaxformer_decoder_tokens,
)
from upcycle.models.head import Head
from upcycle.models.layers import (
    ACTIVATION_FUNCTIONS,
    Dense,
    Dropout,
    Embed,
    LayerNorm,
    MlpBlock,
    products_with_columns,
    products_with_rows,
)
from upcycle.models.layers.attention import Segments, segments
from upcycle.models.stack import Remat, apply_layers
from upcycle.moe.groups import moe_of_layers
from upcycle.moe.layer import MoELayer, replace_mlp
from upcycle.moe.routers.base import MoE
from upcycle.schema import Count, Depth, FloatType, Rate, shown


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5, with T5X's field names, and its MoE layers. Gin macros in brackets.

    Attributes:
      vocab_size: rows of the embedding [NUM_EMBEDDINGS].
      emb_dim: D, the width of a token [EMBED_DIM].
      num_heads: H, attention heads [NUM_HEADS].
      head_dim: width of an attention head [HEAD_DIM].
      mlp_dim: F, the width of a dense MLP [MLP_DIM].
      num_encoder_layers: layers of the encoder [NUM_ENCODER_LAYERS].
      num_decoder_layers: layers of the decoder [NUM_DECODER_LAYERS].
      mlp_activations: ('gelu', 'linear') for T5 1.1, ('relu',) for T5 1.0 [MLP_ACTIVATIONS].
      logits_via_embedding: use the embedding, scaled by 1/sqrt(D), as the output layer: T5 1.0 [LOGITS_VIA_EMBEDDING].
      position_biases: see `PositionBiases` [POSITION_BIASES].
      dtype: type of activations [ACTIVATION_DTYPE]; parameters are float32.
      dropout_rate: probability that an activation is dropped in training [DROPOUT_RATE].
      expert_dropout_rate: dropout_rate inside experts; None for the same rate [EXPERT_DROPOUT_RATE].
      float32_attention_logits: compute attention logits in float32.
      remat: what the backward pass recomputes, see `models.stack.Remat` [REMAT].
      scan_layers: compile one block of each stack and loop over it, for deep models [SCAN_LAYERS].
      zero_padded_activations: multiply activations at padding by 0 before attention and MLP: flaxformer does, T5X does not
        [ZERO_PADDED_ACTIVATIONS].
      encoder_moe, decoder_moe: MoE layers of the stacks; None for a dense stack.
      encoder_moe_layers, decoder_moe_layers: which layers: 'none', 'all', 'every_other' (1, 3, 5, ...), 'last_half', 'last_N' or
        a list of indices [ENCODER_MOE_LAYERS, DECODER_MOE_LAYERS].
    """

    vocab_size: Count
    emb_dim: Count
    num_heads: Count
    head_dim: Count
    mlp_dim: Count
    num_encoder_layers: Depth
    num_decoder_layers: Depth
    mlp_activations: Sequence[str] = ('gelu', 'linear')
    logits_via_embedding: bool = False
    position_biases: PositionBiases = PositionBiases.SHARED
    dtype: FloatType = 'bfloat16'
    dropout_rate: Rate = 0.0
    expert_dropout_rate: Rate | None = None
    float32_attention_logits: bool = False
    zero_padded_activations: bool = False
    remat: Remat = Remat.NONE
    scan_layers: bool = False
    encoder_moe: MoE | None = None
    decoder_moe: MoE | None = None
    encoder_moe_layers: str | Sequence[int] = 'every_other'
    decoder_moe_layers: str | Sequence[int] = 'every_other'

    def __post_init__(self):
        schema.validate(self, {'vocab_size': 'NUM_EMBEDDINGS', 'emb_dim': 'EMBED_DIM', 'dtype': 'ACTIVATION_DTYPE'})
        if not self.mlp_activations or not ACTIVATION_FUNCTIONS.keys() >= {*self.mlp_activations}:
            raise UserError(
                f'MLP_ACTIVATIONS = {shown(self.mlp_activations)} must be one or several of '
                f"{', '.join(ACTIVATION_FUNCTIONS)}, such as ('gelu', 'linear')."
            )
        for moe in filter(None, (*self.layer_moe('encoder'), *self.layer_moe('decoder'))):
            moe.expert_width(self.mlp_dim)
        if self.decoder_moe is not None and not self.decoder_moe.causal:
            refuse(self.decoder_moe.looks_ahead('DECODER_'))
            object.__setattr__(self, 'decoder_moe', dataclasses.replace(self.decoder_moe, causal=True))

    def layer_moe(self, stack: str) -> tuple[MoE | None, ...]:
        """Returns the MoE of each layer of the 'encoder' or 'decoder'; None where the MLP is dense."""
        moe, layers, depth = (
            getattr(self, name) for name in (f'{stack}_moe', f'{stack}_moe_layers', f'num_{stack}_layers')
        )
        return moe_of_layers(moe, layers, depth, f'{stack.upper()}_MOE_LAYERS')

    @property
    def mlp_arguments(self) -> dict[str, Any]:
        """Arguments of `MlpBlock` for a dense MLP."""
        return {
            'mlp_dim': self.mlp_dim,
            'activations': self.mlp_activations,
            'dropout_rate': self.dropout_rate,
            'dtype': self.dtype,
        }

    def moe_layer(self, moe: MoE, name: str | None = None) -> MoELayer:
        """Returns the module of an MoE layer."""
        # Slots have no order: a dropout mask for all of them would drop a neuron for the whole batch.
        expert = {'dropout_rate': self.expert_dropout_rate, 'dropout_broadcast_axis': None}
        return replace_mlp(moe, MlpBlock, self.mlp_arguments, expert, name)

    def dense(self) -> 'T5Config':
        """Returns the same model with dense MLPs only."""
        return dataclasses.replace(self, encoder_moe=None, decoder_moe=None)


def _apply_mlp(
    config: T5Config, moe: MoE | None, x: jax.Array, real_BxL: jax.Array, training: bool, decoding: bool = False
) -> jax.Array:
    if moe is None:
        return MlpBlock(**config.mlp_arguments, name='mlp')(x, training)
    return config.moe_layer(moe, name='mlp')(x, real_BxL, training=training, decoding=decoding)


def _attention(config: T5Config, name: str, **kind: bool) -> MultiHeadDotProductAttention:
    return MultiHeadDotProductAttention(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        dropout_rate=config.dropout_rate,
        float32_logits=config.float32_attention_logits,
        keep_weights=config.remat.keeps_attention_weights,
        name=name,
        **kind,
    )


def _position_biases(config: T5Config, which: PositionBiases, length: int, *, bidirectional: bool) -> jax.Array | None:
    """Computes biases (1, H, length, length) from a table of the calling module; None unless modules of this kind have one."""
    if config.position_biases is not which:
        return None
    biases = RelativePositionBiases(config.num_heads, config.dtype, name='relpos_bias')
    return biases(length, length, bidirectional)


def _zero_padding(config: T5Config, y_BxLxD: jax.Array, real_BxL: jax.Array) -> jax.Array:
    """Multiplies activations at padding by 0, if the configuration asks for it."""
    return y_BxLxD * real_BxL[..., None].astype(y_BxLxD.dtype) if config.zero_padded_activations else y_BxLxD


def _add_sublayer(
    config: T5Config,
    real_BxL: jax.Array,
    training: bool,
    norm: str,
    x_BxLxD: jax.Array,
    sublayer: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Applies a sublayer after a norm of that name, and adds the result to its input."""
    y_BxLxD = _zero_padding(config, LayerNorm(config.dtype, name=norm)(x_BxLxD), real_BxL)
    return x_BxLxD + Dropout(config.dropout_rate)(sublayer(y_BxLxD), training)


class EncoderLayer(nn.Module):
    """Pre-norm self-attention, then MLP or MoE. `bias` is the stack's; None if each layer has its own."""

    config: T5Config
    moe: MoE | None

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, real_BxL: jax.Array, ids: Segments, bias: jax.Array | None, training: bool
    ) -> jax.Array:
        config = self.config
        if bias is None:
            bias = _position_biases(config, PositionBiases.EVERY_LAYER, x_BxLxD.shape[1], bidirectional=True)
        add = functools.partial(_add_sublayer, config, real_BxL, training)
        attention = _attention(config, 'attention')
        x_BxLxD = add('pre_attention_layer_norm', x_BxLxD, lambda y: attention(y, y, ids, bias, training=training))
        return add('pre_mlp_layer_norm', x_BxLxD, lambda y: _apply_mlp(config, self.moe, y, real_BxL, training))


class DecoderLayer(nn.Module):
    """Pre-norm causal self-attention, attention to the encoder, then MLP or MoE. `bias`: see `EncoderLayer`."""

    config: T5Config
    moe: MoE | None

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        encoded_BxKxD: jax.Array,
        real_BxL: jax.Array,
        ids: Segments | None,
        cross_ids: Segments,
        bias: jax.Array | None,
        training: bool,
        decoding: bool,
        max_length: int,
    ) -> jax.Array:
        config = self.config
        if bias is None:
            bias = _position_biases(config, PositionBiases.EVERY_LAYER, max_length, bidirectional=False)
        add = functools.partial(_add_sublayer, config, real_BxL, training)
        call = {'training': training, 'decoding': decoding}
        attention = _attention(config, 'self_attention', causal=True)
        x_BxLxD = add('pre_self_attention_layer_norm', x_BxLxD, lambda y: attention(y, y, ids, bias, **call))
        cross = _attention(config, 'encoder_decoder_attention', cross=True)
        x_BxLxD = add('pre_cross_attention_layer_norm', x_BxLxD, lambda y: cross(y, encoded_BxKxD, cross_ids, **call))
        return add('pre_mlp_layer_norm', x_BxLxD, lambda y: _apply_mlp(config, self.moe, y, real_BxL, **call))


class Encoder(nn.Module):
    """A stack of encoder layers over embedded tokens."""

    config: T5Config

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, ids: Segments, training: bool) -> jax.Array:
        config = self.config
        bias = _position_biases(config, PositionBiases.SHARED, x_BxLxD.shape[1], bidirectional=True)
        x_BxLxD = Dropout(config.dropout_rate)(x_BxLxD, training).astype(config.dtype)
        arrays, layers = (real_BxL, ids, bias), config.layer_moe('encoder')
        x_BxLxD = apply_layers(self, EncoderLayer, layers, x_BxLxD, arrays, (training,), last=False)
        x_BxLxD = _zero_padding(config, LayerNorm(config.dtype, name='encoder_norm')(x_BxLxD), real_BxL)
        return Dropout(config.dropout_rate, broadcast_axis=None)(x_BxLxD, training)


class Decoder(nn.Module):
    """A stack of decoder layers over embedded tokens, ending in float32 logits unless these come from the embedding.

    With `features_only` it ends before the head.
    """

    config: T5Config

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        encoded_BxKxD: jax.Array,
        real_BxL: jax.Array,
        ids: Segments | None,
        cross_ids: Segments,
        training: bool,
        decoding: bool,
        max_length: int,
        features_only: bool,
    ) -> jax.Array:
        config = self.config
        bias = _position_biases(config, PositionBiases.SHARED, max_length, bidirectional=False)
        x_BxLxD = Dropout(config.dropout_rate)(x_BxLxD, training).astype(config.dtype)
        arrays, layers = (encoded_BxKxD, real_BxL, ids, cross_ids, bias), config.layer_moe('decoder')
        switches = (training, decoding, max_length)
        x_BxLxD = apply_layers(self, DecoderLayer, layers, x_BxLxD, arrays, switches, last=True, scan=not decoding)
        x_BxLxD = _zero_padding(config, LayerNorm(config.dtype, name='decoder_norm')(x_BxLxD), real_BxL)
        x_BxLxD = Dropout(config.dropout_rate)(x_BxLxD, training)
        if config.logits_via_embedding or features_only:
            return x_BxLxD
        return Dense(config.vocab_size, ('embed', 'vocab'), both_gradients=True, name='logits_dense')(x_BxLxD)


class Transformer(nn.Module):
    """The whole model, and its halves `encode` and `decode` for generation."""

    config: T5Config

    def setup(self):
        self.token_embedder = Embed(self.config.vocab_size, self.config.emb_dim, self.config.dtype)
        self.encoder = Encoder(self.config)
        self.decoder = Decoder(self.config)

    def encode(
        self,
        encoder_input_tokens: jax.Array,
        encoder_segment_ids: jax.Array | None = None,
        *,
        training: bool = False,
    ) -> jax.Array:
        """Encodes (B, L) tokens to (B, L, D). Padding is token 0; packed sequences do not attend to each other."""
        real_BxL = encoder_input_tokens > 0
        ids = segments(real_BxL, real_BxL, encoder_segment_ids, encoder_segment_ids)
        return self.encoder(self.token_embedder(encoder_input_tokens), real_BxL, ids, training)

    def decode(
        self,
        encoded: jax.Array,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        training: bool = False,
        decoding: bool = False,
        max_length: int | None = None,
        features_only: bool = False,
    ) -> jax.Array:
        """Computes logits (B, L, V) in float32.

        Args:
          encoded: encoder output.
          encoder_input_tokens: the encoder's input, for its padding.
          decoder_input_tokens: targets shifted right.
          decoder_target_tokens: targets, for their padding; None if nothing is padding (generation).
          encoder_segment_ids, decoder_segment_ids: of packed sequences.
          training: turns dropout on and selects the training capacity factor.
          decoding: use a key/value cache: the first call, over the full length, makes it; later calls take one position.
          max_length: of the cache; required in calls of one position.
          features_only: return the input of the head, (B, L, D).
        """
        config = self.config
        length = decoder_input_tokens.shape[1]
        encoder_real_BxK = encoder_input_tokens > 0
        if decoding or decoder_target_tokens is None:
            target_BxL = jnp.ones_like(decoder_input_tokens, bool)
        else:
            target_BxL = decoder_target_tokens > 0
        real_BxL = target_BxL
        if config.zero_padded_activations and not decoding:
            real_BxL = flaxformer_decoder_tokens(decoder_input_tokens)
        cross_ids = segments(target_BxL, encoder_real_BxK, decoder_segment_ids, encoder_segment_ids)
        ids = None if decoding else segments(target_BxL, target_BxL, decoder_segment_ids, decoder_segment_ids)
        embedded, arrays = self.token_embedder(decoder_input_tokens), (encoded, real_BxL, ids, cross_ids)
        x = self.decoder(embedded, *arrays, training, decoding, max_length or length, features_only)
        if config.logits_via_embedding and not features_only:
            return self.token_embedder.attend(x) / jnp.sqrt(config.emb_dim)
        return x

    def __call__(
        self,
        encoder_input_tokens: jax.Array,
        decoder_input_tokens: jax.Array,
        decoder_target_tokens: jax.Array | None = None,
        encoder_segment_ids: jax.Array | None = None,
        decoder_segment_ids: jax.Array | None = None,
        *,
        training: bool = False,
        features_only: bool = False,
    ) -> jax.Array:
        """Computes logits (B, L, V) with teacher forcing, or the input of the head (B, L, D)."""
        encoded = self.encode(encoder_input_tokens, encoder_segment_ids, training=training)
        tokens = encoder_input_tokens, decoder_input_tokens, decoder_target_tokens
        segments = encoder_segment_ids, decoder_segment_ids
        return self.decode(encoded, *tokens, *segments, training=training, features_only=features_only)


def head_of(config: T5Config, params: Mapping[str, Any]) -> Head:
    """Returns the head of a model, as `Transformer` applies it."""
    if not config.logits_via_embedding:
        return Head(params['decoder']['logits_dense']['kernel'], ('embed', 'vocab'), products_with_columns)

    def logits(embedding_VxD: jax.Array, x: jax.Array) -> jax.Array:
        return products_with_rows(embedding_VxD, x) / jnp.sqrt(config.emb_dim)

    return Head(params['token_embedder']['embedding'], ('vocab', 'embed'), logits)
