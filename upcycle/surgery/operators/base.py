"""What an operator is."""

import dataclasses
import enum
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from upcycle.errors import UserError

# Logical names of F, the axis along which an MLP is a row of neurons, in a dense MLP and in an expert.
MLP_WIDTH = ('mlp', 'expert_mlp')
# For each expert, the indices of the MLPs that it is made of.
Lineage = tuple[tuple[int, ...], ...]


class Start(enum.StrEnum):
    """What an operator starts from."""

    DENSE = 'a dense checkpoint'
    SEVERAL = 'several dense checkpoints'
    MOE = 'a checkpoint with experts'


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter of all experts of a layer: its shape, E in front, and the logical names of its axes."""

    stacked_shape: tuple[int, ...]
    stacked_axes: tuple[str | None, ...]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.stacked_shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one expert's."""
        return self.stacked_shape[1:]

    @property
    def width_axis(self) -> int | None:
        """The axis of length F of one expert's, or None: an output bias has none."""
        if len(self.stacked_axes) != len(self.stacked_shape):
            raise ValueError(
                f'a leaf of shape {self.stacked_shape} has no names for its axes, only {self.stacked_axes}'
            )
        found = [i for i, name in enumerate(self.stacked_axes[1:]) if name in MLP_WIDTH]
        return found[0] if found else None

    @property
    def is_kernel(self) -> bool:
        """A matrix, and not a bias."""
        return len(self.shape) > 1

    @property
    def is_output(self) -> bool:
        """The matrix from F back to D."""
        return self.is_kernel and self.width_axis == 0


# The leaves of one MLP by their names within it: 'wi_0/kernel', 'Dense_1/bias'.
Leaves = Mapping[str, Leaf]


@dataclasses.dataclass(frozen=True)
class Operator:
    """How experts are made, leaf by leaf. Subclasses are registered in `EXPERT_OPERATORS`.

    Class attributes:
      name: in the registry, in receipts and in messages.
      starts_from: what kind of checkpoint.
      identical: every expert is its dense MLP, so that nothing needs computing.
      keeps_shape: an expert has the shapes of the MLPs that it is made of.
      reads: experts are made of something; otherwise their sources are dropped on purpose.
    """

    name: ClassVar[str] = ''
    starts_from: ClassVar[Start] = Start.DENSE
    identical: ClassVar[bool] = False
    keeps_shape: ClassVar[bool] = True

    @property
    def reads(self) -> bool:
        """Whether experts are made of MLPs at all."""
        return True

    def make(self, name: str, parents: Sequence[jax.Array], mlp: Leaves, index: jax.Array, key: jax.Array) -> jax.Array:
        """One leaf of one expert. Pure, and traceable: it is compiled once for all experts.

        Where leaves must agree, as about which neurons are new, each draws that anew from a key that does not depend on its name.

        Args:
          name: of the leaf within its MLP.
          parents: this leaf of the MLPs that the expert is made of, whole.
          mlp: all leaves that the experts have.
          index: of the expert, a traced integer.
          key: of the MLP; an expert's own is `fold_in(key, index)`.

        Returns:
          The leaf, without an expert axis.
        """
        raise NotImplementedError

    def check(self, num_experts: int, num_mlps: int) -> None:
        """Raises UserError where that many experts cannot be made out of that many MLPs."""

    def source_shape(self, leaf: Leaf) -> tuple[int, ...]:
        """Of what an expert's leaf is made of."""
        return leaf.shape

    def router_columns(self, num_experts: int) -> tuple[int, ...]:
        """For each expert, which of the router's drawn columns is its own; experts may share one."""
        return tuple(range(num_experts))

    @property
    def measured(self) -> tuple[str, ...]:
        """What `measure` looks at, of each MLP: 'params' or 'opt_state' (the second moments) or both, or nothing."""
        return ()

    def measure(self, name: str, stacked: np.ndarray, size: int) -> np.ndarray:
        """A statistic of the MLPs, to be added up over their leaves.

        Args:
          name: of the leaf, `params/...` or `opt_state/...`.
          stacked: the leaf of all MLPs, (E, ...).
          size: numbers in the parameter of one MLP that the leaf is, or is the state of.
        """
        raise NotImplementedError

    def lineage(self, num_experts: int, num_mlps: int, measured: np.ndarray | None) -> Lineage:
        """The MLPs that each expert is made of.

        Args:
          num_experts: E.
          num_mlps: how many there are: 1, the number of checkpoints, or the experts of the checkpoint.
          measured: the sum of `measure` over the leaves.
        """
        return ((0,) if self.reads else (),) * num_experts

    def __str__(self) -> str:
        return describe_options(self.name, self)


def describe_options(name: str, operator: Any) -> str:
    """'drop(ratio=0.5, indices=shared)'."""
    options = ', '.join(f'{option}={value}' for option, value in dataclasses.asdict(operator).items())
    return f'{name}({options})' if options else name


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
