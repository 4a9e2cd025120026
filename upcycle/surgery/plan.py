"""The specification of a surgery and its plan: the source of every target leaf."""

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from upcycle import schema
from upcycle.errors import UserError
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
SHARED_GATE = 'shared_gate'
COUNT = 'opt_state/count'
PARAMS, STATES = 'params/', 'opt_state/param_states/'
# Second moments whose mean over all entries equals the mean of the parameter's squared gradients.
MOMENTS = ('v', 'v_row')


class OptimizerState(enum.StrEnum):
    """How the dense run's optimizer state is used."""

    FRESH = 'fresh'  # zeros, the step clock continues: the paper's language recipe, as in t5x
    FRESH_CLOCK = 'fresh_clock'  # zeros, and the decay clock restarts
    TILE = 'tile'  # repeated over the experts, fresh for routers: the paper's vision recipe


_MACROS = {
    'operator': 'EXPERT_OPERATOR',
    'router_stddev': 'ROUTER_INIT_STDDEV',
    'seed': 'UPCYCLE_SEED',
}


@dataclasses.dataclass(frozen=True)
class Surgery:
    """How a run converts its initial checkpoint. Gin macros in brackets.

    Attributes:
      operator: operator that makes the experts, or its name for default options, see `surgery.operators.EXPERT_OPERATORS`
        [EXPERT_OPERATOR]; None: no MLP is expanded.
      dense_operator: operator that makes the leaves of a dense model, or its name, see `surgery.operators.DENSE_OPERATORS`
        [DENSE_OPERATOR]; None: leaves are kept.
      router_init: see `surgery.router_init.RouterInit` [ROUTER_INIT].
      router_prompts: for ROUTER_INIT = 'hidden', a file for each expert, with a prompt on each line [ROUTER_PROMPTS]; () for the
        first batch instead.
      router_stddev: standard deviation of the router initialisation [ROUTER_INIT_STDDEV].
      router_noise: noise on the router columns that new experts copy, relative to the router's standard deviation
        [ROUTER_NOISE].
      optimizer_state: see `OptimizerState` [OPTIMIZER_STATE].
      new_head: reinitialise the model's head, for other classes, and drop the checkpoint's [NEW_HEAD].
      seed: random seed of the surgery [UPCYCLE_SEED].
    """

    operator: Operator | str | None = 'copy'
    dense_operator: DenseOperator | str | None = None
    router_init: RouterInit = RouterInit.NORMAL
    router_prompts: Sequence[str] = ()
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
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        schema.validate(self, _MACROS)
        if self.operator is not None and self.dense_operator is not None:
            raise UserError(
                'EXPERT_OPERATOR and DENSE_OPERATOR are both set: the first makes experts, the second a dense model; set one to '
                'None.'
            )
        if self.router_prompts and self.router_init is not RouterInit.HIDDEN:
            raise UserError(
                f"ROUTER_PROMPTS is read by ROUTER_INIT = 'hidden', not '{self.router_init}': set that, or remove it."
            )
        if self.new_head and self.operator is not None:
            raise UserError(
                'NEW_HEAD = True with an EXPERT_OPERATOR would upcycle a model without a trained head: upcycle first, then '
                'fine-tune.'
            )
        made_by = self.made_by
        if self.optimizer_state is OptimizerState.TILE and made_by is not None and not made_by.keeps_shape:
            raise UserError(
                f"OPTIMIZER_STATE = 'tile' needs parameters with the checkpoint's shapes, and {made_by.name!r} changes them: set "
                "OPTIMIZER_STATE = 'fresh'."
            )

    @property
    def made_by(self) -> Operator | DenseOperator | None:
        """The operator, if any."""
        return self.operator if self.dense_operator is None else self.dense_operator


class Action(enum.StrEnum):
    """How a target leaf is made."""

    KEEP = 'keep'  # the source, unchanged
    MEAN = 'mean'  # the mean of the sources; the maximum of integers, such as the step
    EXPERTS = 'experts'  # by the expert operator
    REMAKE = 'remake'  # by the dense operator
    ROUTER = 'router'  # by the router initialisation, which may use the checkpoint's router
    RESIZE = 'resize'  # learned positions on a square grid, interpolated to another grid size
    TILE = 'tile'  # the source repeated over a leading expert axis, or each expert's mean of its parents
    ZEROS = 'zeros'
    NEW = 'new'  # by the trainer: the run's random key and a new head


@dataclasses.dataclass(frozen=True)
class Row:
    """One target leaf. `axes` are its logical axes, () if not needed."""

    target: str
    sources: tuple[str, ...]
    action: Action
    shape: tuple[int, ...]
    dtype: Any
    axes: tuple[str | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a surgery.

    Attributes:
      rows: one row per target leaf.
      dropped: checkpoint leaves that are dropped on purpose, with the reason.
      spec: the specification.
      num_mlps: number of source MLPs per MoE layer: 1, the number of checkpoints, or the experts of the checkpoint.
      measured: by path of the MLP, the leaves that the operator measures and the size of their parameter.
    """

    rows: tuple[Row, ...]
    dropped: Mapping[str, str]
    spec: Surgery
    num_mlps: int = 1
    measured: Mapping[str, tuple[tuple[str, int], ...]] = dataclasses.field(default_factory=dict)

    def in_order(self) -> list[Row]:
        """The rows in execution order: routers last, because hidden states need all other leaves."""
        return sorted(self.rows, key=lambda row: row.action is Action.ROUTER)

    def alike(self, row: Row) -> bool:
        """True if all experts of a row with action EXPERTS or TILE are equal."""
        operator = self.spec.operator
        return operator.identical if row.action is Action.EXPERTS else operator.starts_from is Start.DENSE

    @functools.cached_property
    def mlps(self) -> Mapping[str, Leaves]:
        """The experts' parameters by the path of their MLP and their name within it."""
        mlps: dict[str, dict[str, Leaf]] = {}
        for row in self.rows:
            if row.action is Action.EXPERTS:
                mlps.setdefault(mlp_of(row.target), {})[within_mlp(row.target)] = Leaf(row.shape, row.axes)
        return mlps


def is_clock(name: str) -> bool:
    """True if a leaf counts optimizer steps: `opt_state/count`, or one of several counters below that name."""
    return name == COUNT or name.startswith(f'{COUNT}/')


def mlp_of(target: str) -> str:
    """Path of the MLP of a leaf of an MoE layer or of its optimizer state, such as 'params/layers_1/mlp'."""
    segments = (PARAMS + target.removeprefix(STATES).removeprefix(PARAMS)).split('/')
    return '/'.join(segments[: next(i for i, segment in enumerate(segments) if segment in (EXPERT, ROUTER, SHARED))])


def within_mlp(target: str) -> str:
    """Name of an expert leaf within its MLP, such as 'wi_0/kernel'."""
    segments = target.split('/')
    return '/'.join(segments[segments.index(EXPERT) + 1 :])
