"""Carries a plan out leaf by leaf, each straight onto its devices. Nothing here knows about files or model families."""

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from upcycle.surgery.operators import Leaf, Operator, key_for
from upcycle.surgery.plan import Action, Plan, Row, Surgery, mlp_of, within_mlp
from upcycle.surgery.positions import resize_positions
from upcycle.surgery.router_init import ROUTER_INITS

Read = Callable[[str, jax.sharding.Sharding | None], jax.Array | np.ndarray]
Progress = Callable[[str, int, int], None]


def execute(
    plan: Plan,
    read: Read,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    new: Mapping[str, jax.Array],
    on_source: Callable[[str, jax.Array | np.ndarray], None] = lambda name, leaf: None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Makes every leaf of the target.

    A source is read once, without its expert axis, and no device ever holds experts that are not its own, but for the one that is
    being made. Beside the target no more than one MLP and one expert are alive at a time (one leaf, for a leafwise operator).

    Args:
      plan: what to make from what.
      read: reads one leaf of the source onto a sharding, or whole onto the host.
      shardings: of each target leaf.
      new: leaves whose action is NEW.
      on_source: called with every leaf that was read, before it is freed.
      progress: called with (target, leaves done, leaves in all).

    Returns:
      The target, flat.
    """
    target: dict[str, jax.Array] = {}
    spec = plan.spec

    def source(name: str, sharding: jax.sharding.Sharding | None) -> jax.Array | np.ndarray:
        leaf = read(name, sharding)
        on_source(name, leaf)
        return leaf

    def made(row: Row, leaf: jax.Array) -> None:
        target[row.target] = leaf
        if progress is not None:
            progress(row.target, len(target), len(plan.rows))

    for group in plan.groups():
        row, sharding = group[0], shardings[group[0].target]
        if row.action is Action.EXPERTS and not spec.operator.identical:
            # A leafwise operator needs no company: one leaf at a time is read, made into experts and freed.
            for rows in [(row,) for row in group] if spec.operator.leafwise else [group]:
                sources = {name: source(name, None) for row in rows for name in row.sources}
                for row, leaf in zip(rows, _experts(spec, rows, sources, shardings), strict=True):
                    made(row, leaf)
        elif row.action in (Action.EXPERTS, Action.TILE):
            for row in group:
                (name,) = row.sources
                sharding = shardings[row.target]
                made(row, _tile(row.shape, row.dtype, sharding)(source(name, without_leading_axis(sharding))))
        elif row.action is Action.KEEP:
            (name,) = row.sources
            leaf = source(name, sharding)
            # The step counts for the optimizer's clock too, whose leaf is one of its own.
            made(row, leaf.astype(row.dtype) if leaf.dtype != row.dtype else leaf)
        elif row.action is Action.RESIZE:
            (name,) = row.sources
            resize = functools.partial(resize_positions, num_patches=row.shape[1])
            made(row, jax.jit(resize, out_shardings=sharding)(source(name, sharding)))
        elif row.action is Action.NEW:
            made(row, jax.device_put(new[row.target], sharding))
        elif row.action is Action.ZEROS:
            made(row, _zeros(row.shape, row.dtype, sharding)())
        else:
            made(row, make_router(spec, row, sharding))
    return target


def make_expert(
    spec: Surgery, rows: Sequence[Row], sources: Mapping[str, jax.Array | np.ndarray], index: int
) -> dict[str, jax.Array]:
    """One expert of one MLP, on the device that holds the sources.

    It is the same program wherever it runs, so that an expert has the same bytes on any mesh, online and offline.

    Args:
      spec: the surgery.
      rows: of one MLP; all of them, or one, where the operator is leafwise.
      sources: the rows' sources, whole.
      index: of the expert.

    Returns:
      The expert's leaves by their targets, without an expert axis.
    """
    leaves = tuple((within_mlp(row.target), row.expert_leaf, jnp.dtype(row.dtype)) for row in rows)
    parents = []
    if rows[0].sources:
        parents.append({within_mlp(row.target): sources[row.sources[0]] for row in rows})
    made = _make(spec.operator, leaves)(parents, index, key_of(spec.seed, mlp_of(rows[0].target)))
    return {row.target: made[within_mlp(row.target)] for row in rows}


@functools.lru_cache(maxsize=64)
def _make(operator: Operator, leaves: tuple[tuple[str, Leaf, Any], ...]):
    by_name = {name: leaf for name, leaf, _ in leaves}

    def make(parents, index, key):
        made = operator.make(parents, by_name, index, jax.random.fold_in(key, index))
        return {name: made[name].astype(dtype) for name, _, dtype in leaves}

    return jax.jit(make)


def _experts(
    spec: Surgery,
    rows: Sequence[Row],
    sources: Mapping[str, jax.Array | np.ndarray],
    shardings: Mapping[str, jax.sharding.Sharding],
) -> list[jax.Array]:
    """All experts of one MLP, made one after the other on one device; every device then holds its part of its own."""
    where = {row.target: shardings[row.target].addressable_devices_indices_map(row.shape) for row in rows}
    # Which experts a device holds is the same for all leaves.
    holds = {device: range(*parts[0].indices(rows[0].shape[0])) for device, parts in where[rows[0].target].items()}
    home = next(iter(holds))
    pieces = {(row.target, device): [] for row in rows for device in holds}
    with jax.default_device(home):
        here = {name: jax.device_put(leaf, home) for name, leaf in sources.items()}
        for index in sorted({index for held in holds.values() for index in held}):
            for target, leaf in make_expert(spec, rows, here, index).items():
                for device in (device for device, held in holds.items() if index in held):
                    part = leaf[None, *where[target][device][1:]]
                    pieces[target, device].append(jax.device_put(part, device))
    made = []
    for row in rows:
        arrays = [jnp.concatenate(pieces.pop((row.target, device))) for device in holds]
        made.append(jax.make_array_from_single_device_arrays(row.shape, shardings[row.target], arrays))
    return made


def make_router(spec: Surgery, row: Row, sharding: jax.sharding.Sharding) -> jax.Array:
    make = _router(spec.router_init, spec.router_stddev, row.shape, row.dtype, sharding)
    return make(key_of(spec.seed, row.target))


# Leaves of one shape share a program: compiling one for each takes longer than reading the checkpoint.


@functools.lru_cache(maxsize=64)
def _router(init: str, stddev: float, shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda key: ROUTER_INITS[init](shape, stddev, key).astype(dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.lru_cache(maxsize=64)
def _tile(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding):
    return jax.jit(lambda leaf: jnp.broadcast_to(leaf[None], shape).astype(dtype), out_shardings=sharding)


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
