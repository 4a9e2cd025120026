"""Vision Transformer in Flax linen: patches, encoder blocks with dense or MoE MLPs, and three kinds of pooling.

Parameter names are big_vision's: `embedding`, `pos_embedding`, `cls`, `Transformer/encoderblock_i/MlpBlock_0/Dense_0`,
`Transformer/encoder_norm`, `MAPHead_0`, `pre_logits`, `head`. An MoE block has `MlpBlock_0/expert/...` with a leading axis E, and
`MlpBlock_0/router/...`. The class token has no position, as in big_vision. Checkpoints in which it has one (vision_transformer,
V-MoE) are read with that position added to the token, which is the same function.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle import schema
from upcycle.errors import refuse
from upcycle.models.layer_norm import LayerNorm
from upcycle.models.layers import Dense, Dropout
from upcycle.models.layers.attention import attention
from upcycle.models.patches import sincos2d, to_patches
from upcycle.models.stack import ACTIVATIONS, Remat, apply_layers
from upcycle.models.vit_layers import Gelu, MlpBlock, PatchEmbedding
from upcycle.moe.groups import moe_of_layers
from upcycle.moe.layer import MoELayer, replace_mlp
from upcycle.moe.routers.base import MoE
from upcycle.schema import Count, Depth, FloatType, Positive, Rate

_xavier_init = nn.initializers.xavier_uniform()


class Pooling(enum.StrEnum):
    """Input of the head."""

    TOKEN = 'token'  # an extra class token
    GAP = 'gap'  # the mean over patches
    MAP = 'map'  # an attention layer with one learned query


class Positions(enum.StrEnum):
    """Position embeddings of patches."""

    LEARNED = 'learned'
    SINCOS = 'sincos2d'  # fixed sines and cosines of row and column (MoCo v3)


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT, and its MoE layers. Gin macros in brackets.

    Attributes:
      num_classes: outputs of the head [NUM_CLASSES].
      image_size: height and width in pixels [IMAGE_SIZE].
      image_channels: 3, or 1 for grey images [IMAGE_CHANNELS].
      patch_size: height and width of a patch in pixels [PATCH_SIZE].
      emb_dim: D, the width of a token [EMBED_DIM].
      num_heads: H, attention heads [NUM_HEADS].
      mlp_dim: F, the width of a dense MLP [MLP_DIM].
      num_layers: encoder blocks [NUM_LAYERS].
      pooling: see `Pooling` [POOLING].
      positions: see `Positions` [POSITIONS].
      representation_size: width of a tanh layer before the head (`pre_logits`), as in ImageNet-21k checkpoints; None for no such
        layer [REPRESENTATION_SIZE].
      head_bias_init: initial value of the head's biases; very negative for a sigmoid loss over many classes [HEAD_BIAS_INIT].
      gelu: see `Gelu` [GELU].
      norm_epsilon: added to the variance by layer norms [NORM_EPSILON].
      dtype: type of activations [ACTIVATION_DTYPE]; parameters are float32.
      dropout_rate: probability that an activation is dropped in training [DROPOUT_RATE].
      expert_dropout_rate: dropout_rate inside experts; None for the same rate [EXPERT_DROPOUT_RATE].
      stochastic_depth: probability that an image skips a residual branch of the last block, growing linearly from 0 at the first
        (Huang et al. 2016) [STOCHASTIC_DEPTH]. Blocks then differ, so that `scan_layers` has no effect.
      remat: what the backward pass recomputes, see `models.stack.Remat` [REMAT].
      scan_layers: compile one block and loop over it, for deep models [SCAN_LAYERS].
      moe: the MoE layers; None for a dense model.
      moe_layers: which blocks: 'none', 'all', 'every_other' (1, 3, 5, ...), 'last_half', 'last_N' or a list of indices
        [MOE_LAYERS].
      group_images: the most images whose tokens compete for the same slots; overrides the MoE's group size [GROUP_IMAGES].
    """

    num_classes: Count
    image_size: Count
    patch_size: Count
    emb_dim: Count
    num_heads: Count
    mlp_dim: Count
    num_layers: Depth
    image_channels: Count = 3
    pooling: Pooling = Pooling.GAP
    positions: Positions = Positions.LEARNED
    representation_size: Count | None = None
    head_bias_init: float = 0.0
    gelu: Gelu = Gelu.TANH
    norm_epsilon: Positive = 1e-6
    dtype: FloatType = 'bfloat16'
    dropout_rate: Rate = 0.0
    expert_dropout_rate: Rate | None = None
    stochastic_depth: Rate = 0.0
    remat: Remat = Remat.NONE
    scan_layers: bool = False
    moe: MoE | None = None
    moe_layers: str | Sequence[int] = 'last_half'
    group_images: Count = 8

    def __post_init__(self):
        schema.validate(self, {'emb_dim': 'EMBED_DIM', 'dtype': 'ACTIVATION_DTYPE'})
        refuse(self._invalid())
        for moe in filter(None, self.layer_moe()):
            moe.expert_width(self.mlp_dim)

    def _invalid(self) -> Iterator[str]:
        """Yields a sentence for each mistake."""
        if self.image_size % self.patch_size:
            yield (
                f'IMAGE_SIZE = {self.image_size} is not a multiple of PATCH_SIZE = {self.patch_size}: change one of them.'
            )
        if self.emb_dim % self.num_heads:
            yield (f'EMBED_DIM = {self.emb_dim} is not a multiple of NUM_HEADS = {self.num_heads}: change one of them.')
        if self.positions is Positions.SINCOS and self.emb_dim % 4:
            yield f"POSITIONS = 'sincos2d' needs an EMBED_DIM that is a multiple of 4, not {self.emb_dim}."

    @property
    def grid(self) -> int:
        """The number of patches along a side of an image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """L: patches of an image, plus a class token if the model has one."""
        return self.grid**2 + (self.pooling is Pooling.TOKEN)

    def layer_moe(self) -> tuple[MoE | None, ...]:
        """Returns the MoE of each block; None where the MLP is dense."""
        moe = self.moe and dataclasses.replace(self.moe, group_size=self.group_images * self.num_tokens)
        return moe_of_layers(moe, self.moe_layers, self.num_layers, 'MOE_LAYERS')

    def layer_depths(self) -> tuple[float, ...]:
        """Returns for each block the probability that an image skips one of its branches."""
        last = max(self.num_layers - 1, 1)
        return tuple(self.stochastic_depth * i / last for i in range(self.num_layers))

    @property
    def mlp_arguments(self) -> dict[str, Any]:
        """Arguments of `MlpBlock` for a dense MLP."""
        return {'mlp_dim': self.mlp_dim, 'gelu': self.gelu, 'dropout_rate': self.dropout_rate, 'dtype': self.dtype}

    def moe_layer(self, moe: MoE, name: str | None = None) -> MoELayer:
        """Returns the module of an MoE layer."""
        return replace_mlp(moe, MlpBlock, self.mlp_arguments, {'dropout_rate': self.expert_dropout_rate}, name)

    def dense(self) -> 'ViTConfig':
        """Returns the same model without MoE layers."""
        return dataclasses.replace(self, moe=None)


class ProjectHeads(nn.Module):
    """A layer between the width and the heads, with parameters of three axes as in `flax.linen.DenseGeneral`.

    `kernel` is (D, H, N) and `bias` (H, N); merging heads, (H, N, D) and (D).
    """

    num_heads: int
    width: int
    dtype: Any
    merge: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        H, D = self.num_heads, self.width
        N = D // H
        shape, axes = ((H, N, D), ('heads', 'kv', 'embed')) if self.merge else ((D, H, N), ('embed', 'heads', 'kv'))
        bias_shape, bias_axes = ((D,), ('embed',)) if self.merge else ((H, N), ('heads', 'kv'))

        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return _xavier_init(key, (D, D), dtype).reshape(shape)

        kernel = self.param('kernel', nn.with_logical_partitioning(init, axes), shape, jnp.float32)
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, bias_axes)
        bias = self.param('bias', zeros, bias_shape, jnp.float32)
        # One matrix product over rows: XLA:CPU is slow at those with several row or column axes.
        rows = x.reshape(-1, D).astype(self.dtype) @ kernel.reshape(D, D).astype(self.dtype)
        rows += bias.reshape(D).astype(self.dtype)
        leading = x.shape[: x.ndim - 2] if self.merge else x.shape[:-1]
        return rows.reshape(*leading, *((D,) if self.merge else (H, N)))


class Attention(nn.Module):
    """Multi-head attention with biases, equal to flax's `MultiHeadDotProductAttention` in parameters and results."""

    num_heads: int
    dtype: Any
    keep_weights: bool = True

    @nn.compact
    def __call__(self, x_BxQxD: jax.Array, x_BxKxD: jax.Array) -> jax.Array:
        D = x_BxKxD.shape[-1]
        project = functools.partial(ProjectHeads, self.num_heads, D, self.dtype)
        query_BxQxHxN = project(name='query')(x_BxQxD) * (D // self.num_heads) ** -0.5
        key_BxKxHxN, value_BxKxHxN = project(name='key')(x_BxKxD), project(name='value')(x_BxKxD)
        out_BxQxHxN = attention(
            query_BxQxHxN, key_BxKxHxN, value_BxKxHxN, float32_logits=False, keep_weights=self.keep_weights
        )
        return project(merge=True, name='out')(out_BxQxHxN)


class EncoderBlock(nn.Module):
    """Pre-norm self-attention, then MLP or MoE. `kind`: its MoE, and the probability that an image skips a branch."""

    config: ViTConfig
    kind: tuple[MoE | None, float]

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, training: bool) -> jax.Array:
        config = self.config
        moe, skipped = self.kind
        dropout = functools.partial(Dropout(config.dropout_rate, broadcast_axis=None), training=training)
        # One draw for each image: it skips the whole branch.
        skip = nn.Dropout(skipped, broadcast_dims=(1, 2), deterministic=not training)
        y = _norm(config, 'LayerNorm_0')(x_BxLxD)
        keep_weights = config.remat.keeps_attention_weights
        y = Attention(config.num_heads, config.dtype, keep_weights, name='MultiHeadDotProductAttention_0')(y, y)
        x_BxLxD = x_BxLxD + skip(dropout(y))
        y = _norm(config, 'LayerNorm_1')(x_BxLxD)
        if moe is None:
            y = MlpBlock(**config.mlp_arguments, name='MlpBlock_0')(y, training)
        else:
            y = config.moe_layer(moe, name='MlpBlock_0')(y, real_BxL, training=training)
        return x_BxLxD + skip(dropout(y))


