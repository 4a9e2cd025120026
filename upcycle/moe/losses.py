"""Balance losses and metrics of routers."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from upcycle.moe.conventions import BalanceLoss, RoutePadding
from upcycle.moe.routing import Across, Tokens, decided, normalized_logits

if TYPE_CHECKING:
    from upcycle.moe.routers.top_k import TopK


def auxiliary_loss_of(tokens: Tokens, expert_GxSxK: jax.Array, config: 'TopK', across: Across) -> jax.Array:
    """Computes Top-K's balance loss, except V-MoE's, which needs logits with and without noise (`balance_loss_of`)."""
    if config.balance_loss is BalanceLoss.MUTUAL_INFORMATION:
        return mutual_information_loss(tokens, across)
    return _load_balancing_loss(tokens, expert_GxSxK, across)


def mutual_information_loss(tokens: Tokens, across: Across) -> jax.Array:
    """Computes -H(E[p]) + E[H(p)], minus the mutual information of token and expert (Pan et al. 2024, arXiv 2404.05567, eq. 5).

    Expectations are over the tokens of a group, the loss is the mean over groups.
    """
    entropy_Gx1 = _group_means(entropy(tokens.probs_GxSxE)[..., None], tokens)
    entropy_of_mean_G = entropy(_group_means(tokens.probs_GxSxE, tokens))
    groups = across(jnp.asarray(len(entropy_Gx1), jnp.float32))
    return across((entropy_Gx1[:, 0] - entropy_of_mean_G).sum()) / groups


def _group_means(x_GxSxN: jax.Array, tokens: Tokens) -> jax.Array:
    """Means over the tokens of each group that count in losses, (G, N)."""
    count_Gx1 = jnp.maximum(tokens.in_loss_GxS.sum(axis=-1, keepdims=True), 1)
    return (x_GxSxN * tokens.in_loss_GxS[..., None]).sum(axis=1) / count_Gx1


def entropy(probs: jax.Array) -> jax.Array:
    """Computes the entropy over the last axis, in nats."""
    return -(probs * jnp.log(jnp.maximum(probs, 1e-30))).sum(axis=-1)


def _load_balancing_loss(tokens: Tokens, expert_GxSxK: jax.Array, across: Across) -> jax.Array:
    """Computes E^2 * mean over groups and experts of (share of tokens that chose e) * (mean probability of e): Switch eq. 4-6."""
    E = tokens.probs_GxSxE.shape[-1]
    chose_GxSxE = jax.nn.one_hot(expert_GxSxK, E).max(axis=-2) * tokens.may_route_GxS[..., None]
    share_GxE, prob_GxE = _group_means(chose_GxSxE, tokens), _group_means(tokens.probs_GxSxE, tokens)
    groups = across(jnp.asarray(len(share_GxE), jnp.float32))
    return across((share_GxE * prob_GxE).sum()) / groups * E


def importance_load_loss(
    logits_GxSxE: jax.Array, noisy_GxSxE: jax.Array | None, real_GxS: jax.Array, config: 'TopK'
) -> jax.Array:
    """Computes V-MoE's balance losses, means over groups of squared coefficients of variation (Riquelme et al. 2021, A.2).

    Importance is the sum of an expert's probabilities. Load is the expected number of tokens that choose an expert: the
    probability that new noise would lift its logit above the K-th largest noisy one. Without noise (None) the load loss is left
    out. As vmoe's `NoisyTopExpertsPerItemRouter`.
    """
    probs_GxSxE = jax.nn.softmax(normalized_logits(logits_GxSxE, config), axis=-1)
    if config.route_padding is not RoutePadding.SKIP:
        real_GxS = jnp.ones_like(real_GxS)

    def squared_variation(share_GxSxE: jax.Array) -> jax.Array:
        sum_GxE = (share_GxSxE * real_GxS[..., None]).sum(axis=1)
        mean_G = jnp.maximum(sum_GxE.mean(axis=-1), 1e-9)
        return (jnp.var(sum_GxE, axis=-1) / jnp.square(mean_G)).mean()

    loss = squared_variation(probs_GxSxE)
    if noisy_GxSxE is None:
        return loss
    index_GxSx1 = decided(jax.lax.top_k(noisy_GxSxE, config.num_selected_experts)[1][..., -1:])
    lowest_GxSx1 = jnp.take_along_axis(noisy_GxSxE, index_GxSx1, axis=-1)
    return loss + squared_variation(jax.scipy.stats.norm.sf((lowest_GxSx1 - logits_GxSxE) / config.noise_stddev))


def routing_metrics(
    tokens: Tokens, across: Across, *, used_E: jax.Array, slots: int, covered: jax.Array, weight: jax.Array
) -> dict[str, jax.Array]:
    """Computes routing metrics over the counted tokens: scalars, and `load`, the share of the routed tokens at each expert.

    Args:
      tokens: routed tokens.
      across: sums over devices; the other arguments are this device's.
      used_E: number of full slots of each expert.
      slots: number of slots.
      covered: number of tokens that some expert took.
      weight: sum of all combine weights.
    """
    E = used_E.shape[0]
    used_E = across(used_E)
    used = jnp.maximum(used_E.sum(), 1)
    load_E = used_E / used
    counted_GxS = tokens.may_route_GxS
    entropy_GxS = entropy(tokens.probs_GxSxE)
    metrics = {
        'fraction_tokens_left_behind': 1.0 - across(covered) / jnp.maximum(across(counted_GxS.sum()), 1),
        'router_confidence': across(weight) / used,
        'expert_usage': used_E.sum() / jnp.maximum(across(jnp.asarray(slots)), 1),
        'router_entropy': mean_over(entropy_GxS, counted_GxS, across),
        'load': load_E,
        'load_cv': jnp.std(load_E) * E,
    }
    z_GxS = jnp.square(jax.nn.logsumexp(tokens.logits_GxSxE, axis=-1))
    return jax.lax.stop_gradient(metrics) | {'router_z_loss': mean_over(z_GxS, tokens.in_loss_GxS, across)}


def mean_over(x_GxS: jax.Array, counted_GxS: jax.Array, across: Across) -> jax.Array:
    return across((x_GxS * counted_GxS).sum()) / jnp.maximum(across(counted_GxS.sum()), 1)
