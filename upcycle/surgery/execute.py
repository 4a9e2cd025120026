"""Carries a plan out leaf by leaf, each straight onto its devices. Nothing here knows about files or model families."""

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import casts
from upcycle.errors import UserError
from upcycle.surgery.operators import Leaf, Lineage, Operator, Start, key_for
from upcycle.surgery.plan import Action, Plan, Row, mlp_of, within_mlp
from upcycle.surgery.positions import resize_positions
from upcycle.surgery.router_init import DRAWN, INHERITED, RouterInit, clusters, inherited

Read = Callable[[str, jax.sharding.Sharding | None], jax.Array | np.ndarray]
OnSource = Callable[[str, jax.Array | np.ndarray], None]
# (path of an MLP) -> hidden states (N, D) of real tokens that it reads.
Hidden = Callable[[str], jax.Array]
Progress = Callable[[str, int, int], None]

NEEDS_DATA = (
    "ROUTER_INIT = 'hidden' needs hidden states on data, which only `upcycle train` has: use that, or another one."
)


def execute(
    plan: Plan,
    read: Read,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    new: Mapping[str, jax.Array],
    on_source: OnSource = lambda name, leaf: None,
    hidden: Callable[[Mapping[str, jax.Array], str], jax.Array] | None = None,
    progress: Progress | None = None,
    lineages: dict[str, Lineage] | None = None,
) -> dict[str, jax.Array]:
    """Makes every leaf of the target.

    Leaf by leaf: a source is read, without its expert axis, and spread. Where experts differ, one device makes them, as many at a
    time as a device holds. Beside the target no more than that and one source are alive.

    Args:
      plan: what to make from what.
      read: reads one leaf of the source onto a sharding, or whole onto the host.
      shardings: of each target leaf.
      new: leaves whose action is NEW.
      on_source: called with every leaf that was read, before it is freed.
      hidden: for ROUTER_INIT = 'hidden': the states that the MLP of a path reads, from the target's leaves, routers missing.
      progress: called with (target, leaves done, leaves in all).
      lineages: filled with what each MLP's experts were made of.

    Returns:
      The target, flat.
    """
    target: dict[str, jax.Array] = {}
    states = None if hidden is None else functools.partial(hidden, target)
    maker = Maker(plan, read, new=new, on_source=on_source, hidden=states)
    for row in plan.in_order():
        target[row.target] = _place(maker, row, shardings[row.target])
        if progress is not None:
            progress(row.target, len(target), len(plan.rows))
    if lineages is not None:
        lineages.update(maker.lineages)
    return {row.target: target[row.target] for row in plan.rows}


