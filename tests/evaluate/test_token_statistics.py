"""Statistics of the tokens of each expert."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small import image_batch, init, random_batch, small_t5, small_vit, vit_moe, with_moe
from upcycle.evaluate import token_statistics
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.moe.config import changed
from upcycle.moe.routing import Choices, Routing

SIZES = {'emb_dim': 32, 'mlp_dim': 64}


def test_experts_that_share_out_the_tokens_say_which_it_was():
    # Expert e gets kinds 4e to 4e + 3 equally often.
    count_ExV = jnp.asarray(np.kron(np.eye(4), np.full((1, 4), 1000.0)), jnp.float32)
    assert token_statistics.information(count_ExV) == pytest.approx(math.log(4), abs=1e-3)
    assert all(set(row) <= {4 * e, 4 * e + 1, 4 * e + 2, 4 * e + 3, -1} for e, row in enumerate(_typical(count_ExV)))


def test_random_routing_has_no_information():
    rng = np.random.default_rng(0)
    # 2,000 random tokens of 50 kinds: the plain estimate is 49 * 7 / 4000 nats too large.
    draws = rng.integers(0, 8, 2000), rng.integers(0, 50, 2000)
    count_ExV = np.zeros((8, 50), np.float32)
    np.add.at(count_ExV, draws, 1)
    share_ExV = count_ExV / 2000
    outer_ExV = share_ExV.sum(axis=1, keepdims=True) * share_ExV.sum(axis=0)
    plain = (share_ExV * np.log(np.maximum(share_ExV, 1e-30) / outer_ExV)).sum()
    assert plain > 0.06
    assert token_statistics.information(jnp.asarray(count_ExV)) < 0.01


def test_typical_is_frequent_and_preferred():
    # Both experts get mostly kind 0; only the first gets kind 2 and the rare kind 3, only the second kind 1.
    count_ExV = jnp.asarray([[500.0, 10.0, 80.0, 1.0], [500.0, 90.0, 0.0, 0.0]])
    np.testing.assert_array_equal(_typical(count_ExV), [[2, 3, -1, -1], [1, 0, -1, -1]])


def _typical(count_ExV):
    return np.asarray(token_statistics.typical(count_ExV))


def test_counts_leave_out_empty_slots_padding_and_tokens_that_go_nowhere():
    kind_BxL = jnp.asarray([[5, 6, 7], [5, 5, 8]])  # 8: padding, of 8 kinds
    expected_ExV = np.zeros((2, 8))
    expected_ExV[0, 5], expected_ExV[1, 5], expected_ExV[1, 7] = 2, 1, 1
    # Two groups of three tokens; 3 is an empty slot.
    slots = Routing(jnp.asarray([[[0, 3], [2, 3]], [[1, 2], [0, 2]]]), jnp.ones((2, 2, 2)))
    np.testing.assert_array_equal(token_statistics.counts(slots, kind_BxL, 8, 2), expected_ExV)
    choices = Choices(jnp.asarray([[[0], [2], [1]], [[0], [1], [0]]]), jnp.ones((2, 3, 1)))
    np.testing.assert_array_equal(token_statistics.counts(choices, kind_BxL, 8, 2), expected_ExV)


@pytest.mark.parametrize('dispatch', ['gather', 'ragged'])
def test_of_a_text_model_with_a_router_that_looks_at_the_token(dispatch):
    config = with_moe(small_t5(**SIZES, num_encoder_layers=1, num_decoder_layers=1), num_experts=4, group_size=512)
    moe = dataclasses.replace(config.decoder_moe, num_selected_experts=1, dispatch=dispatch, eval_capacity_factor=4.0)
    model = EncoderDecoderModel(dataclasses.replace(config, encoder_moe=None, decoder_moe=moe, decoder_moe_layers=(0,)))
    batch = random_batch(vocab_size=8, batch=64, inputs=4, targets=16, padding=2)
    params = init(model, batch)[0]
    # Only the embedding reaches the layer, and that of token v points along axis v modulo 4.
    params['decoder']['layers_0'] = jax.tree.map(
        lambda leaf: jnp.zeros_like(leaf) if leaf.ndim > 1 else leaf, params['decoder']['layers_0']
    )
    embedding_VxD = params['token_embedder']['embedding']
    params['token_embedder']['embedding'] = (
        jnp.zeros_like(embedding_VxD).at[jnp.arange(256), jnp.arange(256) % 4].set(1.0)
    )
    kernel = {'kernel': 10.0 * jnp.eye(32, 4)}
    params['decoder']['layers_0']['mlp']['router']['router_weights']['w'] = kernel
    found = token_statistics.compiled(model)(params, batch)
    read = np.asarray(batch['decoder_input_tokens'])[np.asarray(batch['decoder_target_tokens']) > 0]
    share_E = np.bincount(read % 4, minlength=4) / read.size
    expected = -(share_E * np.log(share_E)).sum()
    assert found['experts/decoder/layers_0/token_information'] == pytest.approx(expected, abs=0.01)
    assert found['experts/token_information'] == found['experts/decoder/layers_0/token_information']
    typical_ExT = np.asarray(found['experts/decoder/layers_0/typical_tokens'])
    for expert, tokens in enumerate(typical_ExT):
        assert {int(token) % 4 for token in tokens if token >= 0} == {expert}
    assert all(1 < kinds <= 3.1 for kinds in found['experts/decoder/layers_0/token_kinds'])


def test_of_an_image_model_the_kinds_are_labels():
    config = dataclasses.replace(small_vit(**SIZES, num_heads=2, num_layers=2), moe=vit_moe(num_experts=4))
    model = ImageClassifier(config)
    batch = image_batch(config, batch=4, filled=1)
    found = token_statistics.compiled(model)(init(model, batch)[0], batch)
    (layer,) = (path.rpartition('/')[0] for path in model.moe_layers())
    labels = set(np.asarray(batch['labels'])[:3, 0].tolist())
    typical = set(np.asarray(found[f'experts/{layer}/typical_tokens']).flat)
    assert typical <= labels | {-1} and typical & labels
    assert found[f'experts/{layer}/token_kinds'].shape == (4,)


def test_dense_routing_is_skipped():
    config = with_moe(small_t5(**SIZES), num_experts=4)
    soft = changed(config.encoder_moe, router='soft', slots_per_expert=1)
    model = EncoderDecoderModel(dataclasses.replace(config, encoder_moe=soft))
    assert token_statistics.layers_of(model) == ('decoder/layers_1/mlp',)


def test_in_words():
    found = {'experts/a/typical_tokens': np.array([[3, -1], [4, 5]]), 'experts/a/token_kinds': np.array([1.0, 2.0])}

    class Text:
        def token_text(self, token):
            return 'xyz'[token - 3]

    words = token_statistics.in_words(found, Text())
    assert words['experts/a/typical_tokens'] == [['x'], ['y', 'z']]
    assert words['experts/a/token_kinds'] is found['experts/a/token_kinds']
    assert token_statistics.in_words(found, object())['experts/a/typical_tokens'] == [['3'], ['4', '5']]
