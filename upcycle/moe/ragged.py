"""Dropless Top-K: tokens are sorted by expert, and one ragged product multiplies each run of rows by its expert's matrix.

Without slots, it has neither capacity nor padding. Under expert parallelism tokens travel once around the ring of `expert` shards
and collect each shard's part of their sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle import partitioning
from upcycle.moe.all_to_all import BATCH, DATA, EXPERT
from upcycle.moe.routers.top_k import TopK
from upcycle.moe.routing import Choices

# (expert parameters, rows sorted by expert, number of rows of each expert) -> rows; rows after the last run are undefined.
Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]


def apply_experts(
    experts: Experts,
    params: Any,
    x_BxLxD: jax.Array,
    choices: Choices,
    config: TopK,
    mesh: AbstractMesh | None,
    width: int | None = None,
) -> jax.Array:
    """Computes the weighted sum of each token's experts.

    Args:
      experts: applies all experts of a device.
      params: of the experts, each (E, ...).
      x_BxLxD: tokens.
      choices: experts and weights of the tokens, (B, L, K).
      config: of the layer.
      mesh: in use, or None for one device.
      width: of the experts' outputs; None for D.

    Returns:
      (B, L, D), or (B, L, `width`); 0 for a token without experts.
    """
    width = width or x_BxLxD.shape[-1]
    if partitioning.batch_shards(mesh) == 1:  # XLA fails to compile sums over axes of one device (JAX 0.10)
        mesh = None

    def local(params, x_BxLxD, expert_BxLxK, weight_BxLxK):
        if mesh is not None:
            # On the parameters, so that their gradients are summed over `data` in float32 and not in the activations' type.
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, DATA, to='varying'), params)
        tokens = [a.reshape(-1, a.shape[-1]) for a in (x_BxLxD, expert_BxLxK, weight_BxLxK)]
        if mesh is None or mesh.shape[EXPERT] == 1:
            y_NxD = _part(experts, params, *tokens, config.num_experts, 0, width)
        else:
            y_NxD = _ring(experts, params, *tokens, config, mesh.shape[EXPERT], width)
        return y_NxD.reshape(*x_BxLxD.shape[:-1], width).astype(x_BxLxD.dtype)

    if mesh is None:
        return local(params, x_BxLxD, *choices)
    # The compiler splits the experts' width over the model axis.
    moved = jax.shard_map(
        local, in_specs=(P(EXPERT), P(BATCH), P(BATCH), P(BATCH)), out_specs=P(BATCH), axis_names=set(BATCH)
    )
    return moved(params, x_BxLxD, *choices)


def _part(
    experts: Experts,
    params: Any,
    x_NxD: jax.Array,
    expert_NxK: jax.Array,
    weight_NxK: jax.Array,
    num_experts: int,
    first: jax.Array | int,
    width: int,
) -> jax.Array:
    """Computes the part of experts `first` to `first + num_experts` in each token's sum, in float32."""
    K = expert_NxK.shape[1]
    index_R = expert_NxK.reshape(-1) - first
    # Rows of other experts sort to the end, where no run covers them.
    index_R = jnp.where((index_R >= 0) & (index_R < num_experts), index_R, num_experts)
    order_R = jnp.argsort(index_R, stable=True)
    token_R = order_R // K
    sizes_E = jnp.zeros(num_experts, jnp.int32).at[index_R].add(1, mode='drop')
    mine_R = jnp.arange(index_R.size) < sizes_E.sum()
    y_RxD = experts(params, jnp.where(mine_R[:, None], x_NxD[token_R], 0), sizes_E).astype(jnp.float32)
    y_RxD = jnp.where(mine_R[:, None], y_RxD, 0) * weight_NxK.reshape(-1)[order_R][:, None]
    return jnp.zeros((x_NxD.shape[0], width), jnp.float32).at[token_R].add(y_RxD)


def _ring(
    experts: Experts,
    params: Any,
    x_NxD: jax.Array,
    expert_NxK: jax.Array,
    weight_NxK: jax.Array,
    config: TopK,
    shards: int,
    width: int,
) -> jax.Array:
    num_experts = config.num_experts // shards
    first = jax.lax.axis_index(EXPERT) * num_experts
    to_next = [(i, (i + 1) % shards) for i in range(shards)]

    def pass_on(x: jax.Array) -> jax.Array:
        dtype = x.dtype
        if config.network_dtype is not None and jnp.issubdtype(dtype, jnp.floating):
            x = x.astype(config.network_dtype)
        return jax.lax.ppermute(x, EXPERT, to_next).astype(dtype)

    # Without rematerialisation every stop would keep its hidden activations, in total those of all tokens in the ring.
    @jax.checkpoint
    def stop(travelling, _):
        x_NxD, expert_NxK, weight_NxK, sum_NxD = travelling
        sum_NxD += _part(experts, params, x_NxD, expert_NxK, weight_NxK, num_experts, first, width)
        # Weights travel in float32: rounding them would round the router.
        weight_NxK = jax.lax.ppermute(weight_NxK, EXPERT, to_next)
        return (pass_on(x_NxD), pass_on(expert_NxK), weight_NxK, pass_on(sum_NxD)), None

    zeros_NxD = jax.lax.pcast(jnp.zeros((x_NxD.shape[0], width), jnp.float32), BATCH, to='varying')
    (_, _, _, sum_NxD), _ = jax.lax.scan(stop, (x_NxD, expert_NxK, weight_NxK, zeros_NxD), None, length=shards)
    return sum_NxD
