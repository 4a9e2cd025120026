"""Expert parallelism: tokens travel to the devices that hold their experts, and outputs travel back.

On a mesh, tokens are split over `data` and `expert`, experts over `expert`. Each device routes its own groups, which never span
devices, and two tiled all-to-alls over `expert` move the slots. Over `model` each device moves its own part of the width. The
experts themselves run between `dispatch_tokens` and `combine_outputs`, where the compiler partitions them.
"""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from upcycle import partitioning
from upcycle.moe.routers.base import Routed
from upcycle.moe.routing import Mixing, Routing, here

DATA, EXPERT, MODEL = 'data', 'expert', 'model'
BATCH = (DATA, EXPERT)

# Names all-to-all results for rematerialisation policies, so that the backward pass need not repeat the all-to-alls.
CROSSED = 'crossed_the_network'


def dispatch_tokens(
    x_BxLxD: jax.Array,
    logits_BxLxN: jax.Array,
    real_BxL: jax.Array,
    config: Routed,
    groups: int,
    capacity: int,
    mesh: AbstractMesh | None,
    bias_E: jax.Array | None = None,
) -> tuple[jax.Array, Routing | Mixing, dict[str, jax.Array]]:
    """Routes tokens and moves them to their experts.

    Args:
      x_BxLxD: tokens.
      logits_BxLxN: router logits: N = E, or E * C for Soft MoE.
      real_BxL: bool, False at padding.
      config: the layer's.
      groups: G, a multiple of the devices along `data` and `expert`.
      capacity: C.
      mesh: in use, or None for one device.
      bias_E: added to scores for Top-K's choice only; None for no bias.

    Returns:
      (E, G, C, D) slots, split over `expert`, `data` and `model`; the routing; the layer's metrics.
    """
    G = groups // partitioning.batch_shards(mesh)
    across = here if mesh is None else functools.partial(jax.lax.psum, axis_name=BATCH)

    def local(x_BxLxD, logits_BxLxN, real_BxL, bias_E):
        x_GxSxD, logits_GxSxN, real_GxS = (a.reshape(G, -1, *a.shape[2:]) for a in (x_BxLxD, logits_BxLxN, real_BxL))
        routing, metrics = config.route(logits_GxSxN, real_GxS, capacity, across, bias_E)
        return _all_to_all(config.to_slots(x_GxSxD, routing), 0, 1, config, mesh), routing, metrics

    if mesh is None:
        return local(x_BxLxD, logits_BxLxN, real_BxL, bias_E)
    width = _width_axis(mesh, x_BxLxD.shape[-1])
    moved = jax.shard_map(
        local,
        in_specs=(P(BATCH, None, width), P(BATCH), P(BATCH), P()),
        out_specs=(P(EXPERT, DATA, None, width), P(BATCH), P()),
    )
    x_ExGxCxD, routing, metrics = moved(x_BxLxD, logits_BxLxN, real_BxL, bias_E)
    return jax.lax.with_sharding_constraint(x_ExGxCxD, P(EXPERT, DATA)), routing, metrics


def combine_outputs(
    y_ExGxCxD: jax.Array,
    routing: Routing | Mixing,
    shape: tuple[int, int, int],
    config: Routed,
    mesh: AbstractMesh | None,
) -> jax.Array:
    """Moves the experts' outputs back to their tokens and adds them up.

    Args:
      y_ExGxCxD: outputs for the slots of `dispatch_tokens`.
      routing: from `dispatch_tokens`.
      shape: (B, L, D) of the tokens.
      config: the layer's.
      mesh: in use, or None for one device.

    Returns:
      (B, L, D), the weighted sum of each token's slots; 0 for a token that no expert took.
    """
    tokens_per_group = shape[0] * shape[1] // y_ExGxCxD.shape[1]

    def local(y_ExGxCxD, routing):
        y_ExGxCxD = _all_to_all(y_ExGxCxD, 1, 0, config, mesh)
        y_GxSxD = config.from_slots(y_ExGxCxD, routing, tokens_per_group)
        return y_GxSxD.reshape(-1, shape[1], y_GxSxD.shape[-1])

    if mesh is None:
        return local(y_ExGxCxD, routing)
    width = _width_axis(mesh, shape[-1])

    def local_part(y_ExGxCxD, routing):
        if width is not None:
            # Each device sees its part of the width, so its part of a weight's gradient: they add up over `model`.
            routing = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, width, to='varying'), routing)
        return local(y_ExGxCxD, routing)

    y_ExGxCxD = jax.lax.with_sharding_constraint(y_ExGxCxD, P(EXPERT, DATA, None, width))
    moved = jax.shard_map(
        local_part, in_specs=(P(EXPERT, DATA, None, width), P(BATCH)), out_specs=P(BATCH, None, width)
    )
    return jax.lax.with_sharding_constraint(moved(y_ExGxCxD, routing), P(BATCH))


def _width_axis(mesh: AbstractMesh, width: int) -> str | None:
    """The mesh axis that splits the width of what travels; None if it does not divide the width."""
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
