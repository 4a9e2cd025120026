"""Exchanges of dropless layers: how tokens meet the experts that other devices hold.

An exchange is a function of a device's `Share` of the layer, called under `shard_map`. All give the sums that one device would
give, except for choices that their buffers have no room for. Which choices those are never depends on later tokens of a sequence.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from upcycle.kernels import at_uniform_load
from upcycle.moe.all_to_all import CROSSED, EXPERT
from upcycle.moe.conventions import Exchange
from upcycle.moe.moves import Move, by_key, moved
from upcycle.moe.routers.top_k import TopK

# (expert parameters, rows sorted by expert, number of rows of each expert) -> rows; rows after the last run are undefined.
Experts = Callable[[Any, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Share:
    """A device's share of a layer.

    Attributes:
      experts: applies the device's experts.
      params: of these experts.
      x_NxD: the device's tokens.
      expert_NxK: their choices among all experts; E for a token that is not routed.
      weight_NxK: combine weights.
      config: of the layer.
      shards: number of devices among which the experts are split.
      width: of the experts' outputs.
    """

    experts: Experts
    params: Any
    x_NxD: jax.Array
    expert_NxK: jax.Array
    weight_NxK: jax.Array
    config: TopK
    shards: int
    width: int

    @property
    def experts_a_shard(self) -> int:
        """Number of the device's experts."""
        return self.config.num_experts // self.shards

    def apply(self, x_RxD: jax.Array, sizes_M: jax.Array, load: float = 1.0) -> jax.Array:
        """Applies the device's experts to rows sorted by expert, at a uniform load `load` times as many as its choices."""
        rows = min(int(load * self.expert_NxK.size), len(x_RxD))
        return self.experts(self.params, x_RxD, at_uniform_load(sizes_M, rows))

    @property
    def room(self) -> int:
        """Rows of the buffer of a device, a multiple of the shards."""
        choices = self.expert_NxK.size
        each = math.ceil(self.config.exchange_capacity_factor * choices / self.shards)
        return self.shards * min(each, choices)

    def sum(self, y_RxD: jax.Array) -> jax.Array:
        """Sums the outputs for each token's choices, weighted, in float32."""
        y_NxKxD = y_RxD.reshape(*self.expert_NxK.shape, -1)
        return (y_NxKxD.astype(jnp.float32) * self.weight_NxK[..., None]).sum(axis=1)

    def sent(self, x: jax.Array) -> jax.Array:
        """Casts activations to the type that travels."""
        return x if self.config.network_dtype is None else x.astype(self.config.network_dtype)


