"""Routers: from logits to which token sits in which slot, and with what weight. Pure functions of static shape, in float32.

Both routers return the same thing, a `Routing` by slot, so that dispatch does not care who chose. Routing is local to a group,
and groups never span devices; only losses and metrics are summed over them, by `across`.
"""

import jax
import jax.numpy as jnp

from upcycle.moe.config import FillOrder, MoEConfig, RoutePadding, RouterType, SharedWeights
from upcycle.moe.losses import auxiliary_loss_of, entropy, mean_over, mutual_information_loss, routing_metrics
from upcycle.moe.routing import (
    CHOSEN,
    Across,
    Choices,
    Mixing,
    Routing,
    Tokens,
    covered_tokens,
    decided,
    here,
    prepare,
    token_sums,
)


def route(
    logits_GxSxE: jax.Array,
    real_GxS: jax.Array,
    config: MoEConfig,
    capacity: int,
    across: Across = here,
    bias_E: jax.Array | None = None,
) -> tuple[Routing, dict[str, jax.Array]]:
    """Assigns tokens to slots.

    Args:
      logits_GxSxE: router logits, float32.
      real_GxS: bool, False at padding.
      config: which router, and its conventions.
      capacity: C.
      across: sums an array over the devices that hold the other groups.
      bias_E: of Top-K's choice, not of its weights; None: none.

    Returns:
      The routing, and the metrics of one layer (scalars, and `load` of shape (E,)); names are flaxformer's where it has them.
    """
    tokens = prepare(logits_GxSxE, real_GxS, config)
    if config.router is RouterType.EXPERT_CHOICE:
        everything_GxS = jnp.ones_like(real_GxS)
        takeable_GxS = real_GxS if config.route_padding is RoutePadding.SKIP else everything_GxS
        routing = _expert_choice(tokens.probs_GxSxE, takeable_GxS, capacity)
        auxiliary_loss = jnp.zeros(())
        dropped = jnp.zeros(())
    elif config.router is RouterType.DENSE:
        routing = _everybody(tokens, config.inference_threshold)
        auxiliary_loss = mutual_information_loss(tokens, across)
        dropped = jnp.zeros(())
    else:
        expert_GxSxK = _choose(tokens.probs_GxSxE, bias_E, config)
        routing, kept_GxSxK = _top_k(
            tokens.probs_GxSxE, expert_GxSxK, tokens.may_route_GxS, capacity, config.fill_order
        )
        auxiliary_loss = auxiliary_loss_of(tokens, expert_GxSxK, config, across)
        wanted = across(tokens.may_route_GxS.sum()) * config.num_selected_experts
        dropped = 1.0 - across(kept_GxSxK.sum()) / jnp.maximum(wanted, 1)

    S = logits_GxSxE.shape[1]
    if config.normalize_combine_weights:
        routing = _normalize(routing, num_tokens=S)
    if config.shared_weights is SharedWeights.XFT:
        routing = _leave_the_rest(routing, num_tokens=S)

    used_GxExC = routing.token_GxExC < S
    followed = {}
    if config.router is RouterType.TOP_K and bias_E is not None:
        followed = {CHOSEN: _share_of_choices(expert_GxSxK, tokens.may_route_GxS, config.num_experts, across)}
    metrics = followed | routing_metrics(
        tokens,
        across,
        used_E=used_GxExC.sum(axis=(0, 2)),
        slots=used_GxExC.size,
        covered=covered_tokens(routing, S).sum(),
        weight=routing.weight_GxExC.sum(),
    )
    return routing, metrics | {'auxiliary_loss': auxiliary_loss, 'fraction_dropped': dropped}