class Maker:
    """Makes a plan's leaves one at a time, or one expert at a time, whole and on one device.

    It is the same program wherever it runs, so that a leaf has the same bytes on any mesh, online and offline.

    Args:
      plan: what to make from what.
      read: reads one leaf of the source.
      new: leaves whose action is NEW.
      on_source: called with every leaf that was read.
      hidden: for ROUTER_INIT = 'hidden'.

    Attributes:
      lineages: of each MLP that was come to, for each of its experts, the MLPs that it is made of.
    """

    def __init__(
        self,
        plan: Plan,
        read: Read,
        *,
        new: Mapping[str, jax.Array],
        on_source: OnSource = lambda name, leaf: None,
        hidden: Hidden | None = None,
    ):
        self.plan, self.new, self.hidden = plan, new, hidden
        self._read, self._on_source = read, on_source
        self._held: dict[str, jax.Array | np.ndarray] = {}
        self.lineages: dict[str, Lineage] = {}

    def source(self, name: str, sharding: jax.sharding.Sharding | None = None) -> jax.Array | np.ndarray:
        """Reads a leaf of the source."""
        leaf = self._read(name, sharding)
        self._on_source(name, leaf)
        return leaf

    def expert(self, row: Row, index: int) -> jax.Array | np.ndarray:
        """One expert's part of a leaf whose action is EXPERTS or TILE, without the expert axis.

        The sources of the row last asked for are kept, so ask for one row's experts after the other.
        """
        made_of = self.lineage(row)[index]
        if row.action is Action.TILE and self.plan.alike(row):
            made_of = (0,)  # the dense MLP's state, though the expert may start from scratch
        parents = [self._parent(row, i) for i in made_of]
        if row.action is Action.TILE or self.plan.spec.operator.identical:
            return _mean(row, parents)
        mlp, name = mlp_of(row.target), within_mlp(row.target)
        make = _compiled(self.plan.spec.operator, name, tuple(self.plan.mlps[mlp].items()), jnp.dtype(row.dtype))
        return casts.cast(row.target, make(parents, index, key_of(self.plan.spec.seed, mlp)), row.dtype)

    def pieces(self, row: Row) -> Iterator[tuple[int | None, jax.Array | np.ndarray]]:
        """A leaf for who has no room for a whole layer: (index of an expert, its part), or (None, the whole)."""
        if row.action not in (Action.EXPERTS, Action.TILE):
            yield None, self.leaf(row)
        elif self.plan.alike(row):
            yield from enumerate([self.expert(row, 0)] * row.shape[0])
        else:
            yield from ((index, self.expert(row, index)) for index in range(row.shape[0]))

    def leaf(self, row: Row) -> jax.Array | np.ndarray:
        """A leaf that has no expert axis."""
        spec = self.plan.spec
        match row.action:
            case Action.KEEP | Action.MEAN:
                return _mean(row, [self.source(name) for name in row.sources])
            case Action.RESIZE:
                return resize_positions(_mean(row, [self.source(name) for name in row.sources]), row.shape[1])
            case Action.ZEROS:
                return jnp.zeros(row.shape, row.dtype)
            case Action.NEW:
                return self.new[row.target]
            case Action.REMAKE:
                sources = [self.source(name) for name in row.sources]
                key = key_of(spec.seed, row.target)
                made = spec.dense_operator.make(sources, row.shape, row.axes, row.target, key)
                return casts.cast(row.target, made, row.dtype)
        assert row.action is Action.ROUTER, row
        if not row.shape:
            # The scale of Soft MoE's cosines.
            return jnp.ones((), row.dtype)
        key = key_of(spec.seed, row.target)
        lineage = self.lineage(row)
        # Soft MoE has several columns an expert, side by side.
        slots = row.shape[1] // len(lineage)
        columns = [slots * e + c for e in spec.operator.router_columns(len(lineage)) for c in range(slots)]
        lineage = tuple(tuple(slots * i + c for i in made_of) for made_of in lineage for c in range(slots))
        shape = (row.shape[0], 1 + max(columns))
        if spec.router_init in INHERITED:
            old = jnp.asarray(self.source(row.sources[0]), jnp.float32)
            kernel = inherited(
                old, lineage, spec.router_init, stddev=spec.router_stddev, noise=spec.router_noise, key=key
            )
        elif spec.router_init is RouterInit.HIDDEN:
            if self.hidden is None:
                raise UserError(NEEDS_DATA)
            kernel = clusters(self.hidden(mlp_of(row.target)), shape[1], spec.router_stddev, key)
        else:
            kernel = DRAWN[spec.router_init](shape, spec.router_stddev, key)
        return casts.cast(row.target, kernel[:, jnp.asarray(columns)], row.dtype)

    def lineage(self, row: Row) -> Lineage:
        """For each expert of a row, which MLPs it is made of."""
        plan, mlp = self.plan, mlp_of(row.target)
        if mlp not in self.lineages:
            num_experts = next(iter(plan.mlps[mlp].values())).num_experts
            measured = None
            for name, size in plan.measured.get(mlp, ()):
                found = plan.spec.operator.measure(name, np.asarray(self._read(name, None)), size)
                measured = found if measured is None else measured + found
            self.lineages[mlp] = plan.spec.operator.lineage(num_experts, plan.num_mlps, measured)
        return self.lineages[mlp]

    def _parent(self, row: Row, index: int) -> jax.Array | np.ndarray:
        """The row's leaf of one MLP."""
        start = self.plan.spec.operator.starts_from
        name = row.sources[index if start is Start.SEVERAL else 0]
        if name not in self._held:
            self._held = {held: leaf for held, leaf in self._held.items() if held in row.sources}
            leaf = self.source(name)
            # What every expert needs goes to the device once.
            self._held[name] = jnp.asarray(leaf) if start is Start.DENSE else np.asarray(leaf)
        return self._held[name][index] if start is Start.MOE else self._held[name]


