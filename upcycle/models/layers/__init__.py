"""Layers of T5: RMS norm, gated MLP, embedding. Parameter names are T5X's. Other families use `Dense` and `Dropout` too."""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from upcycle.models import memory
from upcycle.moe.grouped_matmul import grouped_matmul

DType = Any

_truncated_normal_init = nn.initializers.variance_scaling(1.0, 'fan_in', 'truncated_normal')


# T5X's activations by name. Its GELU is the tanh approximation, as is JAX's.
ACTIVATION_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'gelu': jax.nn.gelu,
    'relu': jax.nn.relu,
    'silu': jax.nn.silu,
    'linear': lambda x: x,
}


# Names products with weights for `stack.Remat`. Those of experts are batched, so JAX's own policies do not recognise them.
PRODUCT = 'product_with_weights'


class Dense(nn.Module):
    """A linear layer with float32 parameters.

    Attributes:
      features: width of the output.
      kernel_axes: logical axes of the kernel.
      dtype: type of the product.
      kernel_init: of the kernel.
      bias_init: of the bias; None for no bias, as in T5.
      both_gradients: see `memory.both_gradients`.
    """

    features: int
    kernel_axes: tuple[str, str]
    dtype: DType = jnp.float32
    kernel_init: Callable[..., jax.Array] = _truncated_normal_init
    bias_init: Callable[..., jax.Array] | None = None
    both_gradients: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array | Sequence[jax.Array],
        group_sizes: jax.Array | None = None,
        activation: Callable[..., jax.Array] | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          x: rows; with an `activation` its arguments, arrays of rows.
          group_sizes: number of rows of each expert; rows are sorted by expert, and the parameters are stacked (E, ...).
          activation: applied first, as `activation(*x, key=key)`. The backward pass recomputes its result from `x`.
          key: random key for `activation`.
        """
        parts = (x,) if activation is None else tuple(x)
        experts = () if group_sizes is None else group_sizes.shape
        kernel = self.param(
            'kernel',
            nn.with_logical_partitioning(self.kernel_init, self.kernel_axes),
            (*experts, parts[0].shape[-1], self.features),
            jnp.float32,
        )
        bias = None
        if self.bias_init is not None:
            init = nn.with_logical_partitioning(self.bias_init, self.kernel_axes[1:])
            bias = self.param('bias', init, (*experts, self.features), jnp.float32).astype(self.dtype)
        project = functools.partial(_project, dtype=self.dtype, axes=self.kernel_axes)
        if self.both_gradients:
            kernel, parts = memory.both_gradients(kernel, parts)
        if activation is None:
            return project((kernel, bias, group_sizes), parts[0])

        def activate_and_project(rest: Any, parts: tuple[jax.Array, ...]) -> jax.Array:
            key, *rest = rest
            return project(rest, activation(*parts, key=key))

        return memory.recomputed(activate_and_project, (key, kernel, bias, group_sizes), parts)


def _project(
    rest: tuple[jax.Array, jax.Array | None, jax.Array | None],
    x: jax.Array,
    dtype: DType,
    axes: tuple[str | None, str | None],
) -> jax.Array:
    kernel, bias, group_sizes = rest
    if group_sizes is not None:
        y = checkpoint_name(grouped_matmul(x.astype(dtype), kernel, group_sizes, axes), PRODUCT)
        if bias is not None:
            # In float32, so that the gradient of an expert's bias is a sum in float32.
            rows = jnp.repeat(bias.astype(jnp.float32), group_sizes, axis=0, total_repeat_length=len(x))
            has_expert = jnp.arange(len(x)) < group_sizes.sum()
            y += jnp.where(has_expert[:, None], rows, 0).astype(dtype)
        return y
    # One long row axis: XLA:CPU transposes operands in the backward pass of a product with several.
    rows = x.reshape(-1, x.shape[-1]).astype(dtype)
    y = checkpoint_name(rows @ kernel.astype(dtype), PRODUCT)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], kernel.shape[-1])


def products_with_columns(kernel_DxV: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies (..., D) by a kernel in float32, as `Dense` does."""
    return _project((kernel_DxV, None, None), x, jnp.float32, axes=(None, None))


def products_with_rows(embedding_VxD: jax.Array, x: jax.Array) -> jax.Array:
    """Multiplies (..., D) by all embeddings in float32, as `Embed.attend` does."""
    return x.astype(jnp.float32) @ embedding_VxD.T


