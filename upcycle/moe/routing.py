"""Routings: which token is in which slot with what weight, and the probabilities that routers start from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from upcycle.moe.conventions import RoutePadding, Scores

if TYPE_CHECKING:
    from upcycle.moe.routers.assigning import Assigning


class Routing(NamedTuple):
    """The token in each slot.

    Attributes:
      token_GxExC: int32, index of the slot's token within its group; S for an empty slot.
      weight_GxExC: float32, combine weight of that token for that expert; 0 for an empty slot.
    """

    token_GxExC: jax.Array
    weight_GxExC: jax.Array


class Choices(NamedTuple):
    """The experts of each token in dropless routing.

    Attributes:
      expert_GxSxK: int32; E for a token that is not routed.
      weight_GxSxK: float32, combine weights; 0 for a token that is not routed.
    """

    expert_GxSxK: jax.Array
    weight_GxSxK: jax.Array


class Mixing(NamedTuple):
    """Soft MoE's routing, with N = E * C slots, expert by expert.

    Attributes:
      dispatch_GxSxN: float32, share of each token in a slot; sums to 1 over tokens.
      combine_GxSxN: float32, share of each slot in a token; sums to 1 over slots, or to 0 at padding.
    """

    dispatch_GxSxN: jax.Array
    combine_GxSxN: jax.Array


Across = Callable[[jax.Array], jax.Array]

# A metric of routers with a bias: each expert's share of the choices.
CHOSEN = 'chosen'
# Names decisions for `models.stack.Remat`, which keeps them: recomputed logits are rounded differently and could decide
# otherwise.
DECISION = 'routing_decision'


def here(x: jax.Array) -> jax.Array:
    """Sums over devices when all groups are on this one: the identity."""
    return x


class Tokens(NamedTuple):
    """Input of routers.

    Attributes:
      logits_GxSxE: float32.
      scores_GxSxE: what experts are chosen by and weighted with: probabilities, or sigmoids.
      probs_GxSxE: scores divided by their sum over experts, for losses and metrics.
      may_route_GxS: which tokens may take a slot.
      in_loss_GxS: which tokens count in the means of losses.
    """

    logits_GxSxE: jax.Array
    scores_GxSxE: jax.Array
    probs_GxSxE: jax.Array
    may_route_GxS: jax.Array
    in_loss_GxS: jax.Array


def prepare(logits_GxSxE: jax.Array, real_GxS: jax.Array, config: 'Assigning') -> Tokens:
    """Computes scores in float32, and applies `config.route_padding`."""
    logits_GxSxE = normalized_logits(logits_GxSxE.astype(jnp.float32), config)
    if config.score_function is Scores.SOFTMAX:
        scores_GxSxE = probs_GxSxE = jax.nn.softmax(logits_GxSxE, axis=-1)
    else:
        scores_GxSxE = jax.nn.sigmoid(logits_GxSxE)
        probs_GxSxE = scores_GxSxE / jnp.maximum(scores_GxSxE.sum(axis=-1, keepdims=True), 1e-18)
    everything_GxS = jnp.ones_like(real_GxS)
    if config.route_padding is RoutePadding.DOWN_WEIGHT:
        scores_GxSxE, probs_GxSxE = scores_GxSxE * real_GxS[..., None], probs_GxSxE * real_GxS[..., None]
        logits_GxSxE = logits_GxSxE * real_GxS[..., None]
    return Tokens(
        logits_GxSxE,
        scores_GxSxE,
        probs_GxSxE,
        may_route_GxS=everything_GxS if config.route_padding is RoutePadding.ROUTE else real_GxS,
        in_loss_GxS=real_GxS if config.route_padding is RoutePadding.SKIP else everything_GxS,
    )


def normalized_logits(logits_GxSxE: jax.Array, config: 'Assigning') -> jax.Array:
    """Standardises logits if the configuration asks for it (Wei et al. 2024, arXiv 2406.06563, section 3.1)."""
    if config.logit_normalization is None:
        return logits_GxSxE
    centred_GxSxE = logits_GxSxE - logits_GxSxE.mean(axis=-1, keepdims=True)
    # Equal logits, such as those of zeroed padding, stay equal; the floor keeps their gradient finite.
    variance_GxSx1 = jnp.square(centred_GxSxE).mean(axis=-1, keepdims=True)
    return config.logit_normalization * centred_GxSxE * jax.lax.rsqrt(variance_GxSx1 + 1e-12)


def decided(index: jax.Array) -> jax.Array:
    """Names integers that were decided by logits, so that rematerialisation keeps them."""
    return checkpoint_name(index, DECISION)


def token_sums(routing: Routing | Choices | Mixing, num_tokens: int) -> jax.Array:
    """Sums each token's combine weights, (G, S); 0 for a token that no expert took."""
    if isinstance(routing, Mixing):
        return routing.combine_GxSxN.sum(axis=-1)
    if isinstance(routing, Choices):
        return routing.weight_GxSxK.sum(axis=-1)
    return jax.vmap(lambda token, weight: jnp.zeros(num_tokens).at[token].add(weight, mode='drop'))(
        routing.token_GxExC, routing.weight_GxExC
    )