@functools.lru_cache(maxsize=64)
def _compiled(operator: Operator, name: str, mlp: tuple[tuple[str, Leaf], ...], dtype: Any):
    def make(parents, index, key):
        made = operator.make(name, parents, dict(mlp), index, key)
        # A narrower type is for `casts` to make and to look at.
        return made.astype(jnp.promote_types(dtype, made.dtype))

    return jax.jit(make)


def _mean(row: Row, leaves: Sequence[jax.Array | np.ndarray]) -> jax.Array | np.ndarray:
    """The mean of floating-point leaves; the largest of whole numbers."""
    if len(leaves) == 1:
        return casts.cast(row.target, leaves[0], row.dtype)
    if not jnp.issubdtype(leaves[0].dtype, jnp.floating):
        return casts.cast(row.target, functools.reduce(jnp.maximum, leaves), row.dtype)
    total = functools.reduce(jnp.add, [jnp.asarray(leaf).astype(jnp.float32) for leaf in leaves])
    return casts.cast(row.target, total / len(leaves), row.dtype)


def _place(maker: Maker, row: Row, sharding: jax.sharding.Sharding) -> jax.Array:
    """A leaf on its devices."""
    if row.action is Action.KEEP:
        # The step counts for the optimizer's clock too, whose leaf is one of its own.
        return casts.cast(row.target, maker.source(row.sources[0], sharding), row.dtype)
    if row.action is Action.ZEROS:
        return _zeros(row.shape, row.dtype, sharding)()
    if row.action is Action.NEW:
        return jax.device_put(maker.leaf(row), sharding)
    if row.action not in (Action.EXPERTS, Action.TILE):
        # From the host, since the leaf may be on one device and the sharding span several processes.
        return jax.device_put(np.asarray(maker.leaf(row)), sharding)
    if maker.plan.alike(row):
        leaf = maker.source(row.sources[0], without_leading_axis(sharding))
        return _tile(row.shape, sharding)(casts.cast(row.target, leaf, row.dtype))
    # Experts are made on one device, as many as another one holds, and each device gets its part of its own.
    where = sharding.addressable_devices_indices_map(row.shape)
    holders: dict[range, list[jax.Device]] = {}
    for device, index in where.items():
        holders.setdefault(range(*index[0].indices(row.shape[0])), []).append(device)
    parts = {}
    with jax.default_device(next(iter(where))):
        for held, devices in holders.items():
            experts = jnp.stack([maker.expert(row, index) for index in held])
            for device in devices:
                parts[device] = jax.device_put(experts[:, *where[device][1:]], device)
    return jax.make_array_from_single_device_arrays(row.shape, sharding, [parts[device] for device in where])


# Leaves of one shape share a program: compiling one for each takes longer than reading the checkpoint.


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _tile(shape: tuple[int, ...], sharding: jax.sharding.Sharding):
    return jax.jit(lambda leaf: jnp.broadcast_to(leaf[None], shape), out_shardings=sharding)


def without_leading_axis(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of a leaf before its expert axis is added: what the experts are made of is whole on every expert shard."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def key_of(seed: int, target: str) -> jax.Array:
    """A leaf's or MLP's own random key: it depends on the seed and the name, not on the order of execution."""
    return key_for(jax.random.key(seed), target)


def sha256_of(name: str, leaf: jax.Array | np.ndarray) -> str:
    """Fingerprint of a leaf: sha256 of its path, dtype, shape and bytes in C order."""
    array = np.ascontiguousarray(leaf)
    digest = hashlib.sha256(f'{name}\0{array.dtype.name}\0{array.shape}\0'.encode())
    digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def print_progress(what: str) -> Progress:
    """A progress line on standard error: leaves done, rate, time left."""
    start = time.monotonic()
    last = [start]

    def show(target: str, done: int, total: int) -> None:
        now = time.monotonic()
        if jax.process_index() > 0 or (done < total and now - last[0] < 1.0):
            return
        last[0] = now
        left = (now - start) / done * (total - done)
        print(f'{what}: {done}/{total} leaves, {left:.0f} s left ({target})', file=sys.stderr, flush=True)

    return show
