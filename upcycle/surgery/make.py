"""Makes the leaves of a plan on one device, one leaf or one expert at a time."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import casts, leaf_names
from upcycle.errors import UserError
from upcycle.surgery.operators import DenseOperator, Leaf, Lineage, Operator, Start, key_for
from upcycle.surgery.plan import Action, Plan, Row, mlp_of, within_mlp
from upcycle.surgery.positions import resize_positions
from upcycle.surgery.router_init import DRAWN, INHERITED, RouterInit, clusters, inherited, of_means

Read = Callable[[str, jax.sharding.Sharding | None], jax.Array | np.ndarray]
OnSource = Callable[[str, jax.Array | np.ndarray], None]
# (path of an MLP) -> its inputs on the host: hidden states (N, D) of real tokens, or with ROUTER_PROMPTS means (E, D) of prompts.
Hidden = Callable[[str], np.ndarray]

NEEDS_DATA = (
    "ROUTER_INIT = 'hidden' needs hidden states, which `upcycle train` computes on a batch, and with ROUTER_PROMPTS `upcycle "
    'convert` too: use one of them, or another ROUTER_INIT.'
)


class Maker:
    """Makes the leaves of a plan on one device, one leaf or one expert at a time.

    It runs the same program everywhere, so that a leaf has the same bytes on any mesh, online and offline.

    Args:
      plan: the plan.
      read: reads one source leaf.
      new: leaves whose action is NEW.
      on_source: called with every leaf that is read.
      hidden: hidden states for ROUTER_INIT = 'hidden'.
      key: random key; None: from the surgery's seed.

    Attributes:
      lineages: the lineage of each MLP made so far.
    """

    def __init__(
        self,
        plan: Plan,
        read: Read,
        *,
        new: Mapping[str, jax.Array],
        on_source: OnSource = lambda name, leaf: None,
        hidden: Hidden | None = None,
        key: jax.Array | None = None,
    ):
        self.plan, self.new, self.hidden = plan, new, hidden
        self._key = jax.random.key(plan.spec.seed) if key is None else key
        self._read, self._on_source = read, on_source
        self._held: dict[str, jax.Array | np.ndarray] = {}
        self.lineages: dict[str, Lineage] = {}

    def source(self, name: str, sharding: jax.sharding.Sharding | None = None) -> jax.Array | np.ndarray:
        """Reads a source leaf."""
        leaf = self._read(name, sharding)
        self._on_source(name, leaf)
        return leaf

    def expert(self, row: Row, index: int) -> jax.Array | np.ndarray:
        """Makes one expert's part of a leaf whose action is EXPERTS or TILE, without the expert axis.

        The sources of the latest row are cached, so make all experts of a row before the next row.
        """
        parent_indices = self.lineage(row)[index]
        if row.action is Action.TILE and self.plan.alike(row):
            parent_indices = (0,)  # the dense MLP's state, even for a randomly initialised expert
        parents = [self._parent(row, i) for i in parent_indices]
        if row.action is Action.TILE or self.plan.spec.operator.identical:
            return mean(row, len(parents), parents)
        mlp, name = mlp_of(row.target), within_mlp(row.target)
        make = _compiled(self.plan.spec.operator, name, tuple(self.plan.mlps[mlp].items()), jnp.dtype(row.dtype))
        return casts.cast(row.target, make(parents, index, key_for(self._key, mlp)), row.dtype)

    def pieces(self, row: Row) -> Iterator[tuple[int | None, jax.Array | np.ndarray]]:
        """Makes a leaf in pieces, for callers that cannot hold a whole stack of experts.

        Yields:
          (index of an expert, its part), or (None, the whole leaf) if it has no expert axis.
        """
        if row.action not in (Action.EXPERTS, Action.TILE):
            yield None, self.leaf(row)
        elif self.plan.alike(row):
            yield from enumerate([self.expert(row, 0)] * row.shape[0])
        else:
            yield from ((index, self.expert(row, index)) for index in range(row.shape[0]))

    def leaf(self, row: Row) -> jax.Array | np.ndarray:
        """Makes a leaf without an expert axis."""
        match row.action:
            case Action.KEEP | Action.MEAN:
                return mean(row, len(row.sources), map(self.source, row.sources))
            case Action.RESIZE:
                return resize_positions(mean(row, len(row.sources), map(self.source, row.sources)), row.shape[1])
            case Action.ZEROS:
                return jnp.zeros(row.shape, row.dtype)
            case Action.NEW:
                return self.new[row.target]
            case Action.REMAKE:
                operator = self.plan.spec.dense_operator
                make = _compiled_whole(operator, row.shape, row.axes, leaf_names.pattern(row.target))
                made = make([self.source(name) for name in row.sources], key_for(self._key, row.target))
                return casts.cast(row.target, made, row.dtype)
            case Action.ROUTER:
                return self._router(row)
        raise ValueError(f'{row.target} has an expert axis')

    def _router(self, row: Row) -> jax.Array:
        if not row.shape:  # the scale of Soft MoE's cosine similarities
            return jnp.ones((), row.dtype)
        spec, key, lineage = self.plan.spec, key_for(self._key, row.target), self.lineage(row)
        if len(row.shape) == 1:
            return self._router_bias(row, lineage, key)
        # Soft MoE has several adjacent columns per expert, one per slot.
        slots = row.shape[1] // len(lineage)
        columns = [slots * e + c for e in spec.operator.router_columns(len(lineage)) for c in range(slots)]
        lineage = tuple(tuple(slots * i + c for i in parents) for parents in lineage for c in range(slots))
        shape = (row.shape[0], 1 + max(columns))
        if spec.router_init in INHERITED:
            old = jnp.asarray(self.source(row.sources[0]), jnp.float32)
            kernel = inherited(
                old, lineage, spec.router_init, stddev=spec.router_stddev, noise=spec.router_noise, key=key
            )
        elif spec.router_init is RouterInit.HIDDEN:
            if self.hidden is None:
                raise UserError(NEEDS_DATA)
            states_NxD = jnp.asarray(self.hidden(mlp_of(row.target)))
            if spec.router_prompts:
                kernel = of_means(states_NxD, spec.router_stddev)
            else:
                kernel = clusters(states_NxD, shape[1], spec.router_stddev, key)
        else:
            kernel = DRAWN[spec.router_init](shape, spec.router_stddev, key)
        return casts.cast(row.target, kernel[:, jnp.asarray(columns)], row.dtype)

    def _router_bias(self, row: Row, lineage: Lineage, key: jax.Array) -> jax.Array:
        """Makes a router's bias (E,): 0, or inherited as the columns are, with new experts of 'extended' at 0."""
        spec = self.plan.spec
        if spec.router_init not in INHERITED:
            return jnp.zeros(row.shape, row.dtype)
        old = jnp.asarray(self.source(row.sources[0]), jnp.float32)[None]
        bias = inherited(old, lineage, spec.router_init, stddev=0.0, noise=spec.router_noise, key=key)
        return casts.cast(row.target, bias[0], row.dtype)

    def lineage(self, row: Row) -> Lineage:
        """Returns the parents of each expert of a row."""
        plan, mlp = self.plan, mlp_of(row.target)
        if mlp not in self.lineages:
            num_experts = next(iter(plan.mlps[mlp].values())).num_experts
            measured = None
            for name, size in plan.measured.get(mlp, ()):
                statistic = plan.spec.operator.measure(name, np.asarray(self._read(name, None)), size)
                measured = statistic if measured is None else measured + statistic
            self.lineages[mlp] = plan.spec.operator.lineage(num_experts, plan.num_mlps, measured)
        return self.lineages[mlp]

    def _parent(self, row: Row, index: int) -> jax.Array | np.ndarray:
        """Returns the source leaf of one parent MLP."""
        start = self.plan.spec.operator.starts_from
        name = row.sources[index if start is Start.SEVERAL else 0]
        if name not in self._held:
            self._held = {held: leaf for held, leaf in self._held.items() if held in row.sources}
            leaf = self.source(name)
            # A leaf that every expert is computed from is put on the device once.
            computed = start is Start.DENSE and not self.plan.spec.operator.identical
            self._held[name] = jnp.asarray(leaf) if computed else np.asarray(leaf)
        return self._held[name][index] if start is Start.MOE else self._held[name]


