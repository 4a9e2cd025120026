"""Executes a plan: makes every leaf on its devices."""

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
    """Makes every target leaf.

    Sources are read leaf by leaf, and each device gets its part. Leaves that need whole sources are computed on one device per
    process. If experts differ, a process makes only those on its devices, one at a time. Besides the target, a device holds at
    most one leaf.

    Args:
      plan: the plan.
      read: reads one source leaf with a sharding, or whole onto the host if the sharding is None.
      shardings: sharding of each target leaf.
      new: leaves whose action is NEW.
      on_source: called with every leaf that is read, before it is freed.
      hidden: for ROUTER_INIT = 'hidden': (target leaves without routers, path of an MLP) -> inputs of that MLP.
      progress: called with (leaves done, target).
      lineages: filled with the lineage of each MLP.
      key: random key; None: from the surgery's seed.

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
    """Makes a leaf on its devices."""
    match row.action:
        case Action.KEEP | Action.MEAN:
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
    """Converts slices to hashable (start, stop) pairs."""
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _parts(maker: Maker, row: Row, sharding: jax.sharding.Sharding) -> dict[Bounds, np.ndarray]:
    """Makes, on the host, the parts that this process's devices hold of a leaf whose experts differ."""
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


# Leaves of the same shape share a program, because compilation takes longer than reading the checkpoint.


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _tile(shape: tuple[int, ...], sharding: jax.sharding.Sharding):
    return jax.jit(lambda leaf: jnp.broadcast_to(leaf[None], shape), out_shardings=sharding)


def without_leading_axis(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of a leaf before its expert axis is added: the source is replicated over expert shards."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding
