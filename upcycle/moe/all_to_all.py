"""Expert parallelism: slots travel to the devices that hold their experts, and the experts' outputs travel back.

On a mesh, tokens are split over `data` and `expert`, experts over `expert`. Each device routes its own groups, which never span
devices, and two tiled all-to-alls over `expert` move the slots. Over `model` each device moves its own part of the width. The
experts themselves sit between `dispatch_tokens` and `combine_outputs`, where the compiler partitions them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle.moe.dispatch import combine, dispatch
from upcycle.moe.routers.base import Assigning, Routed
from upcycle.moe.routers.soft import Soft
from upcycle.moe.routing import Mixing, Routing, here

DATA, EXPERT, MODEL = 'data', 'expert', 'model'
BATCH = (DATA, EXPERT)


def dispatch_tokens(
    x_BxLxD: jax.Array,
    logits_BxLxE: jax.Array,
    real_BxL: jax.Array,
    config: Assigning,
    groups: int,
    capacity: int,
    mesh: AbstractMesh | None,
    bias_E: jax.Array | None = None,
) -> tuple[jax.Array, Routing, dict[str, jax.Array]]:
    """Routes tokens, and takes them to their experts.

    Args:
      x_BxLxD: tokens.
      logits_BxLxE: the router's.
      real_BxL: bool, False at padding.
      config: the layer's.
      groups: G, a multiple of the devices along `data` and `expert`.
      capacity: C.
      mesh: in use, or None for one device.
      bias_E: of Top-K's choice; None: none.

    Returns:
      (E, G, C, D) slots, split over `expert`, `data` and `model`; the routing; its metrics.
    """
    shards = 1 if mesh is None else mesh.shape[DATA] * mesh.shape[EXPERT]
    across = here if mesh is None else functools.partial(jax.lax.psum, axis_name=BATCH)

    def local(x_BxLxD, logits_BxLxE, real_BxL, bias_E):
        G = groups // shards
        D, E = x_BxLxD.shape[-1], logits_BxLxE.shape[-1]
        logits_GxSxE, real_GxS = logits_BxLxE.reshape(G, -1, E), real_BxL.reshape(G, -1)
        routing, metrics = config.route(logits_GxSxE, real_GxS, capacity, across, bias_E)
        x_ExGxCxD = dispatch(x_BxLxD.reshape(G, -1, D), routing, config.dispatch, config.experts_of_a_token)
        return _all_to_all(x_ExGxCxD, 0, 1, config, mesh), routing, metrics

    if mesh is None:
        return local(x_BxLxD, logits_BxLxE, real_BxL, bias_E)
    width = _width_axis(mesh, x_BxLxD.shape[-1])
    moved = jax.shard_map(
        local,
        in_specs=(P(BATCH, None, width), P(BATCH), P(BATCH), P()),
        out_specs=(P(EXPERT, DATA, None, width), Routing(P(BATCH), P(BATCH)), P()),
    )
    x_ExGxCxD, routing, metrics = moved(x_BxLxD, logits_BxLxE, real_BxL, bias_E)
    return jax.lax.with_sharding_constraint(x_ExGxCxD, P(EXPERT, DATA)), routing, metrics


def combine_outputs(
    y_ExGxCxD: jax.Array, routing: Routing, shape: tuple[int, int, int], config: Assigning, mesh: AbstractMesh | None
) -> jax.Array:
    """Takes the experts' outputs back to their tokens, and adds them up.

    Args:
      y_ExGxCxD: outputs for the slots of `dispatch_tokens`.
      routing: of `dispatch_tokens`.
      shape: (B, L, D) of the tokens.
      config: the layer's.
      mesh: in use, or None for one device.

    Returns:
      (B, L, D), the weighted sum of each token's slots; 0 for a token that no expert took.
    """
    tokens_per_group = shape[0] * shape[1] // y_ExGxCxD.shape[1]

    def local(y_ExGxCxD, routing):
        y_ExGxCxD = _all_to_all(y_ExGxCxD, 1, 0, config, mesh)
        y_GxSxD = combine(y_ExGxCxD, routing, tokens_per_group, config.dispatch, config.experts_of_a_token)
        return y_GxSxD.reshape(-1, shape[1], y_GxSxD.shape[-1])

    if mesh is None:
        return local(y_ExGxCxD, routing)
    width = _width_axis(mesh, shape[-1])

    def local_part(y_ExGxCxD, routing):
        if width is not None:
            # Each device sees its part of the width, so its part of a weight's gradient: they add up over `model`.
            weight = jax.lax.pcast(routing.weight_GxExC, width, to='varying')
            routing = routing._replace(weight_GxExC=weight)
        return local(y_ExGxCxD, routing)

    y_ExGxCxD = jax.lax.with_sharding_constraint(y_ExGxCxD, P(EXPERT, DATA, None, width))
    moved = jax.shard_map(
        local_part,
        in_specs=(P(EXPERT, DATA, None, width), Routing(P(BATCH), P(BATCH))),
        out_specs=P(BATCH, None, width),
    )
    return jax.lax.with_sharding_constraint(moved(y_ExGxCxD, routing), P(BATCH))


def dispatch_mixed(
    x_BxLxD: jax.Array,
    logits_BxLxN: jax.Array,
    real_BxL: jax.Array,
    config: Soft,
    groups: int,
    mesh: AbstractMesh | None,
) -> tuple[jax.Array, Mixing, dict[str, jax.Array]]:
    """Soft MoE's `dispatch_tokens`: slots are means over the tokens of a group. There is a logit for each of N = E * C slots."""
    shards = 1 if mesh is None else mesh.shape[DATA] * mesh.shape[EXPERT]
    across = here if mesh is None else functools.partial(jax.lax.psum, axis_name=BATCH)

    def local(x_BxLxD, logits_BxLxN, real_BxL):
        G, D, N = groups // shards, x_BxLxD.shape[-1], logits_BxLxN.shape[-1]
        mixing, metrics = config.mix(logits_BxLxN.reshape(G, -1, N), real_BxL.reshape(G, -1), across)
        x_GxSxD = x_BxLxD.reshape(G, -1, D).astype(jnp.float32)
        x_GxNxD = jnp.einsum('gsd,gsn->gnd', x_GxSxD, mixing.dispatch_GxSxN).astype(x_BxLxD.dtype)
        x_ExGxCxD = x_GxNxD.reshape(G, config.num_experts, -1, D).swapaxes(0, 1)
        return _all_to_all(x_ExGxCxD, 0, 1, config, mesh), mixing, metrics

    if mesh is None:
        return local(x_BxLxD, logits_BxLxN, real_BxL)
    width = _width_axis(mesh, x_BxLxD.shape[-1])
    moved = jax.shard_map(
        local,
        in_specs=(P(BATCH, None, width), P(BATCH), P(BATCH)),
        out_specs=(P(EXPERT, DATA, None, width), Mixing(P(BATCH), P(BATCH)), P()),
    )
    x_ExGxCxD, mixing, metrics = moved(x_BxLxD, logits_BxLxN, real_BxL)
    return jax.lax.with_sharding_constraint(x_ExGxCxD, P(EXPERT, DATA)), mixing, metrics


def combine_mixed(
    y_ExGxCxD: jax.Array, mixing: Mixing, shape: tuple[int, int, int], config: Soft, mesh: AbstractMesh | None
) -> jax.Array:
    """Soft MoE's `combine_outputs`: tokens are means over the slots of their group."""

    def local(y_ExGxCxD, mixing):
        y_GxExCxD = _all_to_all(y_ExGxCxD, 1, 0, config, mesh).swapaxes(0, 1)
        y_GxNxD = y_GxExCxD.reshape(y_GxExCxD.shape[0], -1, y_GxExCxD.shape[-1]).astype(jnp.float32)
        y_GxSxD = jnp.einsum('gnd,gsn->gsd', y_GxNxD, mixing.combine_GxSxN).astype(y_ExGxCxD.dtype)
        return y_GxSxD.reshape(-1, shape[1], y_GxSxD.shape[-1])

    if mesh is None:
        return local(y_ExGxCxD, mixing)
    width = _width_axis(mesh, shape[-1])
    y_ExGxCxD = jax.lax.with_sharding_constraint(y_ExGxCxD, P(EXPERT, DATA, None, width))
    moved = jax.shard_map(
        local,
        in_specs=(P(EXPERT, DATA, None, width), Mixing(P(BATCH), P(BATCH))),
        out_specs=P(BATCH, None, width),
    )
    return jax.lax.with_sharding_constraint(moved(y_ExGxCxD, mixing), P(BATCH))


def _width_axis(mesh: AbstractMesh, width: int) -> str | None:
    """`model` splits what travels, where it divides the width."""
    return MODEL if width % mesh.shape[MODEL] == 0 else None


def _all_to_all(
    x: jax.Array, split_axis: int, concat_axis: int, config: Routed, mesh: AbstractMesh | None
) -> jax.Array:
    if mesh is None or mesh.shape[EXPERT] == 1:
        return x
    dtype = x.dtype
    if config.network_dtype is not None:
        x = x.astype(config.network_dtype)
    x = jax.lax.all_to_all(x, EXPERT, split_axis, concat_axis, tiled=True)
    return checkpoint_name(x, CROSSED).astype(dtype)


# What a rematerialisation policy can keep, so that the backward pass does not repeat the all-to-alls.
CROSSED = 'crossed_the_network'
