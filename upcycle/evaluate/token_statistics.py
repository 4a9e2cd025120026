"""Which tokens go to which expert: by the kind of each token, see `Model.token_kinds`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from upcycle.models import Model, Params
from upcycle.models.activations import forward_and_activations
from upcycle.moe.routing import Choices, Routing

Batch = Mapping[str, jax.Array]
# Typical tokens of an expert that are logged.
TYPICAL = 5


def layers_of(model: Model) -> tuple[str, ...]:
    """Paths of the layers whose routers assign tokens to experts."""
    return tuple(path for path, moe in model.moe_layers().items() if moe.assigns)


def compiled(model: Model) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """`token_statistics` of a model, compiled once for all looks of a run."""
    return jax.jit(functools.partial(token_statistics, model=model))


def token_statistics(params: Params, batch: Batch, *, model: Model) -> dict[str, jax.Array]:
    """What the experts of each layer read on a batch, at evaluation.

    Args:
      params: of the model.
      batch: some thousands of tokens at least: see `information`.
      model: with at least one of `layers_of`.

    Returns:
      For each layer `experts/LAYER/token_information`, see `information`, `.../token_kinds` (E,), in effect how many different
      tokens an expert reads: exp of the entropy of what it reads, and `.../typical_tokens` (E, T), see `typical`;
      `experts/token_information`, its mean over layers.
    """
    kinds = model.token_kinds(batch)
    paths = layers_of(model)
    found, total = {}, 0.0
    _, activations = forward_and_activations(model, params, batch, paths)
    for path, (x_BxLxD, _, real_BxL) in activations.items():
        layer_params = functools.reduce(dict.__getitem__, path.split('/'), params)
        # The compiler leaves out what only the output needs: the experts.
        _, written = model.moe_module(path).apply(
            {'params': layer_params}, x_BxLxD, real_BxL, training=False, mutable=['intermediates']
        )
        (routing,) = written['intermediates']['routing']
        kind_BxL, num_kinds = kinds[path]
        count_ExV = counts(
            routing, jnp.where(real_BxL, kind_BxL, num_kinds), num_kinds, model.moe_layers()[path].num_experts
        )
        name = f'experts/{path.rpartition("/")[0]}'
        found[f'{name}/token_information'] = information(count_ExV)
        found[f'{name}/token_kinds'] = jnp.exp(_entropy(_shares(count_ExV, axis=1), axis=1))
        found[f'{name}/typical_tokens'] = typical(count_ExV)
        total += found[f'{name}/token_information']
    found['experts/token_information'] = total / len(paths)
    # On many hosts each reads what it is given, and so all of it.
    return {key: nn.with_logical_constraint(value, (None,) * value.ndim) for key, value in found.items()}


def counts(routing: Routing | Choices, kind_BxL: jax.Array, num_kinds: int, num_experts: int) -> jax.Array:
    """(E, V) float32: how often each expert took each kind of token; a kind that is not below `num_kinds` does not count."""
    zeros_ExV = jnp.zeros((num_experts, num_kinds), jnp.float32)
    if isinstance(routing, Choices):
        expert_NxK = routing.expert_GxSxK.reshape(kind_BxL.size, -1)
        return zeros_ExV.at[expert_NxK, kind_BxL.reshape(-1, 1)].add(1.0, mode='drop')
    G = routing.token_GxExC.shape[0]
    # The token of an empty slot is one past the group's end.
    kind_GxS = jnp.pad(kind_BxL.reshape(G, -1), ((0, 0), (0, 1)), constant_values=num_kinds)
    kind_GxExC = jnp.take_along_axis(kind_GxS[:, None], routing.token_GxExC, axis=2)
    return zeros_ExV.at[jnp.arange(num_experts)[:, None], kind_GxExC].add(1.0, mode='drop')


def information(count_ExV: jax.Array) -> jax.Array:
    """Mutual information of expert and kind of token, in nats: 0 where experts read alike, at most ln E.

    Of few counts the plain estimate is too large, since chance looks like preference: each entropy has Miller and Madow's (1955)
    correction, (its kinds that occur - 1) / (2 N).
    """
    total = count_ExV.sum()
    shares = (count_ExV.sum(axis=1), count_ExV.sum(axis=0), count_ExV.reshape(-1))
    expert, kind, both = (
        _entropy(_shares(x)) + (jnp.count_nonzero(x) - 1.0) / (2.0 * jnp.maximum(total, 1.0)) for x in shares
    )
    return jnp.maximum(expert + kind - both, 0.0)


def typical(count_ExV: jax.Array) -> jax.Array:
    """(E, T) int32: the kinds that add most to the distance of what an expert reads from what all read, first the most; else -1.

    A kind's part of that distance (Kullback and Leibler's) is p(kind | expert) log(p(kind | expert) / p(kind)): it is large for
    kinds that are both frequent and preferred.
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


def in_words(found: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """What was found, with the typical tokens as the data spells them: lists of text, or of numbers where it has no words."""
    spell = getattr(data, 'token_text', str)
    return {
        name: [[spell(int(kind)) for kind in kinds if kind >= 0] for kinds in value]
        if name.endswith('/typical_tokens')
        else value
        for name, value in found.items()
    }
