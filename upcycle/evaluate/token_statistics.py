"""Statistics of the tokens that each expert gets, by kind of token (see `Model.token_kinds`)."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models import Model, Params
from upcycle.models.activations import forward_and_activations
from upcycle.moe.groups import layer_name
from upcycle.moe.routing import Choices, Routing

Batch = Mapping[str, jax.Array]
# Number of typical tokens of an expert in the log.
TYPICAL = 5


def layers_of(model: Model) -> tuple[str, ...]:
    """Returns the paths of the layers whose routers assign tokens to experts."""
    return tuple(path for path, moe in model.moe_layers().items() if moe.assigns)


def compiled(model: Model) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Compiles `token_statistics` once for all evaluations of a run."""
    return jax.jit(functools.partial(token_statistics, model=model))


def token_statistics(params: Params, batch: Batch, *, model: Model) -> dict[str, jax.Array]:
    """Computes statistics of the tokens that the experts of each layer get from a batch, at evaluation.

    Args:
      params: of the model.
      batch: at least some thousands of tokens; see `information`.
      model: with at least one layer in `layers_of`.

    Returns:
      For each layer `experts/LAYER/token_information` (see `information`), `.../token_kinds` (E,), the effective number of
      different tokens of an expert (exp of their entropy), and `.../typical_tokens` (E, T) (see `typical`);
      `experts/token_information`, its mean over layers.
    """
    kinds = model.token_kinds(batch)
    paths = layers_of(model)
    metrics, total = {}, 0.0
    _, activations = forward_and_activations(model, params, batch, paths)
    for path, (x_BxLxD, _, real_BxL) in activations.items():
        layer_params = functools.reduce(dict.__getitem__, path.split('/'), params)
        # The compiler removes the experts, since only the routing is used.
        _, written = model.moe_module(path).apply(
            {'params': layer_params}, x_BxLxD, real_BxL, training=False, mutable=['intermediates']
        )
        (routing,) = written['intermediates']['routing']
        kind_BxL, num_kinds = kinds[path]
        count_ExV = counts(
            routing, jnp.where(real_BxL, kind_BxL, num_kinds), num_kinds, model.moe_layers()[path].num_experts
        )
        name = f'experts/{layer_name(path)}'
        metrics[f'{name}/token_information'] = information(count_ExV)
        metrics[f'{name}/token_kinds'] = jnp.exp(_entropy(_shares(count_ExV, axis=1), axis=1))
        metrics[f'{name}/typical_tokens'] = typical(count_ExV)
        total += metrics[f'{name}/token_information']
    metrics['experts/token_information'] = total / len(paths)
    # Replicated, so that every host can read all of it.
    return {key: nn.with_logical_constraint(value, (None,) * value.ndim) for key, value in metrics.items()}


def counts(routing: Routing | Choices, kind_BxL: jax.Array, num_kinds: int, num_experts: int) -> jax.Array:
    """Counts the tokens of each kind that each expert gets, (E, V) float32; kinds from `num_kinds` on are ignored."""
    zeros_ExV = jnp.zeros((num_experts, num_kinds), jnp.float32)
    if isinstance(routing, Choices):
        expert_NxK = routing.expert_GxSxK.reshape(kind_BxL.size, -1)
        return zeros_ExV.at[expert_NxK, kind_BxL.reshape(-1, 1)].add(1.0, mode='drop')
    G = routing.token_GxExC.shape[0]
    # An empty slot points to one past the group's last token.
    kind_GxS = jnp.pad(kind_BxL.reshape(G, -1), ((0, 0), (0, 1)), constant_values=num_kinds)
    kind_GxExC = jnp.take_along_axis(kind_GxS[:, None], routing.token_GxExC, axis=2)
    return zeros_ExV.at[jnp.arange(num_experts)[:, None], kind_GxExC].add(1.0, mode='drop')


def information(count_ExV: jax.Array) -> jax.Array:
    """Estimates the mutual information of expert and kind of token, in nats: 0 if all experts get the same kinds, at most ln E.

    The plain estimate is too large for few counts, so each entropy has Miller and Madow's (1955) correction,
    (number of kinds that occur - 1) / (2 N).
    """
    total = count_ExV.sum()
    shares = (count_ExV.sum(axis=1), count_ExV.sum(axis=0), count_ExV.reshape(-1))
    expert, kind, both = (
        _entropy(_shares(x)) + (jnp.count_nonzero(x) - 1.0) / (2.0 * jnp.maximum(total, 1.0)) for x in shares
    )
    return jnp.maximum(expert + kind - both, 0.0)


def typical(count_ExV: jax.Array) -> jax.Array:
    """Returns the kinds most typical of each expert, (E, T) int32, most typical first, padded with -1.

    They have the largest terms p(kind | expert) log(p(kind | expert) / p(kind)) of the Kullback-Leibler divergence of an expert's
    kinds from all kinds: kinds that are both frequent and preferred.
    """
    share_ExV, share_V = _shares(count_ExV, axis=1), _shares(count_ExV.sum(axis=0))
    part_ExV = jnp.where(share_ExV > 0, share_ExV * jnp.log(_above_0(share_ExV) / _above_0(share_V)), 0.0)
    part_ExT, kind_ExT = jax.lax.top_k(part_ExV, min(TYPICAL, count_ExV.shape[1]))
    return jnp.where(part_ExT > 0, kind_ExT, -1)


def _shares(count: jax.Array, axis: int | None = None) -> jax.Array:
    return count / jnp.maximum(count.sum(axis=axis, keepdims=True), 1.0)


def _entropy(share: jax.Array, axis: int | None = None) -> jax.Array:
    return -(share * jnp.log(_above_0(share))).sum(axis=axis)


def _above_0(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 1e-30)


def in_words(metrics: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Returns the metrics with typical tokens as the data spells them: lists of text, or of numbers if the data has no text."""
    spell = getattr(data, 'token_text', str)
    return {
        name: [[spell(int(kind)) for kind in kinds if kind >= 0] for kinds in value]
        if name.endswith('/typical_tokens')
        else value
        for name, value in metrics.items()
    }
