"""Cross entropy with T5's z-loss and label smoothing, and means over targets."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

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
    return weighted_sums(loss_BxL, z_loss_BxL, jnp.argmax(logits_BxLxV, axis=-1) == targets_BxL, weights_BxL)


def weighted_sums(
    loss_BxL: jax.Array, z_loss_BxL: jax.Array, correct_BxL: jax.Array, weights_BxL: jax.Array
) -> dict[str, jax.Array]:
    """Returns `target_sums` from the losses of each target and whether it has the largest logit."""
    weights_BxL = weights_BxL.astype(jnp.float32)
    return {
        'loss': (loss_BxL * weights_BxL).sum(),
        'z_loss': (z_loss_BxL * weights_BxL).sum(),
        'correct': (correct_BxL * weights_BxL).sum(),
        'weight': weights_BxL.sum(),
    }


class Seen(NamedTuple):
    """What of some entries' logits determines the loss of each target; all (B, L).

    Attributes:
      top_BxL, best_BxL: the largest logit and its entry, the first of equal ones.
      total_BxL: the sum of `exp(logit - top)`.
      target_BxL: the target's logit; 0 if it was not among them.
      sum_BxL: the sum of the logits; None if it is not needed.
    """

    top_BxL: jax.Array
    best_BxL: jax.Array
    total_BxL: jax.Array
    target_BxL: jax.Array
    sum_BxL: jax.Array | None

    @classmethod
    def nothing(cls, targets_BxL: jax.Array, *, label_smoothing: float) -> 'Seen':
        """Returns that of no logits."""
        zeros_BxL = jnp.zeros(targets_BxL.shape, jnp.float32)
        none_BxL = jnp.full_like(targets_BxL, jnp.iinfo(targets_BxL.dtype).max)
        return cls(
            jnp.full_like(zeros_BxL, -jnp.inf), none_BxL, zeros_BxL, zeros_BxL, zeros_BxL if label_smoothing else None
        )

    def add(
        self, x_BxLxV: jax.Array, targets_BxL: jax.Array, id_V: jax.Array, new_V: jax.Array | None = None
    ) -> 'Seen':
        """Returns that of these logits, too.

        Args:
          x_BxLxV: float32.
          targets_BxL: entries of the whole vocabulary.
          id_V: the logits' entries, ascending.
          new_V: which of them count; None for all.
        """
        counts_BxLxV = x_BxLxV if new_V is None else jnp.where(new_V, x_BxLxV, 0.0)
        x_BxLxV = x_BxLxV if new_V is None else jnp.where(new_V, x_BxLxV, -jnp.inf)
        is_target_BxLxV = id_V == targets_BxL[..., None]
        here_BxL, first_BxL = x_BxLxV.max(axis=-1), id_V[jnp.argmax(x_BxLxV, axis=-1)]
        top_BxL = jnp.maximum(self.top_BxL, here_BxL)
        better_BxL = (here_BxL > self.top_BxL) | ((here_BxL == self.top_BxL) & (first_BxL < self.best_BxL))
        return Seen(
            top_BxL,
            jnp.where(better_BxL, first_BxL, self.best_BxL),
            self.total_BxL * jnp.exp(self.top_BxL - top_BxL) + jnp.exp(x_BxLxV - top_BxL[..., None]).sum(axis=-1),
            self.target_BxL + jnp.where(is_target_BxLxV, counts_BxLxV, 0.0).sum(axis=-1),
            None if self.sum_BxL is None else self.sum_BxL + counts_BxLxV.sum(axis=-1),
        )

    def normalizer(self) -> jax.Array:
        """Returns the logarithm of the sum of the exponentials, (B, L)."""
        return self.top_BxL + jnp.log(self.total_BxL)


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """The terms of `cross_entropy` for a vocabulary of `size` entries."""

    size: int
    z_loss: float
    label_smoothing: float

    def losses(self, seen: Seen) -> tuple[jax.Array, jax.Array]:
        """Returns `cross_entropy` once all logits were seen."""
        return self.of(seen.normalizer(), seen.target_BxL, seen.sum_BxL)

    def of(self, log_z_BxL: jax.Array, target_BxL: jax.Array, sum_BxL: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Returns `cross_entropy` from the logits' normaliser, the target's logit and, to smooth, the logits' sum."""
        if self.label_smoothing:
            confidence, low, others = self._shares()
            target_BxL = (confidence - low) * target_BxL + low * sum_BxL
            target_BxL -= confidence * jnp.log(confidence) + others * low * jnp.log(low)
        z_BxL = self.z_loss * jnp.square(log_z_BxL)
        return log_z_BxL - target_BxL + z_BxL, z_BxL

    def derivative(
        self,
        x_BxLxV: jax.Array,
        is_target_BxLxV: jax.Array,
        log_z_BxL: jax.Array,
        cotangents: tuple[jax.Array, jax.Array],
    ) -> jax.Array:
        """Returns the derivative by some or all logits, from the cotangents of `cross_entropy`'s results."""
        loss_BxL, z_BxL = cotangents
        by_log_z_BxL = loss_BxL + 2.0 * self.z_loss * log_z_BxL * (loss_BxL + z_BxL)
        wanted_BxLxV = is_target_BxLxV.astype(jnp.float32)
        if self.label_smoothing:
            confidence, low, _ = self._shares()
            wanted_BxLxV = (confidence - low) * wanted_BxLxV + low
        softmax_BxLxV = jnp.exp(x_BxLxV - log_z_BxL[..., None])
        return by_log_z_BxL[..., None] * softmax_BxLxV - loss_BxL[..., None] * wanted_BxLxV

    def _shares(self) -> tuple[float, float, int]:
        """Returns the probability of the target, that of every other entry, and the number of other entries."""
        others = self.size - 1
        return 1.0 - self.label_smoothing, self.label_smoothing / others, others


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
    smoothing = Smoothing(x_BxLxV.shape[-1], z_loss, label_smoothing)
    sum_BxL = x_BxLxV.sum(axis=-1) if label_smoothing else None
    return smoothing.of(log_z_BxL, target_BxL, sum_BxL), (logits_BxLxV, targets_BxL, log_z_BxL)


def _backward(z_loss: float, label_smoothing: float, kept, cotangents):
    logits_BxLxV, targets_BxL, log_z_BxL = kept
    x_BxLxV = logits_BxLxV.astype(jnp.float32)
    smoothing = Smoothing(x_BxLxV.shape[-1], z_loss, label_smoothing)
    grad_BxLxV = smoothing.derivative(x_BxLxV, _is_target(x_BxLxV, targets_BxL), log_z_BxL, cotangents)
    return grad_BxLxV.astype(logits_BxLxV.dtype), None


_cross_entropy.defvjp(_forward, _backward)


def _is_target(x_BxLxV: jax.Array, targets_BxL: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BxL.dtype, x_BxLxV.shape, x_BxLxV.ndim - 1) == targets_BxL[..., None]


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