def part_of_sum(
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
    index_NxK = expert_NxK - first
    mine_NxK = (index_NxK >= 0) & (index_NxK < num_experts)
    # Rows of other experts sort to the end, where no run covers them.
    move, sizes_E = by_key(jnp.where(mine_NxK, index_NxK, num_experts).reshape(-1), num_experts)
    y_RxD = experts(params, moved(x_NxD, move, expert_NxK.shape[1]), sizes_E)
    y_NxKxD = moved(y_RxD, move.inverse()).reshape(*expert_NxK.shape, width).astype(jnp.float32)
    return (jnp.where(mine_NxK[..., None], y_NxKxD, 0) * weight_NxK[..., None]).sum(axis=1)


def ring(share: Share) -> tuple[jax.Array, jax.Array]:
    """Sends tokens once around all shards, where they collect each shard's part of their sum."""
    num_experts = share.experts_a_shard
    first = jax.lax.axis_index(EXPERT) * num_experts
    to_next = [(i, (i + 1) % share.shards) for i in range(share.shards)]

    def experts(_: Any, x_RxD: jax.Array, sizes_E: jax.Array) -> jax.Array:
        return share.apply(x_RxD, sizes_E, 1 / share.shards)

    def pass_on(x: jax.Array) -> jax.Array:
        sent = share.sent(x) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.lax.ppermute(sent, EXPERT, to_next).astype(x.dtype)

    # Without rematerialisation every stop would keep its hidden activations, in total those of all tokens in the ring.
    @jax.checkpoint
    def stop(travelling, _):
        x_NxD, expert_NxK, weight_NxK, sum_NxD = travelling
        sum_NxD += part_of_sum(experts, share.params, x_NxD, expert_NxK, weight_NxK, num_experts, first, share.width)
        # Weights travel in float32: rounding them would round the router.
        weight_NxK = jax.lax.ppermute(weight_NxK, EXPERT, to_next)
        return (pass_on(x_NxD), pass_on(expert_NxK), weight_NxK, pass_on(sum_NxD)), None

    start = (share.x_NxD, share.expert_NxK, share.weight_NxK, jnp.zeros((len(share.x_NxD), share.width), jnp.float32))
    (_, _, _, sum_NxD), _ = jax.lax.scan(stop, start, None, length=share.shards)
    return sum_NxD, jnp.zeros((), jnp.int32)


def all_to_all(share: Share) -> tuple[jax.Array, jax.Array]:
    """Sends each choice to its shard, in equal buffers for all pairs of devices, and its output back.

    Choices of a full buffer are dropped, the last tokens' first.
    """
    S, E, K = share.shards, share.experts_a_shard, share.expert_NxK.shape[1]
    Q, C = share.room, share.room // share.shards
    shard_R, row_R, place_R, sizes_S = _by_shard(share)
    kept_R = (shard_R < S) & (place_R < C)
    slot_SxC = (jnp.cumsum(sizes_S) - sizes_S)[:, None] + jnp.arange(C)
    row_SxC = row_R.at[slot_SxC].get(mode='fill', fill_value=len(row_R))
    row_SxC = jnp.where(jnp.arange(C) < sizes_S[:, None], row_SxC, len(row_R))
    to_slots = Move(row_SxC.reshape(-1), jnp.where(kept_R, shard_R * C + place_R, Q))

    def cross(x: jax.Array) -> jax.Array:
        x_SxCxD = x.reshape(S, C, *x.shape[1:])
        return jax.lax.all_to_all(x_SxCxD, EXPERT, 0, 0, tiled=True).reshape(x.shape)

    def cross_with_name(x_QxD: jax.Array) -> jax.Array:
        return checkpoint_name(cross(share.sent(x_QxD)), CROSSED).astype(x_QxD.dtype)

    expert_R = (share.expert_NxK % E).reshape(-1)
    expert_Q = cross(expert_R.at[to_slots.row_Q].get(mode='fill', fill_value=E))
    move, sizes_E = by_key(expert_Q, E)
    x_QxD = moved(cross_with_name(moved(share.x_NxD, to_slots, K)), move)
    y_QxD = moved(share.apply(x_QxD, sizes_E), move.inverse())
    y_RxD = moved(cross_with_name(y_QxD), to_slots.inverse())
    return share.sum(y_RxD), _dropped(shard_R, kept_R, S)


class _Slices(NamedTuple):
    """Slices that travel, one for each pair of an expert and a device that sends or gets rows of it.

    Attributes: those of `jax.lax.ragged_all_to_all`, each of length E.
    """

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


def ragged_all_to_all(share: Share) -> tuple[jax.Array, jax.Array]:
    """Sends each choice to its shard, and its output back. Each device has one buffer for what all devices send to it.

    It arrives sorted by expert. A device may always fill an even part of another's buffer, and devices before it may fill what
    others leave free. Further choices are dropped, the last tokens' first.
    """
    S, E, K = share.shards, share.config.num_experts, share.expert_NxK.shape[1]
    me, mine = jax.lax.axis_index(EXPERT), share.experts_a_shard
    shard_R, _, place_R, sizes_S = _by_shard(share)
    allowed_S = allowances(jax.lax.all_gather(sizes_S, EXPERT), share.room)[me]
    kept_R = place_R < allowed_S.at[shard_R].get(mode='fill', fill_value=0)
    move, sizes_E = by_key(jnp.where(kept_R, share.expert_NxK.reshape(-1), E), E)
    R = len(kept_R)
    to_runs = Move(jnp.where(jnp.arange(R) < sizes_E.sum(), move.row_Q, R), jnp.where(kept_R, move.place_R, R))

    sizes_SxE = jax.lax.all_gather(sizes_E, EXPERT)
    start_SxE = jnp.cumsum(sizes_SxE, axis=1) - sizes_SxE
    # Buffers hold the rows of an expert device by device.
    sizes_ShxExS = sizes_SxE.T.reshape(S, mine * S)
    offset_SxE = (jnp.cumsum(sizes_ShxExS, axis=1) - sizes_ShxExS).reshape(E, S).T

    def here(a_SxE: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(a_SxE, me * mine, mine, axis=1).reshape(-1)

    there = _Slices(start_SxE[me], sizes_E, offset_SxE[me], here(sizes_SxE))
    back = _Slices(here(offset_SxE), here(sizes_SxE), here(start_SxE), sizes_E)

    def cross(x: jax.Array, slices: _Slices, reverse: _Slices, rows: int) -> jax.Array:
        return checkpoint_name(_travelled(share.sent(x), slices, reverse, rows, S), CROSSED).astype(x.dtype)

    x_QxD = cross(moved(share.x_NxD, to_runs, K), there, back, share.room)
    sizes_M = here(sizes_SxE).reshape(S, mine).sum(axis=0)
    y_RxD = cross(share.apply(x_QxD, sizes_M), back, there, R)
    return share.sum(moved(y_RxD, to_runs.inverse())), _dropped(shard_R, kept_R, S)


# By name: a new exchange is a function and a member of `Exchange`.
EXCHANGES: dict[Exchange, Callable[[Share], tuple[jax.Array, jax.Array]]] = {
    Exchange.RING: ring,
    Exchange.ALL_TO_ALL: all_to_all,
    Exchange.RAGGED_ALL_TO_ALL: ragged_all_to_all,
}


def _by_shard(share: Share) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sorts choices by the shard of their expert.

    Returns:
      The shard of each choice, the number of shards for none; the choices of the shards, in order of tokens; each choice's place
      among those of its shard; their number for each shard.
    """
    shard_R = share.expert_NxK.reshape(-1) // share.experts_a_shard
    move, sizes_S = by_key(shard_R, share.shards)
    start_S = jnp.cumsum(sizes_S) - sizes_S
    return shard_R, move.row_Q, move.place_R - start_S.at[shard_R].get(mode='fill', fill_value=0), sizes_S


def _dropped(shard_R: jax.Array, kept_R: jax.Array, shards: int) -> jax.Array:
    return (shard_R < shards).sum(dtype=jnp.int32) - kept_R.sum(dtype=jnp.int32)


def allowances(wanted_SxS: jax.Array, room: int) -> jax.Array:
    """How many rows each device may send to each shard, given how many it wants to send and the rows of a buffer."""
    even_SxS = jnp.minimum(wanted_SxS, room // len(wanted_SxS))
    rest_SxS = wanted_SxS - even_SxS
    free_SxS = room - even_SxS.sum(axis=0) - (jnp.cumsum(rest_SxS, axis=0) - rest_SxS)
    return even_SxS + jnp.clip(free_SxS, 0, rest_SxS)


def _travelled(x_NxD: jax.Array, slices: _Slices, reverse: _Slices, rows: int, shards: int) -> jax.Array:
    """Sends slices of rows to their devices, which get `rows` rows, zeros where nothing arrives; `reverse` undoes it."""

    @jax.custom_vjp
    def travel(x_NxD: jax.Array, slices: _Slices, reverse: _Slices) -> jax.Array:
        return send(x_NxD, slices, rows)

    def send(x_NxD: jax.Array, slices: _Slices, rows: int) -> jax.Array:
        return jax.lax.platform_dependent(
            x_NxD,
            *slices,
            cpu=lambda x_NxD, *slices: _imitated(x_NxD, _Slices(*slices), rows, shards),
            default=lambda x_NxD, *slices: jax.lax.ragged_all_to_all(
                x_NxD, jnp.zeros((rows, *x_NxD.shape[1:]), x_NxD.dtype), *slices, axis_name=EXPERT
            ),
        )

    def forward(x_NxD: jax.Array, slices: _Slices, reverse: _Slices) -> tuple[jax.Array, _Slices]:
        return travel(x_NxD, slices, reverse), reverse

    def backward(reverse: _Slices, dy_MxD: jax.Array) -> tuple[jax.Array, None, None]:
        return send(dy_MxD, reverse, len(x_NxD)), None, None

    travel.defvjp(forward, backward)
    return travel(x_NxD, slices, reverse)


def _imitated(x_NxD: jax.Array, slices: _Slices, rows: int, shards: int) -> jax.Array:
    """`jax.lax.ragged_all_to_all` by gathering everything: XLA:CPU has none."""
    me, N = jax.lax.axis_index(EXPERT), len(x_NxD)
    everything_TxD = jax.lax.all_gather(x_NxD, EXPERT, tiled=True)
    sent = [jax.lax.all_gather(a, EXPERT).reshape(shards, shards, -1)[:, me] for a in slices]
    first_SxM, size_SxM, target_SxM, _ = sent
    at_SxMxQ = jnp.arange(rows) - target_SxM[..., None]
    row_SxMxQ = N * jnp.arange(shards)[:, None, None] + first_SxM[..., None] + at_SxMxQ
    is_here_SxMxQ = (at_SxMxQ >= 0) & (at_SxMxQ < size_SxM[..., None])
    row_Q = jnp.where(is_here_SxMxQ, row_SxMxQ, shards * N).min(axis=(0, 1))
    return everything_TxD.at[row_Q].get(mode='fill', fill_value=0)
