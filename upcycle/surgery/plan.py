"""The plan of a surgery: where every leaf of the sparse model comes from, found from names and shapes alone."""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from upcycle.errors import UserError, one_of
from upcycle.surgery.operators import EXPERT_OPERATORS, Leaf, Operator, look_up
from upcycle.surgery.router_init import ROUTER_INITS

Abstract = Mapping[str, jax.ShapeDtypeStruct]
Axes = Mapping[str, tuple[str | None, ...]]
EXPERT, ROUTER = 'expert', 'router'
POSITIONS = 'pos_embedding'
COUNT = 'opt_state/count'


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
      router_init: a name in `surgery.router_init.ROUTER_INITS` [ROUTER_INIT].
      router_stddev: of the routers' initialisation [ROUTER_INIT_STDDEV].
      optimizer_state: see `OptimizerState` [OPTIMIZER_STATE].
      new_head: the model's head starts afresh, for other classes, and the checkpoint's is dropped [NEW_HEAD].
      seed: of everything random in the surgery [UPCYCLE_SEED].
    """

    operator: Operator | str | None = 'copy'
    router_init: str = 'normal'
    router_stddev: float = 0.02
    optimizer_state: OptimizerState = OptimizerState.FRESH
    new_head: bool = False
    seed: int = 0

    def __post_init__(self):
        if isinstance(self.operator, str):
            object.__setattr__(self, 'operator', look_up(EXPERT_OPERATORS, self.operator, 'EXPERT_OPERATOR')())
        look_up(ROUTER_INITS, self.router_init, 'ROUTER_INIT')
        object.__setattr__(self, 'optimizer_state', one_of(OptimizerState, self.optimizer_state, 'OPTIMIZER_STATE'))
        if self.new_head and self.operator is not None:
            raise UserError(
                'NEW_HEAD = True with an EXPERT_OPERATOR would upcycle a model whose function is already gone: upcycle first, '
                'then fine-tune.'
            )


class Action(enum.StrEnum):
    """How a leaf of the target is made."""

    KEEP = 'keep'  # the source, unchanged
    EXPERTS = 'experts'  # by the expert operator
    ROUTER = 'router'  # by the router's initialisation
    RESIZE = 'resize'  # learned positions of an image, interpolated to another number of patches
    TILE = 'tile'  # the source, repeated over a leading expert axis
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
        """Of a leaf of experts, what one of them is."""
        return Leaf(self.shape[1:], self.axes[1:])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A row for every leaf of the target, and the dense leaves that are dropped on purpose, with the reason."""

    rows: tuple[Row, ...]
    dropped: Mapping[str, str]
    spec: Surgery

    def groups(self) -> Iterator[tuple[Row, ...]]:
        """Rows in the order of execution: the experts of one MLP together, every other leaf alone."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            name = mlp_of(row.target) if row.action is Action.EXPERTS else row.target
            groups.setdefault(name, []).append(row)
        yield from (tuple(rows) for rows in groups.values())


def mlp_of(target: str) -> str:
    """Path of the MLP that an expert leaf belongs to: 'params/encoder/layers_1/mlp'."""
    segments = target.split('/')
    return '/'.join(segments[: segments.index(EXPERT)])


def within_mlp(target: str) -> str:
    """Name of an expert leaf within its MLP: 'wi_0/kernel'."""
    segments = target.split('/')
    return '/'.join(segments[segments.index(EXPERT) + 1 :])


def plan(
    dense: Abstract, sparse: Abstract, spec: Surgery, axes: Axes | None = None, *, head: Sequence[str] = ()
) -> Plan:
    """Finds every target leaf's source.

    Args:
      dense: leaves of the checkpoint, from its metadata.
      sparse: leaves of the model that will be trained.
      spec: what to do.
      axes: logical axes of the target's parameters, which operators that work along an axis need.
      head: paths of the parameters that `spec.new_head` starts afresh.

    Returns:
      The plan; it reads nothing.

    Raises:
      UserError: a leaf has no source, two, or one of another shape, or a dense leaf would be lost; the message holds the
        whole difference.
    """
    expands = spec.operator is not None
    keeps_state = spec.optimizer_state is OptimizerState.TILE
    rows: list[Row] = []
    dropped: dict[str, str] = {}
    problems: list[str] = []

    def in_head(name: str) -> bool:
        path = name.removeprefix('params/').removeprefix('opt_state/param_states/')
        return spec.new_head and path != name and any(path.startswith(f'{part}/') for part in head)

    def add(target: str, action: Action, *sources: str) -> None:
        if action is Action.EXPERTS and not spec.operator.reads:
            dropped.update(
                dict.fromkeys(sources, f'EXPERT_OPERATOR = {spec.operator.name!r} starts experts from scratch')
            )
            sources = ()
        leaf = sparse[target]
        rows.append(Row(target, sources, action, tuple(leaf.shape), leaf.dtype, (axes or {}).get(target, ())))

    for target in sparse:
        is_router = expands and ROUTER in target.split('/')
        if target == 'rng':
            add(target, Action.NEW)
        elif target == COUNT and spec.optimizer_state is not OptimizerState.FRESH_CLOCK:
            # The decay clock goes on with the step, also where the state itself starts afresh.
            add(target, Action.KEEP, COUNT if keeps_state and COUNT in dense else 'step')
        elif target.startswith('opt_state/') and (is_router or in_head(target) or not keeps_state):
            add(target, Action.ZEROS)
        elif in_head(target):
            add(target, Action.NEW)
        elif is_router:
            add(target, Action.ROUTER)
        elif isinstance(found := _source(target, sparse[target], dense, expands), str):
            problems.append(found)
        else:
            add(target, *found)

    used = {source for row in rows for source in row.sources}
    for source, leaf in dense.items():
        if source in used or source in dropped or source in ('step', COUNT):
            continue
        if in_head(source):
            dropped[source] = 'NEW_HEAD = True'
        elif source == 'rng':
            dropped[source] = 'the run has a random key of its own'
        elif source.startswith('opt_state/') and not keeps_state:
            dropped[source] = f"OPTIMIZER_STATE = '{spec.optimizer_state}'"
        else:
            problems.append(f'{source} {_show(leaf)} of the checkpoint is used by no leaf of the model')
    if problems:
        raise UserError(_explain(problems, dense, head))
    return Plan(tuple(rows), dropped, spec)


def _source(target: str, leaf: jax.ShapeDtypeStruct, dense: Abstract, expands: bool) -> tuple[Action, str] | str:
    """The action and source of a leaf that must come from the checkpoint, or what is wrong."""
    candidates = [target]
    if expands and EXPERT in target.split('/'):
        candidates.append('/'.join(segment for segment in target.split('/') if segment != EXPERT))
    found = [name for name in candidates if name in dense]
    if not found:
        return f'{target} {_show(leaf)} has no source: the checkpoint holds no {candidates[-1]}'
    if len(found) > 1:
        return f'{target} has two sources: {" and ".join(found)}'
    (source,) = found
    is_new_expert = source != target
    want = tuple(leaf.shape[1:]) if is_new_expert else tuple(leaf.shape)
    if _resizable(target, dense[source].shape, want):
        return Action.RESIZE, source
    if tuple(dense[source].shape) != want:
        return f'{target} {_show(leaf)} needs a source of shape {want}, but {source} is {_show(dense[source])}'
    if not is_new_expert:
        return Action.KEEP, source
    return Action.TILE if target.startswith('opt_state/') else Action.EXPERTS, source


def _resizable(target: str, old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    """Positions (1, L, D) of two square images of different size; their optimizer state is not."""
    if not target.startswith('params/') or target.split('/')[-1] != POSITIONS or len(old) != 3 or len(new) != 3:
        return False
    squares = all(math.isqrt(shape[1]) ** 2 == shape[1] for shape in (old, new))
    return squares and old[1] != new[1] and (old[0], old[2]) == (new[0], new[2])


def _show(leaf: jax.ShapeDtypeStruct) -> str:
    return f'({", ".join(map(str, leaf.shape))}) {leaf.dtype}'


def _explain(problems: list[str], dense: Abstract, head: Sequence[str]) -> str:
    if not any(name.startswith('opt_state/') for name in dense) and all(p.startswith('opt_state/') for p in problems):
        return (
            "OPTIMIZER_STATE = 'tile' needs the dense run's optimizer state, which this checkpoint does not hold: set "
            "OPTIMIZER_STATE = 'fresh'."
        )
    what = 'The checkpoint does not fit the model: it is of another architecture, or the sizes in the gin files differ'
    if all(any(f'/{part}/' in problem for part in head) for problem in problems):
        what = (
            'The head of the checkpoint is not that of the model: to fine-tune on other classes, start a new one with '
            'NEW_HEAD = True in runs/finetune.gin'
        )
    return '\n  '.join([f'{what} ({len(problems)} leaves):', *problems])
