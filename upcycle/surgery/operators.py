"""Ways to make the experts of a Mixture-of-Experts layer. One dataclass each, its fields the method's own knobs.

An operator makes one expert at a time, out of the MLPs that it names as the expert's parents, and knows the axes of a leaf by
their logical names only: kernels or biases, gated or not, of whatever family. It sees whole leaves, so that no statistic depends
on the mesh, and draws from a key that depends on the seed, the MLP's name and the expert's index alone.
"""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from upcycle.errors import UserError, one_of

# The leaves of one MLP by their names within it: 'wi_0/kernel', 'Dense_1/bias'.
Group = Mapping[str, jax.Array]
# Logical names of F, the axis along which an MLP is a row of neurons, in a dense MLP and in an expert.
MLP_WIDTH = ('mlp', 'expert_mlp')


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of one expert: its shape, and the logical names of its axes."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def width_axis(self) -> int | None:
        """The axis of length F, or None: an output bias has none."""
        if len(self.axes) != len(self.shape):
            raise ValueError(f'a leaf of shape {self.shape} has no names for its axes, only {self.axes}')
        found = [i for i, name in enumerate(self.axes) if name in MLP_WIDTH]
        return found[0] if found else None


Leaves = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Operator:
    """How experts are made. Subclasses are registered in `EXPERT_OPERATORS`.

    Class attributes:
      name: in the registry, in receipts and in messages.
      identical: every expert is its dense MLP, leaf by leaf, so that nothing needs computing.
      leafwise: a leaf needs no company: the caller may hand over one at a time and never hold more.
    """

    name: ClassVar[str] = ''
    identical: ClassVar[bool] = False
    leafwise: ClassVar[bool] = False

    @property
    def reads(self) -> bool:
        """Whether experts have parents at all."""
        return True

    def make(self, parents: Sequence[Group], leaves: Leaves, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        """One expert. Pure, and traceable: it is compiled once for all experts of one shape.

        Args:
          parents: the MLPs that the expert is made of, their leaves whole.
          leaves: what is to be made.
          index: of the expert, a traced integer.
          key: of this expert alone.

        Returns:
          The expert's leaves, without an expert axis.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Name and options, as JSON."""
        return {'name': self.name, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        options = ', '.join(f'{name}={value}' for name, value in dataclasses.asdict(self).items())
        return f'{self.name}({options})' if options else self.name


@dataclasses.dataclass(frozen=True)
class Copy(Operator):
    """W_e = W for every expert: Sparse Upcycling (Komatsuzaki et al. 2023, section 2)."""

    name = 'copy'
    identical = True
    leafwise = True

    def make(self, parents: Sequence[Group], leaves: Leaves, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        (mlp,) = parents
        return dict(mlp)


@dataclasses.dataclass(frozen=True)
class Noise(Operator):
    """W_e = W + M * N(0, s^2), where M keeps each weight's noise with probability r.

    Komatsuzaki et al. 2023, section 5 (r = 1); Drop-Upcycling's baseline "random noise upcycling" (arXiv 2502.19261: r = 0.5,
    s = 0.02), whose released code draws whole neurons, in each matrix on their own, instead of single weights.

    Attributes:
      stddev: s [NOISE_STDDEV].
      fraction: r [NOISE_FRACTION].
    """

    name = 'noise'
    leafwise = True

    stddev: float = 0.02
    fraction: float = 1.0

    def __post_init__(self):
        check_fraction('NOISE_FRACTION', self.fraction)
        if not self.stddev >= 0:
            raise UserError(f'NOISE_STDDEV = {self.stddev!r} is a standard deviation: set it to at least 0.')

    def make(self, parents: Sequence[Group], leaves: Leaves, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        (mlp,) = parents
        made = {}
        for name, w in mlp.items():
            noise_key, where_key = jax.random.split(key_for(key, name))
            noise = self.stddev * jax.random.normal(noise_key, w.shape, jnp.float32)
            # uniform < 1 always holds, so a fraction of 1 means every weight.
            made[name] = w + jnp.where(jax.random.uniform(where_key, w.shape) < self.fraction, noise, 0.0)
        return made


class Initializer(enum.StrEnum):
    """How a model of its family starts its MLPs."""

    LECUN_NORMAL = 'lecun_normal'  # variance 1 / fan_in, truncated: T5X and Flax
    XAVIER_UNIFORM = 'xavier_uniform'  # variance 2 / (fan_in + fan_out): big_vision's ViT


@dataclasses.dataclass(frozen=True)
class Random(Operator):
    """Experts from scratch, everything else copied (Komatsuzaki et al. 2023, figures 7 and 13); the first few may be copies too.

    Attributes:
      initializer: of the kernels; biases start at 0 [RANDOM_INITIALIZER].
      copied: how many experts are copies of the dense MLP instead [RANDOM_COPIED].
    """

    name = 'random'
    leafwise = True

    initializer: Initializer = Initializer.LECUN_NORMAL
    copied: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'initializer', one_of(Initializer, self.initializer, 'RANDOM_INITIALIZER'))
        if not isinstance(self.copied, int) or self.copied < 0:
            raise UserError(f'RANDOM_COPIED = {self.copied!r} must be a number of experts, 0 or more.')

    @property
    def reads(self) -> bool:
        return self.copied > 0

    def make(self, parents: Sequence[Group], leaves: Leaves, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        draw = getattr(jax.nn.initializers, self.initializer)()
        made = {}
        for name, leaf in leaves.items():
            if len(leaf.shape) < 2:
                made[name] = jnp.zeros(leaf.shape, jnp.float32)
            else:
                made[name] = draw(key_for(key, name), leaf.shape, jnp.float32)
            if parents:
                made[name] = jnp.where(index < self.copied, parents[0][name], made[name])
        return made


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
      ratio: r; 0.5 is the paper's best [DROP_RATIO].
      indices: see `DropIndices` [DROP_INDICES].
    """

    name = 'drop'

    ratio: float = 0.5
    indices: DropIndices = DropIndices.SHARED

    def __post_init__(self):
        check_fraction('DROP_RATIO', self.ratio)
        object.__setattr__(self, 'indices', one_of(DropIndices, self.indices, 'DROP_INDICES'))

    def make(self, parents: Sequence[Group], leaves: Leaves, index: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        (mlp,) = parents
        return reinitialise(mlp, leaves, self.ratio, key, shared=self.indices is DropIndices.SHARED)


def reinitialise(mlp: Group, leaves: Leaves, ratio: float, key: jax.Array, *, shared: bool) -> dict[str, jax.Array]:
    """Draws floor(ratio * F) neurons anew, from the mean and deviation that their entries have.

    Args:
      mlp: leaves of one MLP.
      leaves: their axes.
      ratio: share of the neurons.
      key: of this expert.
      shared: the same neurons in every leaf, or others in each.
    """
    which_key, value_key = jax.random.split(key)
    made = {}
    for name, w in mlp.items():
        axis = leaves[name].width_axis
        if axis is None:
            made[name] = w
            continue
        width = w.shape[axis]
        order_F = jax.random.permutation(which_key if shared else key_for(which_key, name), width)
        # The small term keeps 0.3 * 10 at 3.
        dropped_F = order_F < int(ratio * width + 1e-6)
        dropped = jnp.expand_dims(dropped_F, [i for i in range(w.ndim) if i != axis])
        entries = jnp.maximum(dropped_F.sum() * (w.size // width), 1)
        mean = jnp.where(dropped, w, 0.0).sum() / entries
        stddev = jnp.sqrt(jnp.where(dropped, jnp.square(w - mean), 0.0).sum() / entries)
        drawn = mean + stddev * jax.random.normal(key_for(value_key, name), w.shape, jnp.float32)
        made[name] = jnp.where(dropped, drawn, w)
    return made


EXPERT_OPERATORS: dict[str, type[Operator]] = {kind.name: kind for kind in (Copy, Noise, Random, Drop)}


def key_for(key: jax.Array, name: str) -> jax.Array:
    """A key of its own for a name."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], 'little'))


def check_fraction(binding: str, value: float) -> None:
    """Raises UserError unless a binding lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f'{binding} = {value!r} must lie in [0, 1].')


def look_up(registry: Mapping[str, Any], name: str, binding: str) -> Any:
    """The registered entry, or a UserError that names the binding and what there is."""
    if name not in registry:
        raise UserError(f'{binding} = {name!r} is not one of {", ".join(registry)}.')
    return registry[name]
