"""The facts of MoE layers: settings of a router of `upcycle.moe.routers` that change the function at inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from upcycle.moe.groups import sparse_layers

# Settings that change the function, with the values of the usual Top-K; they are left out where they have them.
NEUTRAL: Mapping[str, Any] = {
    'shared_weights': 'one',
    'logit_normalization': None,
    'router_bias': False,
    'scores': 'softmax',
    'correction_bias': False,
    'score_groups': 1,
    'weight_scale': 1.0,
    'balance_bias_rate': 0.0,
    'default_output_decay': None,
    'num_shared_experts': 0,
    'shared_mlp_dim': None,
    'shared_gate': False,
    'eval_capacity_factor': None,
}
# Ways out, for messages, by the names of `compared`.
ADVICE: Mapping[str, str] = {
    'moe_layers': '--dense_layers=experts writes dense layers as equal experts',
    'moe.router': "train with ROUTER = 'top_k', or make the model dense with DENSE_OPERATOR = 'average'",
    'moe.weight_scale': 'only a power of 2 can be multiplied into the experts without rounding',
    'moe.eval_capacity_factor': "evaluate without dropped choices: DISPATCH = 'ragged', or a factor of NUM_EXPERTS",
}

# Those for which another layout may be a way out, too.
ELSEWHERE = ('moe_layers',)


def canonical(moe: Mapping[str, Any] | None, spec: str | Sequence[int], mlp_dim: int, depth: int) -> dict[str, Any]:
    """Returns `moe` and `moe_layers` in the simplest form that makes the same function at inference.

    Args:
      moe: settings of a router; None for a dense model.
      spec: which layers have experts, see `groups.sparse_layers`.
      mlp_dim: width of a dense MLP.
      depth: number of layers.
    """
    layers = sparse_layers(spec, depth, 'MOE_LAYERS')
    if moe is None or not layers:
        return {'moe': None, 'moe_layers': 'all'}
    return {'moe': _router(moe, mlp_dim), 'moe_layers': 'all' if len(layers) == depth else list(layers)}


def _router(moe: Mapping[str, Any], mlp_dim: int) -> dict[str, Any]:
    experts, chosen = moe['num_experts'], moe.get('num_selected_experts', 2)
    width = expert_width(moe, mlp_dim)
    shared = moe.get('num_shared_experts', 0) and (moe.get('shared_mlp_dim') or moe['num_shared_experts'] * width)
    facts = {name: value for name, value in moe.items() if name in NEUTRAL}
    facts |= {
        'num_shared_experts': 1 if shared else 0,
        'shared_mlp_dim': shared or None,
        'eval_capacity_factor': None if _keeps_all(moe) else moe.get('eval_capacity_factor'),
    }
    if moe.get('balance_bias_rate'):
        facts['correction_bias'] = True
    # At inference a bias that follows the load is a stored one.
    facts['balance_bias_rate'] = 0.0
    facts = {name: value for name, value in facts.items() if value != NEUTRAL[name]}
    # The probabilities of all experts sum to 1.
    is_whole = chosen == experts and 'scores' not in facts
    return {
        'router': moe.get('router', 'top_k'),
        'num_experts': experts,
        'num_selected_experts': chosen,
        'normalize_combine_weights': is_whole or moe.get('normalize_combine_weights', False),
        'dispatch': 'ragged',
        'expert_mlp_dim': None if width == mlp_dim else width,
        **facts,
    }


def _keeps_all(moe: Mapping[str, Any]) -> bool:
    """Whether no choice is dropped at inference."""
    if moe.get('dispatch') == 'ragged' or 'eval_capacity_factor' not in moe:
        return True
    choices = moe.get('num_selected_experts', 1) if moe.get('capacity_rule') == 'vmoe' else 1
    return moe['eval_capacity_factor'] * choices >= moe['num_experts']


def expert_width(moe: Mapping[str, Any], mlp_dim: int) -> int:
    """Returns F of an expert."""
    return moe.get('expert_mlp_dim') or mlp_dim // moe.get('granularity', 1)


def compared(moe: Mapping[str, Any], mlp_dim: int) -> dict[str, Any]:
    """Returns canonical settings by names that do not collide with those of the network, with absolute widths."""
    settings = {**NEUTRAL, **moe, 'expert_mlp_dim': expert_width(moe, mlp_dim)}
    return {f'moe.{name}': value for name, value in settings.items()}