def covered_tokens(routing: Routing | Choices | Mixing, num_tokens: int) -> jax.Array:
    """Returns bool (G, S), True if at least one expert took the token."""
    if isinstance(routing, Mixing):
        return (routing.combine_GxSxN > 0).any(axis=-1)
    if isinstance(routing, Choices):
        return (routing.weight_GxSxK > 0).any(axis=-1)
    return jax.vmap(lambda token: jnp.zeros(num_tokens, bool).at[token].set(True, mode='drop'))(routing.token_GxExC)


def weighed(token_GxExC: jax.Array, scores_GxSxE: jax.Array) -> Routing:
    """Returns the routing of the tokens in the slots, weighted by their scores; empty slots have weight 0."""

    def one(token_ExC: jax.Array, scores_SxE: jax.Array) -> jax.Array:
        expert_Ex1 = jnp.arange(scores_SxE.shape[-1])[:, None]
        return scores_SxE.at[token_ExC, expert_Ex1].get(mode='fill', fill_value=0.0)

    return Routing(token_GxExC, jax.vmap(one)(token_GxExC, scores_GxSxE))


def combine_weights(routing: Routing | Choices, num_tokens: int, config: 'Assigning') -> Routing | Choices:
    """Turns the weights of a routing, scores so far, into combine weights."""
    if config.normalize_combine_weights:
        routing = _normalize(routing, num_tokens)
    if config.leaves_the_rest:
        routing = _leave_the_rest(routing, num_tokens)
    if config.scale_of_weights != 1:
        token, weight = routing
        routing = type(routing)(token, config.scale_of_weights * weight)
    return routing


def _normalize(routing: Routing | Choices, num_tokens: int) -> Routing | Choices:
    """Divides a token's weights by their sum, so that a covered token's weights sum to 1 (paper, section 3.1).

    The floor keeps the gradient finite, which divides by the square of the sum: a saturated router can give an expert a token
    with a probability whose square is 0 in float32. Such a token fades out.
    """
    token, weight = routing
    return type(routing)(token, weight / jnp.maximum(_over_tokens(routing, weight, num_tokens), 1e-18))


def _leave_the_rest(routing: Routing | Choices, num_tokens: int) -> Routing | Choices:
    """Applies XFT's weights (Ding et al. 2024, arXiv 2404.15247, section 3.1).

    A softmax over a token's weights distributes the largest of them. Shared experts get the rest of 1, and so 1 for a token that
    no expert took.
    """
    token, weight = routing
    # A scattered maximum has no gradient: find its place, and take it from there.
    is_largest = weight >= _over_tokens(routing, jax.lax.stop_gradient(weight), num_tokens, 'max')
    largest = _over_tokens(routing, weight * is_largest, num_tokens)
    largest /= _over_tokens(routing, is_largest.astype(jnp.float32), num_tokens)
    share = jnp.exp(weight) / _over_tokens(routing, jnp.exp(weight), num_tokens)
    used = token < num_tokens if isinstance(routing, Routing) else True
    return type(routing)(token, jnp.where(used, share * largest, 0.0))


def _over_tokens(routing: Routing | Choices, values: jax.Array, num_tokens: int, reduce: str = 'add') -> jax.Array:
    """Sums (`reduce` = 'add') or maxima ('max') of the values over each token's slots, back in its slots; 1 in empty slots."""
    if isinstance(routing, Choices):
        return (values.max if reduce == 'max' else values.sum)(axis=-1, keepdims=True)

    def one(token_ExC: jax.Array, values_ExC: jax.Array) -> jax.Array:
        per_token = getattr(jnp.zeros(num_tokens).at[token_ExC], reduce)(values_ExC, mode='drop')
        return per_token.at[token_ExC].get(mode='fill', fill_value=1.0)

    return jax.vmap(one)(routing.token_GxExC, values)