def route_dropless(
    logits_GxSxE: jax.Array, real_GxS: jax.Array, config: MoEConfig, bias_E: jax.Array | None = None
) -> tuple[Choices, dict[str, jax.Array]]:
    """Top-K without slots: every token goes to all K experts it chose. Arguments and metrics as `route`'s.

    It is token by token, so the compiler partitions it, and its sums are over all groups.
    """
    tokens = prepare(logits_GxSxE, real_GxS, config)
    E = logits_GxSxE.shape[-1]
    expert_GxSxK = _choose(tokens.probs_GxSxE, bias_E, config)
    weight_GxSxK = jnp.take_along_axis(tokens.probs_GxSxE, expert_GxSxK, axis=-1)
    auxiliary_loss = auxiliary_loss_of(tokens, expert_GxSxK, config, here)
    may_GxSx1 = tokens.may_route_GxS[..., None]
    expert_GxSxK = jnp.where(may_GxSx1, expert_GxSxK, E)
    weight_GxSxK = jnp.where(may_GxSx1, weight_GxSxK, 0.0)
    if config.normalize_combine_weights:
        weight_GxSxK /= jnp.maximum(weight_GxSxK.sum(axis=-1, keepdims=True), 1e-18)
    if config.shared_weights is SharedWeights.XFT:
        weight_GxSxK = weight_GxSxK.max(axis=-1, keepdims=True) * jax.nn.softmax(weight_GxSxK, axis=-1)
    used_E = jnp.zeros(E, jnp.int32).at[expert_GxSxK.reshape(-1)].add(1, mode='drop')
    metrics = routing_metrics(
        tokens,
        here,
        used_E=used_E,
        slots=used_E.sum(),
        covered=tokens.may_route_GxS.sum(),
        weight=weight_GxSxK.sum(),
    )
    if bias_E is not None:
        metrics[CHOSEN] = metrics['load']
    return Choices(expert_GxSxK, weight_GxSxK), metrics | {
        'auxiliary_loss': auxiliary_loss,
        'fraction_dropped': jnp.zeros(()),
    }


def mix(
    logits_GxSxN: jax.Array, real_GxS: jax.Array, config: MoEConfig, across: Across = here
) -> tuple[Mixing, dict[str, jax.Array]]:
    """Soft MoE (Puigcerver et al. 2023, arXiv 2308.00951, section 2.1). Arguments and metrics as `route`'s.

    Padding is in no slot and gets nothing, unless it is routed.
    """
    logits_GxSxN = logits_GxSxN.astype(jnp.float32)
    if config.route_padding is RoutePadding.ROUTE:
        real_GxS = jnp.ones_like(real_GxS)
    real_GxSx1 = real_GxS[..., None]
    # The least number, and not -inf, so that a group of nothing but padding has no nan.
    dispatch_GxSxN = jax.nn.softmax(jnp.where(real_GxSx1, logits_GxSxN, jnp.finfo(jnp.float32).min), axis=1)
    combine_GxSxN = jax.nn.softmax(logits_GxSxN, axis=-1) * real_GxSx1
    share_GxSxE = combine_GxSxN.reshape(*combine_GxSxN.shape[:2], config.num_experts, -1).sum(axis=-1)
    sum_E = across(share_GxSxE.sum(axis=(0, 1)))
    load_E = sum_E / jnp.maximum(sum_E.sum(), 1e-9)
    zero = jnp.zeros(())
    metrics = {
        'fraction_tokens_left_behind': zero,
        'router_confidence': jnp.ones(()),
        'expert_usage': jnp.ones(()),
        'router_entropy': mean_over(entropy(share_GxSxE), real_GxS, across),
        'load': load_E,
        'load_cv': jnp.std(load_E) * config.num_experts,
    }
    z_GxS = jnp.square(jax.nn.logsumexp(logits_GxSxN, axis=-1))
    return Mixing(dispatch_GxSxN, combine_GxSxN), jax.lax.stop_gradient(metrics) | {
        'router_z_loss': mean_over(z_GxS, real_GxS, across),
        'auxiliary_loss': zero,
        'fraction_dropped': zero,
    }


def probabilities(logits_BxLxE: jax.Array, real_BxL: jax.Array, config: MoEConfig) -> jax.Array:
    """Each token's probabilities of all experts, 0 where it may not route."""
    tokens = prepare(logits_BxLxE, real_BxL, config)
    return tokens.probs_GxSxE * tokens.may_route_GxS[..., None]


def _weighed(token_GxExC: jax.Array, probs_GxSxE: jax.Array) -> Routing:
    """The routing of the tokens in the slots: each weighs what its expert's probability is, an empty slot 0."""

    def one(token_ExC: jax.Array, probs_SxE: jax.Array) -> jax.Array:
        expert_Ex1 = jnp.arange(probs_SxE.shape[-1])[:, None]
        return probs_SxE.at[token_ExC, expert_Ex1].get(mode='fill', fill_value=0.0)

    return Routing(token_GxExC, jax.vmap(one)(token_GxExC, probs_GxSxE))