class LayerNorm(nn.Module):
    """Root mean square norm over the last axis, without centring and bias. The mean is computed in float32.

    Attributes:
      dtype: type of the result.
      epsilon: added to the mean square.
      offset: added to the learned scale; Gemma stores scales minus 1, and multiplies by them in float32.
      axis: logical axis of the scale.
    """

    dtype: DType = jnp.float32
    epsilon: float = 1e-6
    offset: float = 0.0
    axis: str = 'embed'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            'scale',
            nn.with_logical_partitioning(nn.initializers.constant(1.0 - self.offset), (self.axis,)),
            (x.shape[-1],),
            jnp.float32,
        )
        x = x.astype(jnp.float32)
        normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        if self.offset:
            return (normed * (self.offset + scale)).astype(self.dtype)
        return (normed.astype(self.dtype) * scale.astype(self.dtype)).astype(self.dtype)


class Dropout(nn.Module):
    """Dropout with one mask for all positions of a sequence, as in T5 (axis -2 is broadcast)."""

    rate: float
    broadcast_axis: int | None = -2

    @nn.compact
    def __call__(self, x: jax.Array, training: bool) -> jax.Array:
        return drop(x, drop_key(self, self.rate, training), self.rate, self.broadcast_axis)


def drop_key(module: nn.Module, rate: float, training: bool) -> jax.Array | None:
    """Returns the key of a module's next mask; None if nothing is dropped."""
    return module.make_rng('dropout') if training and rate > 0 else None


def drop(x: jax.Array, key: jax.Array | None, rate: float, broadcast_axis: int | None) -> jax.Array:
    """Applies dropout, with one mask for all of `broadcast_axis`; does nothing without a key."""
    if key is None:
        return x
    broadcast = () if broadcast_axis is None else (broadcast_axis,)
    return nn.Dropout(rate, broadcast_dims=broadcast).apply({}, x, deterministic=False, rng=key)


class MlpBlock(nn.Module):
    """T5's MLP, gated if it has several activations: their product is the input of `wo`. An expert is such an MLP too.

    Attributes:
      mlp_dim: F.
      activations: names in `ACTIVATION_FUNCTIONS`.
      dropout_rate: of the hidden activations.
      dtype: type of the products.
      embed_axis, mlp_axis: logical axes of the kernels.
      dropout_broadcast_axis: axis that shares one mask.
      use_bias: add biases after the products (Llama's `mlp_bias`).
    """

    mlp_dim: int
    activations: Sequence[str] = ('gelu', 'linear')
    dropout_rate: float = 0.0
    dtype: DType = jnp.float32
    embed_axis: str = 'embed'
    mlp_axis: str = 'mlp'
    dropout_broadcast_axis: int | None = -2
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, training: bool, group_sizes: jax.Array | None = None) -> jax.Array:
        """Applies the MLP; with `group_sizes`, the number of rows of each expert, all experts at once."""
        names = ['wi'] if len(self.activations) == 1 else [f'wi_{i}' for i in range(len(self.activations))]
        bias_init = nn.initializers.zeros if self.use_bias else None
        linear = functools.partial(Dense, dtype=self.dtype, bias_init=bias_init)
        wi = functools.partial(linear, self.mlp_dim, (self.embed_axis, self.mlp_axis))
        parts = [wi(name=name)(x, group_sizes) for name in names]

        def activate(*parts: jax.Array, key: jax.Array | None) -> jax.Array:
            activated = (ACTIVATION_FUNCTIONS[name](part) for name, part in zip(self.activations, parts, strict=True))
            return drop(functools.reduce(operator.mul, activated), key, self.dropout_rate, self.dropout_broadcast_axis)

        wo = linear(x.shape[-1], (self.mlp_axis, self.embed_axis), name='wo')
        return wo(parts, group_sizes, activate, drop_key(self, self.dropout_rate, training))


class Embed(nn.Module):
    """Token embedding, initialised with standard deviation `init_stddev` (T5: 1)."""

    vocab_size: int
    emb_dim: int
    dtype: DType
    init_stddev: float = 1.0

    def setup(self):
        self.embedding = self.param(
            'embedding',
            nn.with_logical_partitioning(nn.initializers.normal(self.init_stddev), ('vocab', 'embed')),
            (self.vocab_size, self.emb_dim),
            jnp.float32,
        )

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        # Cast rows, not the table: the gradient of a frequent token is then a sum in float32.
        return jnp.take(self.embedding, tokens_BxL, axis=0).astype(self.dtype)

    def attend(self, x_BxLxD: jax.Array) -> jax.Array:
        """Computes logits (B, L, V) in float32, the products with all embeddings."""
        return products_with_rows(*memory.both_gradients(self.embedding, x_BxLxD))
