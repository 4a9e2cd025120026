"""Carrying out a plan: every leaf is made and put onto its devices."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle import casts, partitioning
from upcycle.surgery.make import Maker, OnSource, Read, mean
from upcycle.surgery.operators import Lineage
from upcycle.surgery.plan import Action, Plan, Row


def execute(
    plan: Plan,
    read: Read,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    new: Mapping[str, jax.Array],
    on_source: OnSource = lambda name, leaf: None,
    hidden: Callable[[Mapping[str, jax.Array], str], np.ndarray] | None = None,
    progress: Callable[[int, str], None] = lambda done, target: None,
    lineages: dict[str, Lineage] | None = None,
    key: jax.Array | None = None,
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
      progress: called with (leaves done, target).
      lineages: filled with what each MLP's experts were made of.
      key: of everything random; None: that of the surgery's seed.

    Returns:
      The target, flat.
    """
    target: dict[str, jax.Array] = {}
    states = None if hidden is None else functools.partial(hidden, target)
    maker = Maker(plan, read, new=new, on_source=on_source, hidden=states, key=key)
    for row in plan.in_order():
        target[row.target] = _place(maker, row, shardings[row.target])
        progress(len(target), row.target)
    if lineages is not None:
        lineages.update(maker.lineages)
    return {row.target: target[row.target] for row in plan.rows}


def _place(maker: Maker, row: Row, sharding: jax.sharding.Sharding) -> jax.Array:
    """A leaf on its devices."""
    match row.action:
        case Action.KEEP | Action.MEAN:
            # The step counts for the optimizer's clock too, whose leaf is a copy of it.
            return mean(row, len(row.sources), (maker.source(name, sharding) for name in row.sources))
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