class Encoder(nn.Module):
    """A stack of encoder blocks, ending in a norm."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, real_BxL: jax.Array, training: bool) -> jax.Array:
        config = self.config
        blocks = tuple(zip(config.layer_moe(), config.layer_depths(), strict=True))
        x_BxLxD = apply_layers(
            self, EncoderBlock, blocks, x_BxLxD, (real_BxL,), (training,), last=True, prefix='encoderblock_'
        )
        return _norm(config, 'encoder_norm')(x_BxLxD)


class MAPHead(nn.Module):
    """Multi-head attention pooling with one learned query (Lee et al. 2019), as in big_vision."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, training: bool) -> jax.Array:
        config = self.config
        B, _, D = x_BxLxD.shape
        init = nn.with_logical_partitioning(_xavier_init, (None, None, 'embed'))
        probe_1x1xD = self.param('probe', init, (1, 1, D), jnp.float32)
        probe_Bx1xD = jnp.broadcast_to(probe_1x1xD.astype(x_BxLxD.dtype), (B, 1, D))
        pool = Attention(config.num_heads, config.dtype, name='MultiHeadDotProductAttention_0')
        x_Bx1xD = pool(probe_Bx1xD, x_BxLxD)
        y_Bx1xD = _norm(config, 'LayerNorm_0')(x_Bx1xD)
        x_Bx1xD = x_Bx1xD + MlpBlock(**config.mlp_arguments, name='MlpBlock_0')(y_Bx1xD, training)
        return x_Bx1xD[:, 0]


