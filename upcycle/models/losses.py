"""Cross entropy with T5's z-loss and label smoothing, and means over targets."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from upcycle.moe.state import for_the_log


def cross_entropy(
    logits_BxLxV: jax.Array, targets_BxL: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of each target including z-loss, and the z-loss alone; both (B, L), float32.

    As T5X's `losses.compute_weighted_cross_entropy` before weighting: z-loss is `z_loss * logsumexp(logits) ** 2`, and with
    label smoothing the entropy of the smoothed target is subtracted, so that a perfect model scores 0.

    The derivative is custom, as in T5X: it keeps the logits and their normaliser, but not the exponentials in float32.
    """
    return _cross_entropy(logits_BxLxV, targets_BxL, z_loss, label_smoothing)


def target_sums(
    logits_BxLxV: jax.Array,
    targets_BxL: jax.Array,
    weights_BxL: jax.Array,
    *,
    z_loss: float,
    label_smoothing: float,
) -> dict[str, jax.Array]:
    """Returns weighted sums over target tokens, float32 scalars: `loss`, `z_loss`, `correct`, `weight`; see `cross_entropy`."""
    loss_BxL, z_loss_BxL = cross_entropy(logits_BxLxV, targets_BxL, z_loss=z_loss, label_smoothing=label_smoothing)
    correct_BxL = jnp.argmax(logits_BxLxV, axis=-1) == targets_BxL
    weights_BxL = weights_BxL.astype(jnp.float32)
    return {
        'loss': (loss_BxL * weights_BxL).sum(),
        'z_loss': (z_loss_BxL * weights_BxL).sum(),
        'correct': (correct_BxL * weights_BxL).sum(),
        'weight': weights_BxL.sum(),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _cross_entropy(
    logits_BxLxV: jax.Array, targets_BxL: jax.Array, z_loss: float, label_smoothing: float
) -> tuple[jax.Array, jax.Array]:
    losses, _ = _forward(logits_BxLxV, targets_BxL, z_loss, label_smoothing)
    return losses


def _forward(logits_BxLxV: jax.Array, targets_BxL: jax.Array, z_loss: float, label_smoothing: float):
    x_BxLxV = logits_BxLxV.astype(jnp.float32)
    log_z_BxL = jax.nn.logsumexp(x_BxLxV, axis=-1)
    target_BxL = jnp.where(_is_target(x_BxLxV, targets_BxL), x_BxLxV, 0.0).sum(axis=-1)
    if label_smoothing:
        confidence, low, others = _smoothed(x_BxLxV, label_smoothing)
        target_BxL = (confidence - low) * target_BxL + low * x_BxLxV.sum(axis=-1)
        target_BxL -= confidence * jnp.log(confidence) + others * low * jnp.log(low)
    z_BxL = z_loss * jnp.square(log_z_BxL)
    return (log_z_BxL - target_BxL + z_BxL, z_BxL), (logits_BxLxV, targets_BxL, log_z_BxL)


def _backward(z_loss: float, label_smoothing: float, kept, cotangents):
    logits_BxLxV, targets_BxL, log_z_BxL = kept
    loss_BxL, z_BxL = cotangents
    x_BxLxV = logits_BxLxV.astype(jnp.float32)
    by_log_z_BxL = loss_BxL + 2.0 * z_loss * log_z_BxL * (loss_BxL + z_BxL)
    wanted_BxLxV = _is_target(x_BxLxV, targets_BxL).astype(jnp.float32)
    if label_smoothing:
        confidence, low, _ = _smoothed(x_BxLxV, label_smoothing)
        wanted_BxLxV = (confidence - low) * wanted_BxLxV + low
    softmax_BxLxV = jnp.exp(x_BxLxV - log_z_BxL[..., None])
    grad_BxLxV = by_log_z_BxL[..., None] * softmax_BxLxV - loss_BxL[..., None] * wanted_BxLxV
    return grad_BxLxV.astype(logits_BxLxV.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _is_target(x_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BxL.dtype, x_BxLxV.shape, x_BxLxV.ndim - 1) == targets_BxL[..., None]


def _smoothed(x_BxLxV: jax.Array, label_smoothing: float) -> tuple[float, float, int]:
    """Returns the probability of the target, that of every other class, and the number of other classes."""
    others = x_BxLxV.shape[-1] - 1
    return 1.0 - label_smoothing, label_smoothing / others, others


def summarize(sums: Mapping[str, jax.Array], normalizer: jax.Array) -> dict[str, jax.Array]:
    """Turns sums over targets into means. `loss` is minimised; `cross_entropy_loss` is comparable between models."""
    weight = jnp.maximum(sums['weight'], 1e-9)
    return {
        'loss': sums['loss'] / normalizer + sums['moe_loss'],
        'cross_entropy_loss': (sums['loss'] - sums['z_loss']) / weight,
        'z_loss': sums['z_loss'] / weight,
        'accuracy': sums['correct'] / weight,
        'targets': sums['weight'],
        **for_the_log(sums['moe']),
    }
