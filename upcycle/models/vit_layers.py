"""Layers of a ViT that do not depend on its configuration: MLP and patch embedding."""

import enum
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models.layers import Dense, drop, drop_key

_xavier_init = nn.initializers.xavier_uniform()


class Gelu(enum.StrEnum):
    """Form of the GELU; public checkpoints differ."""

    TANH = 'tanh'  # approximate: vision_transformer, big_vision, V-MoE
    ERF = 'erf'  # exact: Hugging Face, timm


class MlpBlock(nn.Module):
    """GELU between two linear layers with biases. An expert is such an MLP too.

    `embed_axis` and `mlp_axis` are the logical axes of its kernels.
    """

    mlp_dim: int
    gelu: Gelu = Gelu.TANH
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    embed_axis: str = 'embed'
    mlp_axis: str = 'mlp'

    @nn.compact
    def __call__(self, x: jax.Array, training: bool, group_sizes: jax.Array | None = None) -> jax.Array:
        """Applies the MLP; with `group_sizes`, the number of rows of each expert, all experts at once."""
        dense = functools.partial(
            Dense, dtype=self.dtype, kernel_init=_xavier_init, bias_init=nn.initializers.normal(1e-6)
        )
        h = dense(self.mlp_dim, (self.embed_axis, self.mlp_axis), name='Dense_0')(x, group_sizes)

        def activate(h: jax.Array, key: jax.Array | None) -> jax.Array:
            h = jax.nn.gelu(h, approximate=self.gelu is Gelu.TANH)
            return drop(h, key, self.dropout_rate, broadcast_axis=None)

        output = dense(x.shape[-1], (self.mlp_axis, self.embed_axis), name='Dense_1')
        return output((h,), group_sizes, activate, drop_key(self, self.dropout_rate, training))


class PatchEmbedding(nn.Module):
    """A convolution with stride patch size, computed as a matrix product. The kernel is (patch, patch, channels, D)."""

    patch_size: int
    channels: int
    emb_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, patches_BxLxP: jax.Array) -> jax.Array:
        P, D = patches_BxLxP.shape[-1], self.emb_dim
        shape = (self.patch_size, self.patch_size, self.channels, D)
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, None, 'embed'))
        kernel = self.param('kernel', init, shape, jnp.float32)
        bias = self.param('bias', nn.with_logical_partitioning(nn.initializers.zeros, ('embed',)), (D,), jnp.float32)
        rows = patches_BxLxP.reshape(-1, P) @ kernel.reshape(P, D).astype(self.dtype) + bias.astype(self.dtype)
        return rows.reshape(*patches_BxLxP.shape[:-1], D)
