"""Cross entropy with T5's z-loss and label smoothing, and means over targets."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def cross_entropy(
    logits_BxLxV: jax.Array, targets_BxL: jax.Array, *, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Loss of each target, z-loss included, and the z-loss alone; both (B, L), float32.

    As T5X's `losses.compute_weighted_cross_entropy` before weighting: z-loss is `z_loss * logsumexp(logits) ** 2`, and with
    label smoothing the entropy of the smoothed target is subtracted, so that a perfect model scores 0.
    """
    logits_BxLxV = logits_BxLxV.astype(jnp.float32)
    log_z_BxL = jax.nn.logsumexp(logits_BxLxV, axis=-1)
    target_BxL = jnp.take_along_axis(logits_BxLxV, targets_BxL[..., None], axis=-1)[..., 0]
    if label_smoothing:
        others = logits_BxLxV.shape[-1] - 1
        low = label_smoothing / others
        confidence = 1.0 - label_smoothing
        target_BxL = (confidence - low) * target_BxL + low * logits_BxLxV.sum(axis=-1)
        target_BxL -= confidence * jnp.log(confidence) + others * low * jnp.log(low)
    z_BxL = z_loss * jnp.square(log_z_BxL)
    return log_z_BxL - target_BxL + z_BxL, z_BxL


def summarize(sums: Mapping[str, jax.Array], normalizer: jax.Array) -> dict[str, jax.Array]:
    """Turns sums over targets into means per target. `loss` is what is minimised; `cross_entropy_loss` compares models."""
    weight = jnp.maximum(sums['weight'], 1e-9)
    return {
        'loss': sums['loss'] / normalizer + sums['moe_loss'],
        'cross_entropy_loss': (sums['loss'] - sums['z_loss']) / weight,
        'z_loss': sums['z_loss'] / weight,
        'accuracy': sums['correct'] / weight,
        'targets': sums['weight'],
        **sums['moe'],
    }