@functools.lru_cache(maxsize=64)
def _compiled(operator: Operator, name: str, mlp: tuple[tuple[str, Leaf], ...], dtype: Any):
    def make(parents, index, key):
        made = operator.make(name, parents, dict(mlp), index, key)
        # `casts` narrows and checks the type.
        return made.astype(jnp.promote_types(dtype, made.dtype))

    return jax.jit(make)


@functools.lru_cache(maxsize=64)
def _compiled_whole(operator: DenseOperator, shape: tuple[int, ...], axes: tuple[str | None, ...], name: str):
    return jax.jit(lambda sources, key: operator.make(sources, shape, axes, name, key))


def mean(row: Row, count: int, leaves: Iterable[jax.Array | np.ndarray]) -> jax.Array | np.ndarray:
    """Returns the mean of `count` floating-point leaves, or the maximum of integers. Holds one leaf at a time."""
    leaves = iter(leaves)
    total = next(leaves)
    if count > 1 and jnp.issubdtype(total.dtype, jnp.floating):
        total = jnp.array(total, jnp.float32, copy=True)
        for leaf in leaves:
            total = _add(total, leaf)
            del leaf
        total = total / count
    else:
        total = functools.reduce(jnp.maximum, leaves, total)
    return casts.cast(row.target, total, row.dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: jax.Array, leaf: jax.Array) -> jax.Array:
    return total + leaf.astype(total.dtype)