def _everybody(tokens: Tokens, threshold: float | None) -> Routing:
    """Every expert takes every token, or those whose probability is above the threshold."""
    _, probs_GxSxE, may_route_GxS, _ = tokens
    G, S, E = probs_GxSxE.shape
    takes_GxSxE = jnp.broadcast_to(may_route_GxS[..., None], probs_GxSxE.shape)
    if threshold is not None:
        takes_GxSxE &= probs_GxSxE > threshold
    takes_GxExS = takes_GxSxE.swapaxes(1, 2)
    token_GxExS = jnp.where(takes_GxExS, jnp.broadcast_to(jnp.arange(S), (G, E, S)), S)
    if threshold is not None:
        token_GxExS = decided(token_GxExS)
    return Routing(token_GxExS, jnp.where(token_GxExS < S, probs_GxSxE.swapaxes(1, 2), 0.0))


def _choose(probs_GxSxE: jax.Array, bias_E: jax.Array | None, config: MoEConfig) -> jax.Array:
    """The K experts of each token, (G, S, K)."""
    score_GxSxE = probs_GxSxE if bias_E is None else probs_GxSxE + jax.lax.stop_gradient(bias_E)
    return decided(jax.lax.top_k(score_GxSxE, config.num_selected_experts)[1])


def _share_of_choices(expert_GxSxK: jax.Array, may_route_GxS: jax.Array, num_experts: int, across: Across) -> jax.Array:
    """Of all choices those of each expert, found a slot or not."""
    expert_GxSxK = jnp.where(may_route_GxS[..., None], expert_GxSxK, num_experts)
    count_E = across(jnp.zeros(num_experts, jnp.int32).at[expert_GxSxK.reshape(-1)].add(1, mode='drop'))
    return count_E / jnp.maximum(count_E.sum(), 1)


def _expert_choice(probs_GxSxE: jax.Array, takeable_GxS: jax.Array, capacity: int) -> Routing:
    """Every expert takes its C most probable tokens (paper, section 2; Zhou et al. 2022)."""
    _, S, _ = probs_GxSxE.shape
    # -1 is below every probability: a padding token is taken only when nothing else is left, and then not kept.
    score_GxExS = jnp.where(takeable_GxS[..., None], probs_GxSxE, -1.0).swapaxes(1, 2)
    score_GxExC, token_GxExC = jax.lax.top_k(score_GxExS, capacity)
    return _weighed(decided(jnp.where(score_GxExC >= 0, token_GxExC, S)), probs_GxSxE)


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

    def slots(expert_SxK, slot_SxK):
        token_SxK = jnp.broadcast_to(jnp.arange(S)[:, None], (S, K))
        # Out of bounds means dropped: a full expert, or the expert that does not exist.
        return jnp.full((E, capacity), S).at[expert_SxK, slot_SxK].set(token_SxK, mode='drop')

    return _weighed(decided(jax.vmap(slots)(expert_GxSxK, slot_GxSxK)), probs_GxSxE), kept_GxSxK


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


def _leave_the_rest(routing: Routing, num_tokens: int) -> Routing:
    """XFT's weights (Ding et al. 2024, arXiv 2404.15247, section 3.1): the largest of a token's weights, shared out by a softmax
    over all of them. A shared expert gets the rest of 1, and so all of it where no expert took the token.
    """

    def over_tokens(slots_GxExC: jax.Array, reduce: str = 'add') -> jax.Array:
        """Sum or maximum over each token's slots, back in its slots."""

        def one(token_ExC, slots_ExC):
            per_token = getattr(jnp.zeros(num_tokens).at[token_ExC], reduce)(slots_ExC, mode='drop')
            return per_token.at[token_ExC].get(mode='fill', fill_value=1.0)

        return jax.vmap(one)(routing.token_GxExC, slots_GxExC)

    weight_GxExC = routing.weight_GxExC
    # A scattered maximum has no gradient: find where it is, then take it from there.
    is_largest_GxExC = weight_GxExC >= over_tokens(jax.lax.stop_gradient(weight_GxExC), 'max')
    largest_GxExC = over_tokens(weight_GxExC * is_largest_GxExC) / over_tokens(is_largest_GxExC.astype(jnp.float32))
    share_GxExC = jnp.exp(weight_GxExC) / over_tokens(jnp.exp(weight_GxExC))
    used_GxExC = routing.token_GxExC < num_tokens
    return routing._replace(weight_GxExC=jnp.where(used_GxExC, share_GxExC * largest_GxExC, 0.0))
