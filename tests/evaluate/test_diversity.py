"""Diversity of experts."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.small import init, random_batch, small_t5, with_moe
from upcycle.evaluate.diversity import compiled
from upcycle.models.encoder_decoder import EncoderDecoderModel

MODEL = EncoderDecoderModel(with_moe(small_t5(emb_dim=32, mlp_dim=64), num_experts=4))
PATHS = tuple(MODEL.moe_layers())


def params_with(experts):
    params = init(MODEL, random_batch())[0]
    layer = params['encoder']['layers_1']['mlp']
    layer['expert'] = jax.tree.map(experts, layer['expert'])
    return params


def test_copies_have_cosine_1():
    found = compiled(PATHS)(params_with(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape)))
    np.testing.assert_allclose(found['experts/encoder/layers_1/expert_cosine'], 1, atol=1e-5)
    np.testing.assert_allclose(found['experts/encoder/layers_1/expert_cosine_largest'], 1, atol=1e-5)
    assert abs(found['experts/decoder/layers_1/expert_cosine']) < 0.1


def test_is_the_definition():
    params = params_with(lambda leaf: leaf.at[2].set(leaf[0] + 0.1 * leaf[1]))
    found = compiled(PATHS)(params)
    for path in PATHS:
        stack, name, _ = path.split('/')
        layer = params[stack][name]['mlp']
        flat_ExN = np.concatenate(
            [np.asarray(leaf).reshape(4, -1) for leaf in jax.tree.leaves(layer['expert'])], axis=1
        )
        for key, v in (
            ('expert_cosine', flat_ExN),
            ('router_cosine', layer['router']['router_weights']['w']['kernel'].T),
        ):
            norm_E = np.linalg.norm(v, axis=1)
            cosine_ExE = np.asarray(v @ v.T) / np.outer(norm_E, norm_E)
            pairs = cosine_ExE[~np.eye(4, dtype=bool)]
            np.testing.assert_allclose(found[f'experts/{stack}/{name}/{key}'], pairs.mean(), atol=1e-5)
            if key == 'expert_cosine':
                np.testing.assert_allclose(found[f'experts/{stack}/{name}/{key}_largest'], pairs.max(), atol=1e-5)
    assert found['experts/encoder/layers_1/expert_cosine_largest'] > 0.9
    both = [found[f'experts/{stack}/layers_1/expert_cosine'] for stack in ('encoder', 'decoder')]
    np.testing.assert_allclose(found['experts/expert_cosine'], np.mean(both), atol=1e-6)
