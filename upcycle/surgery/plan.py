"""What a surgery is asked to do, and its plan: where every leaf of the target comes from."""

import dataclasses
import enum
import functools
from collections.abc import Mapping
from typing import Any

import jax

from upcycle.errors import UserError, one_of
from upcycle.schema import Natural, Whole
from upcycle.surgery.operators import (
    DENSE_OPERATORS,
    EXPERT_OPERATORS,
    DenseOperator,
    Leaf,
    Leaves,
    Operator,
    Start,
    look_up,
)
from upcycle.surgery.router_init import RouterInit

Abstract = Mapping[str, jax.ShapeDtypeStruct]
Axes = Mapping[str, tuple[str | None, ...]]
EXPERT, ROUTER, SHARED, ROUTER_STATE, MIXING = 'expert', 'router', 'shared', 'router_state', 'mixing'
COUNT = 'opt_state/count'
PARAMS, STATES = 'params/', 'opt_state/param_states/'
# Second moments, of which the mean over all entries is that of the parameter's squared gradients.
MOMENTS = ('v', 'v_row')


class OptimizerState(enum.StrEnum):
    """What becomes of the dense run's optimizer state."""

    FRESH = 'fresh'  # zeros, the step clock goes on: the paper's language recipe, and what t5x does
    FRESH_CLOCK = 'fresh_clock'  # zeros, and the decay clock starts anew
    TILE = 'tile'  # repeated over the experts, fresh for routers: the paper's vision recipe


@dataclasses.dataclass(frozen=True)
class Surgery:
    """What becomes of a checkpoint at the start of a run. Gin macros in brackets.

    Attributes:
      operator: how experts are made: an operator, or the name of one with its default options, see
        `surgery.operators.EXPERT_OPERATORS` [EXPERT_OPERATOR]; None: no MLP is expanded, the model goes on as it is.
      dense_operator: how the leaves of a dense model are made: an operator, or the name of one, see
        `surgery.operators.DENSE_OPERATORS` [DENSE_OPERATOR]; None: they are kept.
      router_init: see `surgery.router_init.RouterInit` [ROUTER_INIT].
      router_stddev: of the routers' initialisation [ROUTER_INIT_STDDEV].
      router_noise: on the columns that new experts copy, as a share of the router's own deviation [ROUTER_NOISE].
      optimizer_state: see `OptimizerState` [OPTIMIZER_STATE].
      new_head: the model's head starts afresh, for other classes, and the checkpoint's is dropped [NEW_HEAD].
      seed: seed of everything random in the surgery [UPCYCLE_SEED].
    """

    operator: Operator | str | None = 'copy'
    dense_operator: DenseOperator | str | None = None
    router_init: RouterInit = RouterInit.NORMAL
    router_stddev: Natural = 0.02
    router_noise: Natural = 0.01
    optimizer_state: OptimizerState = OptimizerState.FRESH
    new_head: bool = False
    seed: Whole = 0

    def __post_init__(self):
        if isinstance(self.operator, str):
            object.__setattr__(self, 'operator', look_up(EXPERT_OPERATORS, self.operator, 'EXPERT_OPERATOR')())
        if isinstance(self.dense_operator, str):
            object.__setattr__(
                self, 'dense_operator', look_up(DENSE_OPERATORS, self.dense_operator, 'DENSE_OPERATOR')()
            )
        if self.operator is not None and self.dense_operator is not None:
            raise UserError(
                'EXPERT_OPERATOR and DENSE_OPERATOR are both set: the one makes experts, the other a dense model.'
            )
        object.__setattr__(self, 'router_init', one_of(RouterInit, self.router_init, 'ROUTER_INIT'))
        object.__setattr__(self, 'optimizer_state', one_of(OptimizerState, self.optimizer_state, 'OPTIMIZER_STATE'))
        if self.new_head and self.operator is not None:
            raise UserError(
                'NEW_HEAD = True with an EXPERT_OPERATOR would upcycle a model whose function is already gone: upcycle first, '
                'then fine-tune.'
            )
        made_by = self.made_by
        if self.optimizer_state is OptimizerState.TILE and made_by is not None and not made_by.keeps_shape:
            raise UserError(
                f"OPTIMIZER_STATE = 'tile' needs parameters of the shapes that the checkpoint has, and {made_by.name!r} changes "
                "them: set OPTIMIZER_STATE = 'fresh'."
            )

    @property
    def made_by(self) -> Operator | DenseOperator | None:
        """The operator, if any."""
        return self.operator if self.dense_operator is None else self.dense_operator


