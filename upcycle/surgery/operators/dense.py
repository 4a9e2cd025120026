"""Experts of the dense MLP's own shapes, out of one dense checkpoint."""

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

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        (w,) = parents
        return w


class NoiseOn(enum.StrEnum):
    """What gets noise, or not."""

    WEIGHTS = 'weights'  # each weight on its own, as the papers say
    NEURONS = 'neurons'  # whole neurons, others in each matrix, as Drop-Upcycling's released code does


@dataclasses.dataclass(frozen=True)
class Noise(Operator):
    """W_e = W + M * N(0, s^2), where M keeps each weight's noise with probability r.

    Komatsuzaki et al. 2023, section 5 (r = 1); Drop-Upcycling's baseline "random noise upcycling" (arXiv 2502.19261: r = 0.5,
    s = 0.02).

    Attributes:
      stddev: s, the standard deviation of the noise [NOISE_STDDEV].
      fraction: r, the share of the weights that get noise [NOISE_FRACTION].
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
            raise UserError(f'NOISE_STDDEV = {self.stddev!r} is a standard deviation: set it to at least 0.')

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
        # uniform < 1 always holds, so a fraction of 1 means every weight.
        return w + jnp.where(jax.random.uniform(where_key, w.shape) < self.fraction, noise, 0.0)


class Initializer(enum.StrEnum):
    """How a model of its family starts its MLPs."""

    LECUN_NORMAL = 'lecun_normal'  # variance 1 / fan_in, truncated: T5X and Flax
    XAVIER_UNIFORM = 'xavier_uniform'  # variance 2 / (fan_in + fan_out): big_vision's


@dataclasses.dataclass(frozen=True)
class Random(Operator):
    """Experts from scratch, everything else copied (Komatsuzaki et al. 2023, figures 7 and 13); the first few may be copies too.

    Attributes:
      initializer: of the kernels; biases start at 0 [RANDOM_INITIALIZER].
      copied: how many experts are copies of the dense MLP instead [RANDOM_COPIED].
    """

    name = 'random'

    initializer: Initializer = Initializer.LECUN_NORMAL
    copied: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'initializer', one_of(Initializer, self.initializer, 'RANDOM_INITIALIZER'))
        if not isinstance(self.copied, int) or self.copied < 0:
            raise UserError(f'RANDOM_COPIED = {self.copied!r} must be a number of experts, 0 or more.')

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
    """Whose neurons are dropped together."""

    SHARED = 'shared'  # one draw for all matrices of an expert: a neuron goes as a unit, as the paper says
    PER_MATRIX = 'per_matrix'  # a draw for each matrix, as the released code does


@dataclasses.dataclass(frozen=True)
class Drop(Operator):
    """Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261, section 3): W~ = 1_S * R + (1 - 1_S) * W.

    For each expert S is a set of floor(r f) of the f intermediate neurons: columns of W_gate and W_up, rows of W_down, entries of
    the hidden bias. R ~ N(mean(W_S), std(W_S)^2), mean and deviation taken over the dropped entries of that leaf. r = 0 is plain
    upcycling. The released code also permutes an expert's neurons, which changes nothing that the expert computes.

    Attributes:
      ratio: r, the share of an expert's neurons that start anew; 0.5 is the paper's best [DROP_RATIO].
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
    """Draws floor(ratio * F) neurons anew, from the mean and deviation that their entries have.

    Args:
      name: of the leaf.
      w: the leaf.
      leaf: its axes.
      ratio: share of the neurons.
      key: of this expert.
      shared: the same neurons in every leaf of the expert, or others in each.
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
    """floor(ratio * width); the small term keeps 0.3 * 10 at 3."""
    return int(ratio * width + 1e-6)


def _along(x_F: jax.Array, axis: int, ndim: int) -> jax.Array:
    """A vector that lies along one axis of an array."""
    return jnp.expand_dims(x_F, [i for i in range(ndim) if i != axis])
