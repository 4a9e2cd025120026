"""The operator interface."""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from upcycle.errors import UserError

# Logical names of F, the axis of an MLP's neurons, in a dense MLP and in an expert.
MLP_WIDTH = ('mlp', 'expert_mlp')
# Per expert, the indices of its parent MLPs.
Lineage = tuple[tuple[int, ...], ...]


class Start(enum.StrEnum):
    """The kind of checkpoint that an operator starts from."""

    DENSE = 'a dense checkpoint'
    SEVERAL = 'several dense checkpoints'
    MOE = 'a checkpoint with experts'


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of all experts of a layer: its shape, with E first, and the logical names of its axes."""

    stacked_shape: tuple[int, ...]
    stacked_axes: tuple[str | None, ...]

    @property
    def num_experts(self) -> int:
        """Number of experts E."""
        return self.stacked_shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one expert's leaf."""
        return self.stacked_shape[1:]

    @property
    def width_axis(self) -> int | None:
        """The axis of length F in one expert's leaf; None for an output bias."""
        if len(self.stacked_axes) != len(self.stacked_shape):
            raise ValueError(
                f'a leaf of shape {self.stacked_shape} has the axis names {self.stacked_axes}: expected one per axis'
            )
        return next((i for i, name in enumerate(self.stacked_axes[1:]) if name in MLP_WIDTH), None)

    @property
    def is_kernel(self) -> bool:
        """True for a matrix, False for a bias."""
        return len(self.shape) > 1

    @property
    def is_output(self) -> bool:
        """True for the matrix from F to D."""
        return self.is_kernel and self.width_axis == 0


# The leaves of one MLP by their names within it: 'wi_0/kernel', 'Dense_1/bias'.
Leaves = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Operator:
    """Makes experts, leaf by leaf. Subclasses are registered in `EXPERT_OPERATORS`.

    Class attributes:
      name: name in the registry, in receipts and in messages.
      starts_from: kind of checkpoint.
      identical: every expert equals its dense MLP, so that nothing is computed.
      keeps_shape: an expert has the shapes of its parents.
    """

    name: ClassVar[str] = ''
    starts_from: ClassVar[Start] = Start.DENSE
    identical: ClassVar[bool] = False
    keeps_shape: ClassVar[bool] = True

    @property
    def averages(self) -> bool:
        """Whether parameters outside MLPs are means over several checkpoints; False: those of the first."""
        return True

    @property
    def reads(self) -> bool:
        """True if experts have parents; otherwise their sources are dropped on purpose."""
        return True

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        """Makes one leaf of one expert; by default a copy of its only parent.

        Pure and traceable: it is compiled once for all experts. Where leaves must agree, such as on which neurons are new, each
        leaf draws the same numbers from a key that does not depend on its name.

        Args:
          name: name of the leaf within its MLP.
          parents: this leaf of the expert's parents, whole.
          mlp: all leaves of the experts.
          index: index of the expert, a traced integer.
          key: key of the MLP; the key of an expert is `fold_in(key, index)`.

        Returns:
          The leaf, without an expert axis.
        """
        (w,) = parents
        return w

    def check(self, num_experts: int, num_mlps: int) -> None:
        """Raises UserError unless `num_experts` experts can be made from `num_mlps` MLPs."""

    def source_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Shape of the source of an expert's leaf."""
        return leaf.shape

    def router_columns(self, num_experts: int) -> tuple[int, ...]:
        """Per expert, the index of its column among the drawn router columns; experts may share a column."""
        return tuple(range(num_experts))

    @property
    def measured(self) -> tuple[str, ...]:
        """What `measure` needs of each MLP: any of 'params' and 'opt_state' (the second moments)."""
        return ()

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """Computes a statistic of the MLPs, which is summed over their leaves.

        Args:
          name: name of the leaf, `params/...` or `opt_state/...`.
          stacked: the leaf of all MLPs, (E, ...).
          size: number of elements of the parameter in one MLP, or of the parameter that the state belongs to.
        """
        raise NotImplementedError

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        """Returns the parents of each expert.

        Args:
          num_experts: E.
          num_mlps: number of MLPs: 1, the number of checkpoints, or the number of experts in the checkpoint.
          measured: the sum of `measure` over the leaves.
        """
        return ((0,) if self.reads else (),) * num_experts

    def __str__(self) -> str:
        return describe_options(self.name, self)


def describe_options(name: str, operator: Any) -> str:
    """Formats an operator as 'drop(ratio=0.5, indices=shared)'."""
    options = ', '.join(f'{option}={value}' for option, value in dataclasses.asdict(operator).items())
    return f'{name}({options})' if options else name


def key_for(key: jax.Array, name: str) -> jax.Array:
    """Folds a name into a key."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], 'little'))


def check_fraction(binding: str, value: float) -> None:
    """Raises UserError unless a binding is in [0, 1]."""
    if not 0 <= value <= 1:
        raise UserError(f'{binding} = {value!r} must be in [0, 1].')


def look_up(registry: Mapping[str, Any], name: str, binding: str) -> Any:
    """Returns the registered entry, or raises a UserError that names the binding and the valid names."""
    if name not in registry:
        raise UserError(f'{binding} = {name!r} is not one of {", ".join(registry)}.')
    return registry[name]
