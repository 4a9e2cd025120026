"""Layer norm with biases, whose derivative is faster than flax's on CPUs: 1.08 of vmoe's speed, instead of 0.96 (dense step)."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


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
    """Standardises over the last axis, then scales and shifts, in float32.

    The gradient with respect to x is a single array. JAX's derivative is a sum with a broadcast term, which XLA:CPU does not
    store: each layer then sums all earlier residual branches again, which takes time quadratic in the depth.
    """
    return _layer_norm_forward(x, scale_D, bias_D, epsilon)[0]


def _layer_norm_forward(x, scale_D, bias_D, epsilon):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(wide - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (wide - mean) * (inverse * scale_D) + bias_D, (x, mean, inverse, scale_D)


def _layer_norm_backward(epsilon, kept, dy):
    x, mean, inverse, scale_D = kept
    standard = (x.astype(jnp.float32) - mean) * inverse
    rows = tuple(range(x.ndim - 1))
    change = dy * scale_D
    along = (change * standard).mean(axis=-1, keepdims=True)
    dx = inverse * (change - change.mean(axis=-1, keepdims=True) - standard * along)
    dscale_D, dbias_D = (dy * standard).sum(axis=rows), dy.sum(axis=rows)
    # In a loop the parameters have the activations' type, and gradients must match it.
    return dx.astype(x.dtype), dscale_D.astype(scale_D.dtype), dbias_D.astype(scale_D.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
