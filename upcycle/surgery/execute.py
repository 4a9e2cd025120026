"""Carries a plan out leaf by leaf, each straight onto its devices. Nothing here knows about files or model families."""

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import casts, leaf_names, partitioning
from upcycle.errors import UserError
from upcycle.surgery.operators import DenseOperator, Leaf, Lineage, Operator, Start, key_for
from upcycle.surgery.plan import Action, Plan, Row, mlp_of, within_mlp
from upcycle.surgery.positions import resize_positions
from upcycle.surgery.router_init import DRAWN, INHERITED, RouterInit, clusters, inherited

Read = Callable[[str, jax.sharding.Sharding | None], jax.Array | np.ndarray]
OnSource = Callable[[str, jax.Array | np.ndarray], None]
# (path of an MLP) -> hidden states (N, D) of real tokens that it reads, on the host.
Hidden = Callable[[str], np.ndarray]
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
    hidden: Callable[[Mapping[str, jax.Array], str], np.ndarray] | None = None,
    progress: Progress | None = None,
    lineages: dict[str, Lineage] | None = None,
) -> dict[str, jax.Array]:
    """Makes every leaf of the target.

    Leaf by leaf: sources are read, and each device gets its part. What has to be computed from whole leaves is computed on one
    device of each process; of experts that differ, a process makes those that its devices hold, one at a time. Apart from the
    target, a device holds at most one leaf at any time.

    Args:
      plan: what to make from what.
      read: reads one leaf of the source onto a sharding, or whole onto the host where that is None.
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
            return _mean(row, len(parents), parents)
        mlp, name = mlp_of(row.target), within_mlp(row.target)
        make = _compiled(self.plan.spec.operator, name, tuple(self.plan.mlps[mlp].items()), jnp.dtype(row.dtype))
        return casts.cast(row.target, make(parents, index, key_of(self.plan.spec.seed, mlp)), row.dtype)

    def pieces(self, row: Row) -> Iterator[tuple[int | None, jax.Array | np.ndarray]]:
        """Yields a leaf in pieces, for callers without room for a whole stack of experts.

        Yields:
          (index of an expert, its part), or (None, the whole leaf) where it has no expert axis.
        """
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
                return _mean(row, len(row.sources), map(self.source, row.sources))
            case Action.RESIZE:
                return resize_positions(_mean(row, len(row.sources), map(self.source, row.sources)), row.shape[1])
            case Action.ZEROS:
                return jnp.zeros(row.shape, row.dtype)
            case Action.NEW:
                return self.new[row.target]
            case Action.REMAKE:
                make = _compiled_whole(spec.dense_operator, row.shape, row.axes, leaf_names.pattern(row.target))
                made = make([self.source(name) for name in row.sources], key_of(spec.seed, row.target))
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
            states_NxD = jnp.asarray(self.hidden(mlp_of(row.target)))
            kernel = clusters(states_NxD, shape[1], spec.router_stddev, key)
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


@functools.lru_cache(maxsize=64)
def _compiled_whole(operator: DenseOperator, shape: tuple[int, ...], axes: tuple[str | None, ...], name: str):
    return jax.jit(lambda sources, key: operator.make(sources, shape, axes, name, key))


def _mean(row: Row, count: int, leaves: Iterable[jax.Array | np.ndarray]) -> jax.Array | np.ndarray:
    """The mean of that many floating-point leaves; the largest of whole numbers. No more than one is held at a time."""
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


def _place(maker: Maker, row: Row, sharding: jax.sharding.Sharding) -> jax.Array:
    """A leaf on its devices."""
    match row.action:
        case Action.KEEP | Action.MEAN:
            # The step counts for the optimizer's clock too, whose leaf is a copy of it.
            return _mean(row, len(row.sources), (maker.source(name, sharding) for name in row.sources))
        case Action.ZEROS:
            return _zeros(row.shape, row.dtype, sharding)()
        case Action.NEW:
            return jax.device_put(maker.leaf(row), sharding)
    device = min(sharding.addressable_devices, key=lambda device: device.id)
    if row.action not in (Action.EXPERTS, Action.TILE):
        with partitioning.on_one_device(device):
            leaf = np.asarray(maker.leaf(row))
        return partitioning.put_whole(leaf, sharding)
    if maker.plan.alike(row):
        leaf = casts.cast(row.target, np.asarray(maker.source(row.sources[0])), row.dtype)
        return _tile(row.shape, sharding)(partitioning.put_whole(leaf, without_leading_axis(sharding)))
    with partitioning.on_one_device(device):
        parts = _parts(maker, row, sharding)
    return jax.make_array_from_callback(row.shape, sharding, lambda index: parts[_bounds(index, row.shape)])


Bounds = tuple[tuple[int, int], ...]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Slices as pairs of start and stop, which can be looked up."""
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _parts(maker: Maker, row: Row, sharding: jax.sharding.Sharding) -> dict[Bounds, np.ndarray]:
    """What the devices of this process hold of a leaf whose experts differ, on the host; no other experts are made."""
    indices = sharding.addressable_devices_indices_map(row.shape).values()
    parts = {
        bounds: np.empty([stop - start for start, stop in bounds], row.dtype)
        for bounds in dict.fromkeys(_bounds(index, row.shape) for index in indices)
    }
    for index in sorted({index for (experts, *_) in parts for index in range(*experts)}):
        made = np.asarray(maker.expert(row, index))
        for ((start, stop), *rest), part in parts.items():
            if start <= index < stop:
                part[index - start] = made[tuple(slice(*axis) for axis in rest)]
    return parts


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
