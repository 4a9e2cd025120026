"""Top-K against the routers of transformers: its logits give the same experts and weights (`shared/fixtures/llm`)."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.fixtures import fixtures_dir, requires_fixtures
from tests.moe.quick import jit
from upcycle.moe.config import MoEConfig

NORMALIZED = {'normalize_combine_weights': True}
# Folder, and the settings that its config.json stands for; sizes are read from it.
ROUTERS = {
    'mixtral': NORMALIZED,
    'granitemoe': NORMALIZED,
    'gpt_oss': NORMALIZED,
    'qwen3_moe_norm': NORMALIZED,
    'qwen3_moe_nonorm': {},
    'deepseek_v2': {'score_groups': 3, 'selected_groups': 2, 'group_score': 'max', 'weight_scale': 1.5},
    'deepseek_v3': {
        **NORMALIZED,
        'scores': 'sigmoid',
        'correction_bias': True,
        'score_groups': 2,
        'selected_groups': 1,
        'weight_scale': 2.0,
    },
}


@functools.cache
def reference(name):
    folder = fixtures_dir() / 'llm' / name
    return np.load(folder / 'ref.npz'), json.loads((folder / 'config.json').read_text())


@requires_fixtures
@pytest.mark.parametrize('name', ROUTERS)
def test_experts_and_weights(name):
    arrays, sizes = reference(name)
    logits, experts, weights = (arrays[f'router_{what}'] for what in ('logits', 'experts', 'weights'))
    config = MoEConfig(
        num_experts=logits.shape[-1],
        router='top_k',
        num_selected_experts=sizes['num_experts_per_tok'],
        dispatch='ragged',
        **ROUTERS[name],
    )
    biases = [None] * len(logits)
    if config.correction_bias:
        stored = load_file(fixtures_dir() / 'llm' / name / 'model.safetensors')
        biases = [stored[f'model.layers.{i}.mlp.gate.e_score_correction_bias'] for i in arrays['moe_layers']]
    route = jit(config.route_dropless)
    for logits_NxE, bias_E, expert_NxK, weight_NxK in zip(logits, biases, experts, weights, strict=True):
        real_1xN = jnp.ones((1, len(logits_NxE)), bool)
        (expert_1xNxK, weight_1xNxK), _ = route(logits_NxE[None], real_1xN, None if bias_E is None else bias_E)
        order_NxK = np.argsort(-np.asarray(weight_1xNxK[0]), axis=-1)
        np.testing.assert_array_equal(np.take_along_axis(np.asarray(expert_1xNxK[0]), order_NxK, -1), expert_NxK)
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(weight_1xNxK[0]), order_NxK, -1), weight_NxK, rtol=1e-6
        )


@requires_fixtures
@pytest.mark.parametrize(
    'setting', ['scores', 'correction_bias', 'score_groups', 'weight_scale', 'normalize_combine_weights']
)
def test_every_setting_counts(setting):
    """So that the test above can fail."""
    settings = ROUTERS['deepseek_v3'] | {setting: MoEConfig.__signature__.parameters[setting].default}
    if setting == 'score_groups':
        settings['selected_groups'] = None
    arrays, _ = reference('deepseek_v3')
    stored = load_file(fixtures_dir() / 'llm' / 'deepseek_v3' / 'model.safetensors')
    config = MoEConfig(num_experts=6, router='top_k', dispatch='ragged', **settings)
    bias_E = stored[f'model.layers.{arrays["moe_layers"][0]}.mlp.gate.e_score_correction_bias']
    logits_NxE = arrays['router_logits'][0]
    choices, _ = jit(config.route_dropless)(
        logits_NxE[None], jnp.ones((1, len(logits_NxE)), bool), bias_E if config.state_shapes(1) else None
    )
    ours, theirs = np.sort(choices.weight_GxSxK[0], axis=-1), np.sort(arrays['router_weights'][0], axis=-1)
    assert np.abs(ours - theirs).max() > 1e-3