class Action(enum.StrEnum):
    """How a leaf of the target is made."""

    KEEP = 'keep'  # the source, unchanged
    MEAN = 'mean'  # of the sources; of whole numbers, such as the step, the largest
    EXPERTS = 'experts'  # by the expert operator
    REMAKE = 'remake'  # by the dense operator
    ROUTER = 'router'  # by the router's initialisation, perhaps out of the checkpoint's router
    RESIZE = 'resize'  # learned positions on a square grid, interpolated to a grid of another size
    TILE = 'tile'  # the source, repeated over a leading expert axis; of several parents, each expert's own
    ZEROS = 'zeros'
    NEW = 'new'  # by the trainer: the run's own random key, and a new head


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of the target. `axes` are its logical axes, () where nobody needs them."""

    target: str
    sources: tuple[str, ...]
    action: Action
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] = ()

    @property
    def expert_leaf(self) -> Leaf:
        """Of a leaf of experts, what an operator needs to know."""
        return Leaf(self.shape, self.axes)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
      rows: one for every leaf of the target.
      dropped: the leaves of the checkpoint that are not used on purpose, with the reason.
      spec: what was asked for.
      num_mlps: how many MLPs stand where one layer's experts will: 1, one in each checkpoint, or the experts that there are.
      measured: for each MLP by its path, what the operator measures: the leaves, and the size of a parameter.
    """

    rows: tuple[Row, ...]
    dropped: Mapping[str, str]
    spec: Surgery
    num_mlps: int = 1
    measured: Mapping[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)

    def in_order(self) -> list[Row]:
        """The rows as they are carried out: routers last, since hidden states need everything else."""
        return sorted(self.rows, key=lambda row: row.action is Action.ROUTER)

    def alike(self, row: Row) -> bool:
        """Whether all experts of a row, whose action is EXPERTS or TILE, are the same."""
        operator = self.spec.operator
        return operator.identical if row.action is Action.EXPERTS else operator.starts_from is Start.DENSE

    @functools.cached_property
    def mlps(self) -> Mapping[str, Leaves]:
        """The experts' parameters by the path of their MLP and their names within it."""
        found: dict[str, dict[str, Leaf]] = {}
        for row in self.rows:
            if row.action is Action.EXPERTS:
                found.setdefault(mlp_of(row.target), {})[within_mlp(row.target)] = row.expert_leaf
        return found


def is_clock(name: str) -> bool:
    """Whether a leaf counts the optimizer's steps: `opt_state/count`, or one of several counters below that name."""
    return name == COUNT or name.startswith(f'{COUNT}/')


def mlp_of(target: str) -> str:
    """Path of the MLP that a leaf of an MoE layer, or of its optimizer state, belongs to: such as 'params/layers_1/mlp'."""
    segments = (PARAMS + target.removeprefix(STATES).removeprefix(PARAMS)).split('/')
    return '/'.join(segments[: next(i for i, segment in enumerate(segments) if segment in (EXPERT, ROUTER, SHARED))])


def within_mlp(target: str) -> str:
    """Name of an expert leaf within its MLP: 'wi_0/kernel'."""
    segments = target.split('/')
    return '/'.join(segments[segments.index(EXPERT) + 1 :])
