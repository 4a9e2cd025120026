"""Routers: from logits to which token sits in which slot, and with what weight. Pure functions of static shape, in float32.

Both routers return the same thing, a `Routing` by slot, so that dispatch does not care who chose.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from upcycle.moe.config import FillOrder, MoEConfig, RoutePadding, RouterType


class Routing(NamedTuple):
    """Which token sits in each slot.

    Attributes:
      token_GxExC: int32, the index within its group of the token in each slot; S where the slot is empty.
      weight_GxExC: float32, the combine weight of that token for that expert; 0 where the slot is empty.
    """

    token_GxExC: jax.Array
    weight_GxExC: jax.Array


def route(
    logits_GxSxE: jax.Array, real_GxS: jax.Array, config: MoEConfig, capacity: int
) -> tuple[Routing, dict[str, jax.Array]]:
    """Assigns tokens to slots.

    Args:
      logits_GxSxE: router logits, float32.
      real_GxS: bool, False at padding.
      config: which router, and its conventions.
      capacity: C.

    Returns:
      The routing, and the metrics of one layer (scalars, and `load` of shape (E,)); names are flaxformer's where it has them.
    """
    logits_GxSxE = logits_GxSxE.astype(jnp.float32)
    probs_GxSxE = jax.nn.softmax(logits_GxSxE, axis=-1)
    everything_GxS = jnp.ones_like(real_GxS)
    # Who may take a slot, and who is counted in the losses' means and in the metrics.
    may_route_GxS = everything_GxS if config.route_padding is RoutePadding.ROUTE else real_GxS
    in_loss_GxS = real_GxS if config.route_padding is RoutePadding.SKIP else everything_GxS
    if config.route_padding is RoutePadding.DOWN_WEIGHT:
        probs_GxSxE = probs_GxSxE * real_GxS[..., None]
        logits_GxSxE = logits_GxSxE * real_GxS[..., None]

    if config.router is RouterType.EXPERT_CHOICE:
        takeable_GxS = real_GxS if config.route_padding is RoutePadding.SKIP else everything_GxS
        routing = _expert_choice(probs_GxSxE, takeable_GxS, capacity)
        auxiliary_loss = jnp.zeros(())
        dropped = jnp.zeros(())
    else:
        _, expert_GxSxK = jax.lax.top_k(probs_GxSxE, config.num_selected_experts)
        routing, kept_GxSxK = _top_k(probs_GxSxE, expert_GxSxK, may_route_GxS, capacity, config.fill_order)
        auxiliary_loss = _load_balancing_loss(probs_GxSxE, expert_GxSxK, may_route_GxS, in_loss_GxS)
        wanted = may_route_GxS.sum() * config.num_selected_experts
        dropped = 1.0 - kept_GxSxK.sum() / jnp.maximum(wanted, 1)

    if config.normalize_combine_weights:
        routing = _normalize(routing, num_tokens=probs_GxSxE.shape[1])

    metrics = _metrics(routing, probs_GxSxE, may_route_GxS)
    metrics['auxiliary_loss'] = auxiliary_loss
    metrics['fraction_dropped'] = dropped
    z_GxS = jnp.square(jax.nn.logsumexp(logits_GxSxE, axis=-1))
    metrics['router_z_loss'] = _mean(z_GxS, in_loss_GxS)
    return routing, metrics


def _expert_choice(probs_GxSxE: jax.Array, takeable_GxS: jax.Array, capacity: int) -> Routing:
    """Every expert takes its C most probable tokens (paper, section 2; Zhou et al. 2022)."""
    _, S, _ = probs_GxSxE.shape
    # -1 is below every probability: a padding token is taken only when nothing else is left, and then not kept.
    score_GxExS = jnp.where(takeable_GxS[..., None], probs_GxSxE, -1.0).swapaxes(1, 2)
    score_GxExC, token_GxExC = jax.lax.top_k(score_GxExS, capacity)
    kept_GxExC = score_GxExC >= 0
    return Routing(jnp.where(kept_GxExC, token_GxExC, S), jnp.where(kept_GxExC, score_GxExC, 0.0))


def _top_k(
    probs_GxSxE: jax.Array,
    expert_GxSxK: jax.Array,
    may_route_GxS: jax.Array,
    capacity: int,
    fill_order: FillOrder,
) -> tuple[Routing, jax.Array]:
    """Every token takes its K most probable experts; an expert's slots fill in `fill_order`, and what overflows is dropped.

    Returns the routing and bool (G, S, K), the choices that found a slot.
    """
    G, S, E = probs_GxSxE.shape
    K = expert_GxSxK.shape[-1]
    # Expert E does not exist: a token that may not route asks for it, and so counts nowhere.
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, E)
    queue_GxSxK = expert_GxSxK
    if fill_order is FillOrder.PRIORITY:
        best_GxS = jnp.where(may_route_GxS, probs_GxSxE.max(axis=-1), -1.0)
        order_GxS = jnp.argsort(-best_GxS, axis=-1)
        queue_GxSxK = jnp.take_along_axis(expert_GxSxK, order_GxS[..., None], axis=1)
    if fill_order is FillOrder.TOKEN_MAJOR:
        queue_GxN = queue_GxSxK.reshape(G, S * K)
    else:
        queue_GxN = queue_GxSxK.swapaxes(1, 2).reshape(G, K * S)
    asked_GxNxE = jax.nn.one_hot(queue_GxN, E, dtype=jnp.int32)
    slot_GxN = jnp.sum(jnp.cumsum(asked_GxNxE, axis=1) * asked_GxNxE, axis=-1) - 1
    if fill_order is FillOrder.TOKEN_MAJOR:
        slot_GxSxK = slot_GxN.reshape(G, S, K)
    else:
        slot_GxSxK = slot_GxN.reshape(G, K, S).swapaxes(1, 2)
    if fill_order is FillOrder.PRIORITY:
        slot_GxSxK = jnp.take_along_axis(slot_GxSxK, jnp.argsort(order_GxS, axis=-1)[..., None], axis=1)
    kept_GxSxK = (expert_GxSxK < E) & (slot_GxSxK < capacity)

    def slots(expert_SxK, slot_SxK, probs_SxE):
        token_SxK = jnp.broadcast_to(jnp.arange(S)[:, None], (S, K))
        # Out of bounds means dropped: a full expert, or the expert that does not exist.
        token_ExC = jnp.full((E, capacity), S).at[expert_SxK, slot_SxK].set(token_SxK, mode='drop')
        weight_ExC = probs_SxE.at[token_ExC, jnp.arange(E)[:, None]].get(mode='fill', fill_value=0.0)
        return Routing(token_ExC, weight_ExC)

    return jax.vmap(slots)(expert_GxSxK, slot_GxSxK, probs_GxSxE), kept_GxSxK


def token_sums(routing: Routing, num_tokens: int) -> jax.Array:
    """Sum of each token's combine weights, (G, S); 0 for a token that no expert took."""
    return jax.vmap(lambda token, weight: jnp.zeros(num_tokens).at[token].add(weight, mode='drop'))(
        routing.token_GxExC, routing.weight_GxExC
    )