class VisionTransformer(nn.Module):
    """The whole model: (B, height, width, channels) images to (B, classes) logits."""

    config: ViTConfig

    @nn.compact
    def __call__(
        self,
        image: jax.Array,
        real_B: jax.Array | None = None,
        *,
        training: bool = False,
        features_only: bool = False,
    ) -> jax.Array:
        """Applies the model.

        Args:
          image: (B, height, width, channels), with the configuration's height and width.
          real_B: bool, False for rows that fill up a batch, which take no slots; None if all are real.
          training: turns dropout on and selects the training capacity factor.
          features_only: stop before the head.

        Returns:
          Logits (B, classes), or features (B, D), in float32.
        """
        c = self.config
        B = image.shape[0]
        embed = PatchEmbedding(c.patch_size, c.image_channels, c.emb_dim, c.dtype, name='embedding')
        x_BxLxD = embed(to_patches(image.astype(c.dtype), c.patch_size))
        if c.positions is Positions.LEARNED:
            init = nn.with_logical_partitioning(nn.initializers.normal(c.emb_dim**-0.5), (None, 'length', 'embed'))
            pos_1xLxD = self.param('pos_embedding', init, (1, c.grid**2, c.emb_dim), jnp.float32)
        else:
            pos_1xLxD = jnp.asarray(sincos2d(c.grid, c.emb_dim))
        x_BxLxD += pos_1xLxD.astype(c.dtype)
        if c.pooling is Pooling.TOKEN:
            init = nn.with_logical_partitioning(nn.initializers.zeros, (None, None, 'embed'))
            cls_1x1xD = self.param('cls', init, (1, 1, c.emb_dim), jnp.float32).astype(c.dtype)
            x_BxLxD = jnp.concatenate([jnp.broadcast_to(cls_1x1xD, (B, 1, c.emb_dim)), x_BxLxD], axis=1)
        x_BxLxD = Dropout(c.dropout_rate, broadcast_axis=None)(x_BxLxD, training)
        x_BxLxD = nn.with_logical_constraint(x_BxLxD, ACTIVATIONS)
        real_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
        if real_B is not None:
            real_BxL &= real_B[:, None]
        x_BxLxD = Encoder(c, name='Transformer')(x_BxLxD, real_BxL, training)
        if c.pooling is Pooling.TOKEN:
            x_BxD = x_BxLxD[:, 0]
        elif c.pooling is Pooling.GAP:
            x_BxD = x_BxLxD.mean(axis=1)
        else:
            x_BxD = MAPHead(c, name='MAPHead_0')(x_BxLxD, training)
        zeros = nn.initializers.zeros
        if c.representation_size is not None:
            inits = {'kernel_init': nn.initializers.lecun_normal(), 'bias_init': zeros}
            layer = Dense(c.representation_size, ('embed', 'representation'), c.dtype, **inits, name='pre_logits')
            x_BxD = jnp.tanh(layer(x_BxD))
        x_BxD = x_BxD.astype(jnp.float32)
        if features_only:
            return x_BxD
        bias = nn.initializers.constant(c.head_bias_init)
        return Dense(c.num_classes, ('embed', 'vocab'), kernel_init=zeros, bias_init=bias, name='head')(x_BxD)


def _norm(config: ViTConfig, name: str) -> LayerNorm:
    return LayerNorm(config.norm_epsilon, config.dtype, name=name)
