"""What a router decides: which token is in which slot, and with what weight; and the probabilities that it starts from."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from upcycle.moe.config import MoEConfig, RoutePadding


class Routing(NamedTuple):
    """Which token sits in each slot.

    Attributes:
      token_GxExC: int32, the index within its group of the token in each slot; S where the slot is empty.
      weight_GxExC: float32, the combine weight of that token for that expert; 0 where the slot is empty.
    """

    token_GxExC: jax.Array
    weight_GxExC: jax.Array


class Choices(NamedTuple):
    """Which experts each token goes to, where nothing is dropped.

    Attributes:
      expert_GxSxK: int32; E where a token goes nowhere.
      weight_GxSxK: float32, the combine weights; 0 where a token goes nowhere.
    """

    expert_GxSxK: jax.Array
    weight_GxSxK: jax.Array


class Mixing(NamedTuple):
    """Soft MoE's routing. N = E * C slots, expert by expert.

    Attributes:
      dispatch_GxSxN: float32, the share of each token in a slot; over tokens they add up to 1.
      combine_GxSxN: float32, the share of each slot in a token; over slots they add up to 1, or 0 at padding.
    """

    dispatch_GxSxN: jax.Array
    combine_GxSxN: jax.Array


Across = Callable[[jax.Array], jax.Array]

# A metric of routers with a bias: the share of the choices that fell on each expert.
CHOSEN = 'chosen'
# The name by which `models.stack.Remat` saves decisions: recomputed logits are rounded differently, and could decide differently.
DECISION = 'routing_decision'


def here(x: jax.Array) -> jax.Array:
    """The sum over devices, where all groups are on this one."""
    return x


class Tokens(NamedTuple):
    """What both routers start from: probabilities, who may take a slot, and who counts in the losses' means."""

    logits_GxSxE: jax.Array
    probs_GxSxE: jax.Array
    may_route_GxS: jax.Array
    in_loss_GxS: jax.Array


def prepare(logits_GxSxE: jax.Array, real_GxS: jax.Array, config: MoEConfig) -> Tokens:
    logits_GxSxE = normalized_logits(logits_GxSxE.astype(jnp.float32), config)
    probs_GxSxE = jax.nn.softmax(logits_GxSxE, axis=-1)
    everything_GxS = jnp.ones_like(real_GxS)
    if config.route_padding is RoutePadding.DOWN_WEIGHT:
        probs_GxSxE = probs_GxSxE * real_GxS[..., None]
        logits_GxSxE = logits_GxSxE * real_GxS[..., None]
    return Tokens(
        logits_GxSxE,
        probs_GxSxE,
        may_route_GxS=everything_GxS if config.route_padding is RoutePadding.ROUTE else real_GxS,
        in_loss_GxS=real_GxS if config.route_padding is RoutePadding.SKIP else everything_GxS,
    )


def normalized_logits(logits_GxSxE: jax.Array, config: MoEConfig) -> jax.Array:
    """Centred and divided by their deviation, where that is asked for (Wei et al. 2024, arXiv 2406.06563, section 3.1)."""
    if config.logit_normalization is None:
        return logits_GxSxE
    centred_GxSxE = logits_GxSxE - logits_GxSxE.mean(axis=-1, keepdims=True)
    # Equal logits, as of padding that is zeros, stay equal; the floor keeps their gradient finite.
    variance_GxSx1 = jnp.square(centred_GxSxE).mean(axis=-1, keepdims=True)
    return config.logit_normalization * centred_GxSxE * jax.lax.rsqrt(variance_GxSx1 + 1e-12)


def decided(index: jax.Array) -> jax.Array:
    """Integers that the logits decided, under the name by which rematerialisation saves them."""
    return checkpoint_name(index, DECISION)


def token_sums(routing: Routing | Choices | Mixing, num_tokens: int) -> jax.Array:
    """Sum of each token's combine weights, (G, S); 0 for a token that no expert took."""
    if isinstance(routing, Mixing):
        return routing.combine_GxSxN.sum(axis=-1)
    if isinstance(routing, Choices):
        return routing.weight_GxSxK.sum(axis=-1)
    return jax.vmap(lambda token, weight: jnp.zeros(num_tokens).at[token].add(weight, mode='drop'))(
        routing.token_GxExC, routing.weight_GxExC
    )


def covered_tokens(routing: Routing | Choices | Mixing, num_tokens: int) -> jax.Array:
    """Bool (G, S): at least one expert took the token."""
    if isinstance(routing, Mixing):
        return (routing.combine_GxSxN > 0).any(axis=-1)
    if isinstance(routing, Choices):
        return (routing.weight_GxSxK > 0).any(axis=-1)
    return jax.vmap(lambda token: jnp.zeros(num_tokens, bool).at[token].set(True, mode='drop'))(routing.token_GxExC)
