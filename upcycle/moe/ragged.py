"""Dropless Top-K: tokens are sorted by expert, and one ragged product multiplies each run of rows by its expert's matrix.

Without slots, it has neither capacity nor padding. For experts on other devices see `exchanges`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle import partitioning
from upcycle.moe.all_to_all import BATCH, DATA, EXPERT
from upcycle.moe.conventions import Exchange
from upcycle.moe.exchanges import EXCHANGES, Experts, Share, part_of_sum
from upcycle.moe.routers.top_k import TopK
from upcycle.moe.routing import Choices


def exchange_and_apply(
    experts: Experts,
    params: Any,
    x_BxLxD: jax.Array,
    choices: Choices,
    config: TopK,
    mesh: AbstractMesh | None,
    exchange: Exchange,
    width: int | None = None,
    axes: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted sum of each token's experts.

    Args:
      experts: applies all experts of a device.
      params: of the experts, each (E, ...).
      x_BxLxD: tokens.
      choices: experts and weights of the tokens, (B, L, K).
      config: of the layer.
      mesh: in use, or None for one device.
      exchange: how tokens meet experts on other devices.
      width: of the experts' outputs; None for D.
      axes: logical axes of one expert's parameters, a `PartitionSpec` each, by which they are gathered over `data`; None if they
        are not split over `data`, or for the compiler to gather them.

    Returns:
      (B, L, D), or (B, L, `width`), 0 for a token without experts; and the number of choices that the exchange dropped.
    """
    width = width or x_BxLxD.shape[-1]
    if partitioning.batch_shards(mesh) == 1:  # XLA fails to compile sums over axes of one device (JAX 0.10)
        mesh = None
    specs = _specs(params, axes, mesh)

    def local(params, x_BxLxD, expert_BxLxK, weight_BxLxK):
        params = jax.tree.map(_gathered, params, specs)
        tokens = [a.reshape(-1, a.shape[-1]) for a in (x_BxLxD, expert_BxLxK, weight_BxLxK)]
        if mesh is None or mesh.shape[EXPERT] == 1:
            y_NxD = part_of_sum(experts, params, *tokens, config.num_experts, 0, width)
            dropped = jnp.zeros((), jnp.int32)
        else:
            share = Share(experts, params, *tokens, config, mesh.shape[EXPERT], width)
            y_NxD, dropped = EXCHANGES[exchange](share)
        if mesh is not None:
            dropped = jax.lax.psum(dropped, BATCH)
        return y_NxD.reshape(*x_BxLxD.shape[:-1], width).astype(x_BxLxD.dtype), dropped

    if mesh is None:
        return local(params, x_BxLxD, *choices)
    # The compiler splits the experts' width over the model axis. Types that say over which axes values vary (`check_vma`) do not
    # know Pallas kernels.
    moved = jax.shard_map(
        local,
        in_specs=(specs, P(BATCH), P(BATCH), P(BATCH)),
        out_specs=(P(BATCH), P()),
        axis_names=set(BATCH),
        check_vma=False,
    )
    return moved(params, x_BxLxD, *choices)


def _specs(params: Any, axes: Any, mesh: AbstractMesh | None) -> Any:
    """The axes that split parameters and that are not left to the compiler: `expert`, and `data` by `axes`."""
    if mesh is None or axes is None:
        return jax.tree.map(lambda leaf: P(EXPERT), params)

    def spec(leaf: jax.Array, logical: P) -> P:
        split = partitioning.mesh_axes(logical, leaf.shape[1:], mesh, over_data=True)
        return P(EXPERT, *(DATA if axis == DATA else None for axis in split))

    return jax.tree.map(spec, params, axes)


def _gathered(leaf: jax.Array, spec: P) -> jax.Array:
    """Gathers a parameter over `data`."""
    return next((_gathered_along(leaf, axis) for axis, name in enumerate(spec) if name == DATA), leaf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered_along(leaf: jax.Array, axis: int) -> jax.Array:
    return jax.lax.all_gather(leaf, DATA, axis=axis, tiled=True)


def _forward(leaf: jax.Array, axis: int) -> tuple[jax.Array, None]:
    return _gathered_along(leaf, axis), None


def _backward(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    """Sums a gradient and keeps the device's part. As a matrix: else libtpu sums all of it on every device (0.0.42)."""
    front = jnp.moveaxis(gradient, axis, 0)
    part = jax.lax.psum_scatter(front.reshape(len(front), -1), DATA, scatter_dimension=0, tiled=True)
    return (jnp.moveaxis(part.reshape(-1, *front.shape[1:]), 0, axis),)


_gathered_along.defvjp(_forward, _backward)
