"""Carries a plan out leaf by leaf, each straight onto its devices. Nothing here knows about files or model families."""

import functools
import hashlib
import sys
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from upcycle.surgery.operators import EXPERT_OPERATORS, ROUTER_INITS
from upcycle.surgery.plan import Action, Plan, Row, Surgery
from upcycle.surgery.positions import resize_positions

Read = Callable[[str, jax.sharding.Sharding | None], jax.Array]
Progress = Callable[[str, int, int], None]


def execute(
    plan: Plan,
    read: Read,
    shardings: Mapping[str, jax.sharding.Sharding],
    *,
    new: Mapping[str, jax.Array],
    on_source: Callable[[str, jax.Array], None] = lambda name, leaf: None,
    progress: Progress | None = None,
) -> dict[str, jax.Array]:
    """Makes every leaf of the target.

    A source is read once, without its expert axis, and each device then writes only the experts it holds; beside the target
    no more than the leaves of one MLP (one leaf, for a leafwise operator) are alive at a time.

    Args:
      plan: what to make from what.
      read: reads one leaf of the source onto a sharding.
      shardings: of each target leaf.
      new: leaves whose action is NEW.
      on_source: called with every leaf that was read, before it is freed.
      progress: called with (target, leaves done, leaves in all).

    Returns:
      The target, flat.
    """
    target: dict[str, jax.Array] = {}

    def source_of(row: Row) -> jax.Array:
        sharding = shardings[row.target]
        if row.action in (Action.EXPERTS, Action.TILE):
            sharding = without_leading_axis(sharding)
        (name,) = row.sources
        leaf = read(name, sharding)
        on_source(name, leaf)
        return leaf

    def made(row: Row, leaf: jax.Array) -> None:
        target[row.target] = leaf
        if progress is not None:
            progress(row.target, len(target), len(plan.rows))

    for group in plan.groups():
        if group[0].action is Action.EXPERTS:
            operator = EXPERT_OPERATORS[plan.spec.operator]
            # A leafwise operator needs no company: one leaf at a time is read, spread and freed.
            for part in [(row,) for row in group] if operator.leafwise else [group]:
                for row, leaf in zip(part, _experts(plan.spec, part, source_of, shardings), strict=True):
                    made(row, leaf)
            continue
        (row,) = group
        if row.action is Action.KEEP:
            leaf = source_of(row)
            # The step counts for the optimizer's clock too, whose leaf is one of its own.
            made(row, leaf.astype(row.dtype) if leaf.dtype != row.dtype else leaf)
        elif row.action is Action.NEW:
            made(row, jax.device_put(new[row.target], shardings[row.target]))
        else:
            made(row, _make(plan.spec, row, source_of, shardings[row.target]))
    return target


def _experts(spec: Surgery, rows: tuple[Row, ...], source_of, shardings) -> list[jax.Array]:
    group = {row.target: source_of(row) for row in rows}
    make = EXPERT_OPERATORS[spec.operator].make
    num_experts = rows[0].shape[0]

    def build(group, key):
        made = make(group, num_experts, key)
        return {row.target: made[row.target].astype(row.dtype) for row in rows}

    out = jax.jit(build, out_shardings={row.target: shardings[row.target] for row in rows})
    made = out(group, key_of(spec.seed, rows[0].target))
    return [made[row.target] for row in rows]


def _make(spec: Surgery, row: Row, source_of, sharding: jax.sharding.Sharding) -> jax.Array:
    if row.action is Action.TILE:
        return _tile(row.shape, sharding)(source_of(row))
    if row.action is Action.RESIZE:
        resize = functools.partial(resize_positions, num_patches=row.shape[1])
        return jax.jit(resize, out_shardings=sharding)(source_of(row))
    if row.action is Action.ZEROS:
        return jax.jit(functools.partial(jnp.zeros, row.shape, row.dtype), out_shardings=sharding)()
    init = ROUTER_INITS[spec.router_init]
    make = jax.jit(lambda key: init(row.shape, spec.router_stddev, key).astype(row.dtype), out_shardings=sharding)
    return make(key_of(spec.seed, row.target))


@functools.lru_cache(maxsize=64)
def _tile(shape: tuple[int, ...], sharding: jax.sharding.Sharding):
    return jax.jit(lambda leaf: jnp.broadcast_to(leaf[None], shape), out_shardings=sharding)


def without_leading_axis(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The sharding of a leaf before its expert axis is added: what the experts are made of is whole on every expert shard."""
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*sharding.spec[1:]))
    return sharding


def key_of(seed: int, target: str) -> jax.Array:
    """A leaf's own random key: it depends on the seed and the leaf's name, not on the order of execution."""
    digest = hashlib.sha256(target.encode()).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest[:4], 'little'))


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