def covered_tokens(routing: Routing, num_tokens: int) -> jax.Array:
    """Bool (G, S): at least one expert took the token."""
    return jax.vmap(lambda token: jnp.zeros(num_tokens, bool).at[token].set(True, mode='drop'))(routing.token_GxExC)


def _normalize(routing: Routing, num_tokens: int) -> Routing:
    """Divides a token's weights by their sum, so that a covered token's weights add up to 1 (paper, section 3.1).

    The floor keeps the gradient finite, which divides by the square of the sum: a saturated router can leave a token to an expert
    at a probability whose square is 0 in float32. Such a token fades out.
    """
    sum_GxS = token_sums(routing, num_tokens)
    sum_GxExC = jax.vmap(lambda sums, token: sums.at[token].get(mode='fill', fill_value=1.0))(
        sum_GxS, routing.token_GxExC
    )
    return routing._replace(weight_GxExC=routing.weight_GxExC / jnp.maximum(sum_GxExC, 1e-18))


def _load_balancing_loss(
    probs_GxSxE: jax.Array, expert_GxSxK: jax.Array, may_route_GxS: jax.Array, in_loss_GxS: jax.Array
) -> jax.Array:
    """E^2 * mean over groups and experts of (share of tokens that chose e) * (mean probability of e): Switch eq. 4-6."""
    E = probs_GxSxE.shape[-1]
    chose_GxSxE = jax.nn.one_hot(expert_GxSxK, E).max(axis=-2) * may_route_GxS[..., None]
    count_Gx1 = jnp.maximum(in_loss_GxS.sum(axis=-1, keepdims=True), 1)
    share_GxE = (chose_GxSxE * in_loss_GxS[..., None]).sum(axis=1) / count_Gx1
    prob_GxE = (probs_GxSxE * in_loss_GxS[..., None]).sum(axis=1) / count_Gx1
    return jnp.mean(share_GxE * prob_GxE) * E**2


def _metrics(routing: Routing, probs_GxSxE: jax.Array, counted_GxS: jax.Array) -> dict[str, jax.Array]:
    """Routing metrics over the counted tokens, each a scalar but `load`, the share of the routed tokens at each expert."""
    G, S, E = probs_GxSxE.shape
    used_GxExC = routing.token_GxExC < S
    used_E = used_GxExC.sum(axis=(0, 2))
    used = jnp.maximum(used_E.sum(), 1)
    load_E = used_E / used
    counted = jnp.maximum(counted_GxS.sum(), 1)
    log_probs_GxSxE = jnp.log(jnp.maximum(probs_GxSxE, 1e-30))
    entropy_GxS = -(probs_GxSxE * log_probs_GxSxE).sum(axis=-1)
    metrics = {
        'fraction_tokens_left_behind': 1.0 - covered_tokens(routing, S).sum() / counted,
        'router_confidence': routing.weight_GxExC.sum() / used,
        'expert_usage': used_E.sum() / used_GxExC.size,
        'router_entropy': _mean(entropy_GxS, counted_GxS),
        'load': load_E,
        'load_cv': jnp.std(load_E) * E,
    }
    return jax.lax.stop_gradient(metrics)


def _mean(x_GxS: jax.Array, counted_GxS: jax.Array) -> jax.Array:
    return (x_GxS * counted_GxS).sum() / jnp.maximum(counted_GxS.sum(), 1)
