"""Operators that make experts with the shapes of the dense MLP from one dense checkpoint."""

import dataclasses
import enum
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators.base import Leaf, Leaves, Operator, check_fraction, key_for


@dataclasses.dataclass(frozen=True)
class Copy(Operator):
    """W_e = W for every expert: Sparse Upcycling (Komatsuzaki et al. 2023, section 2)."""

    name = 'copy'
    identical = True


class NoiseOn(enum.StrEnum):
    """The unit to which noise is applied."""

    WEIGHTS = 'weights'  # individual weights, as in the papers
    NEURONS = 'neurons'  # whole neurons, chosen per matrix, as in Drop-Upcycling's released code


@dataclasses.dataclass(frozen=True)
class Noise(Operator):
    """W_e = W + M * N(0, s^2), where the mask M is 1 with probability r.

    Komatsuzaki et al. 2023, section 5 (r = 1); Drop-Upcycling's baseline "random noise upcycling" (arXiv 2502.19261: r = 0.5,
    s = 0.02).

    Attributes:
      stddev: s, the standard deviation of the noise [NOISE_STDDEV].
      fraction: r, the fraction of weights with noise [NOISE_FRACTION].
      on: see `NoiseOn` [NOISE_ON].
    """

    name = 'noise'

    stddev: float = 0.02
    fraction: float = 1.0
    on: NoiseOn = NoiseOn.WEIGHTS

    def __post_init__(self):
        check_fraction('NOISE_FRACTION', self.fraction)
        object.__setattr__(self, 'on', one_of(NoiseOn, self.on, 'NOISE_ON'))
        if not self.stddev >= 0:
            raise UserError(f'NOISE_STDDEV = {self.stddev!r} must be at least 0.')

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        noise_key, where_key = jax.random.split(key_for(jax.random.fold_in(key, index), name))
        noise = self.stddev * jax.random.normal(noise_key, w.shape, jnp.float32)
        if self.on is NoiseOn.NEURONS:
            axis = mlp[name].width_axis
            if axis is None:
                return w
            width = w.shape[axis]
            noisy_F = jax.random.permutation(where_key, width) < _share_of(self.fraction, width)
            return w + jnp.where(_along(noisy_F, axis, w.ndim), noise, 0.0)
        # uniform < 1 always holds, so a fraction of 1 covers every weight.
        return w + jnp.where(jax.random.uniform(where_key, w.shape) < self.fraction, noise, 0.0)


class Initializer(enum.StrEnum):
    """The initializer of MLP kernels."""

    LECUN_NORMAL = 'lecun_normal'  # variance 1 / fan_in, truncated: T5X and Flax
    XAVIER_UNIFORM = 'xavier_uniform'  # variance 2 / (fan_in + fan_out): big_vision


@dataclasses.dataclass(frozen=True)
class Random(Operator):
    """Randomly initialised experts, everything else copied (Komatsuzaki et al. 2023, figures 7 and 13).

    Attributes:
      initializer: see `Initializer`; biases start at 0 [RANDOM_INITIALIZER].
      copied: number of experts, the first ones, that are copies of the dense MLP instead [RANDOM_COPIED].
    """

    name = 'random'

    initializer: Initializer = Initializer.LECUN_NORMAL
    copied: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'initializer', one_of(Initializer, self.initializer, 'RANDOM_INITIALIZER'))
        if not isinstance(self.copied, int) or self.copied < 0:
            raise UserError(f'RANDOM_COPIED = {self.copied!r} must be a number of experts, at least 0.')

    @property
    def reads(self) -> bool:
        return self.copied > 0

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        leaf = mlp[name]
        w = jnp.zeros(leaf.shape, jnp.float32)
        if leaf.is_kernel:
            draw = getattr(jax.nn.initializers, self.initializer)()
            w = draw(key_for(jax.random.fold_in(key, index), name), leaf.shape, jnp.float32)
        return jnp.where(index < self.copied, parents[0], w) if parents else w


class DropIndices(enum.StrEnum):
    """Which matrices share the dropped neurons."""

    SHARED = 'shared'  # one draw for all matrices of an expert, so whole neurons are dropped, as in the paper
    PER_MATRIX = 'per_matrix'  # one draw per matrix, as in the released code


@dataclasses.dataclass(frozen=True)
class Drop(Operator):
    """Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, section 3): W~ = 1_S * R + (1 - 1_S) * W.

    S is a random set of floor(r f) of an expert's f intermediate neurons: columns of W_gate and W_up, rows of W_down, entries of
    the hidden bias. R ~ N(mean(W_S), std(W_S)^2), with mean and deviation over the dropped entries of that leaf. r = 0 is plain
    upcycling. The released code also permutes an expert's neurons, which does not change its function.

    Attributes:
      ratio: r, the fraction of an expert's neurons that are reinitialised; 0.5 is the paper's best [DROP_RATIO].
      indices: see `DropIndices` [DROP_INDICES].
    """

    name = 'drop'

    ratio: float = 0.5
    indices: DropIndices = DropIndices.SHARED

    def __post_init__(self):
        check_fraction('DROP_RATIO', self.ratio)
        object.__setattr__(self, 'indices', one_of(DropIndices, self.indices, 'DROP_INDICES'))

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        shared = self.indices is DropIndices.SHARED
        return reinitialise(name, w, mlp[name], self.ratio, jax.random.fold_in(key, index), shared=shared)


def reinitialise(name: str, w: jax.Array, leaf: Leaf, ratio: float, key: jax.Array, *, shared: bool) -> jax.Array:
    """Redraws floor(ratio * F) neurons from a normal with the mean and deviation of their entries.

    Args:
      name: name of the leaf.
      w: the leaf.
      leaf: its axes.
      ratio: fraction of the neurons.
      key: key of the expert.
      shared: True: the same neurons in every leaf of the expert; False: a separate draw per leaf.
    """
    axis = leaf.width_axis
    if axis is None:
        return w
    which_key, value_key = jax.random.split(key)
    width = w.shape[axis]
    order_F = jax.random.permutation(which_key if shared else key_for(which_key, name), width)
    dropped_F = order_F < _share_of(ratio, width)
    dropped = _along(dropped_F, axis, w.ndim)
    entries = jnp.maximum(dropped_F.sum() * (w.size // width), 1)
    mean = jnp.where(dropped, w, 0.0).sum() / entries
    stddev = jnp.sqrt(jnp.where(dropped, jnp.square(w - mean), 0.0).sum() / entries)
    drawn = mean + stddev * jax.random.normal(key_for(value_key, name), w.shape, jnp.float32)
    return jnp.where(dropped, drawn, w)


def _share_of(ratio: float, width: int) -> int:
    """floor(ratio * width); the small term makes 0.3 * 10 equal 3."""
    return int(ratio * width + 1e-6)


def _along(x_F: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Reshapes a vector to broadcast along one axis of an array of `ndim` axes."""
    return jnp.expand_dims(x_F, [i for i in range(ndim) if i != axis])
