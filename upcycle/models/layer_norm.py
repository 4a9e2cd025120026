"""Layer norm with biases."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models.layers import after


class LayerNorm(nn.Module):
    """Centred layer norm with biases, in float32; flax's by parameters and numbers (`use_fast_variance=False`)."""

    epsilon: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones, zeros = (
            nn.with_logical_partitioning(init, ('embed',)) for init in (nn.initializers.ones, nn.initializers.zeros)
        )
        scale = self.param('scale', ones, x.shape[-1:], jnp.float32)
        bias = self.param('bias', zeros, x.shape[-1:], jnp.float32)
        return layer_norm(x, scale, bias, self.epsilon).astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale_D: jax.Array, bias_D: jax.Array, epsilon: float) -> jax.Array:
    """Standardised over the last axis, then scaled and shifted, in float32.

    Its gradient with respect to x is one array. Derived from the definition it is a sum that ends in a term broadcast from rows,
    which XLA:CPU never stores: it adds all residual branches so far up again in every layer, in time quadratic in the depth.
    """
    return _layer_norm_forward(x, scale_D, bias_D, epsilon)[0]


def _layer_norm_forward(x, scale_D, bias_D, epsilon):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (wide - mean) * (inverse * scale_D) + bias_D, (x, mean, inverse, scale_D)


def _layer_norm_backward(epsilon, kept, dy):
    x, mean, inverse, scale_D = kept
    x = after(x, dy)
    standard = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    change = dy * scale_D
    along = (change * standard).mean(axis=-1, keepdims=True)
    dx = inverse * (change - change.mean(axis=-1, keepdims=True) - standard * along)
    dscale_D, dbias_D = (dy * standard).sum(axis=rows), dy.sum(axis=rows)
    # In a loop the parameters have the activations' type, and gradients must match it.
    return dx.astype(x.dtype), dscale_D.astype(scale_D.dtype), dbias_D.astype(scale_D.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
