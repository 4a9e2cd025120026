"""What is recognised as a whole checkpoint."""

import jax
import pytest

from tests.checkpoints import vits
from tests.small import random_batch, small_t5, with_moe
from tests.surgery.in_memory import abstract
from upcycle.errors import UserError
from upcycle.models import identify
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.models.vit import Gelu, ViTConfig

LAYERS = {
    'routed': {},
    'narrow and shared': {'granularity': 2, 'num_shared_experts': 2, 'shared_weights': 'xft'},
    'balanced by a bias': {'balance_bias_rate': 0.1},
    'with defaults': {'default_output_decay': 0.9},
    'soft': {'router': 'soft', 'slots_per_expert': 3},
    'merged': {'router': 'merged'},
}

VIT = {'num_classes': 2, 'image_size': 8, 'patch_size': 4, 'emb_dim': 8, 'num_heads': 2, 'mlp_dim': 8, 'num_layers': 1}


def leaves_of(**moe):
    return abstract(EncoderDecoderModel(with_moe(small_t5(), **moe)), random_batch())[0]


@pytest.mark.parametrize('kind', LAYERS)
def test_moe_layers_of_every_kind(kind):
    identify.check('here', leaves_of(**LAYERS[kind]))


def test_position_biases_are_told_by_names():
    for biases in ('shared', 'every_layer'):
        leaves = abstract(EncoderDecoderModel(small_t5(position_biases=biases)), random_batch())[0]
        assert identify.check('here', leaves).config == small_t5(position_biases=biases)


def test_a_table_that_is_lost_is_named():
    leaves = abstract(EncoderDecoderModel(small_t5(position_biases='every_layer')), random_batch())[0]
    del leaves['params/decoder/layers_1/relpos_bias/rel_embedding']
    with pytest.raises(UserError, match=r'decoder/layers_1/relpos_bias/rel_embedding \(2, 32\) is missing'):
        identify.check('here', leaves)


def test_other_buckets_are_named():
    leaves = abstract(EncoderDecoderModel(small_t5(position_biases='every_layer')), random_batch())[0]
    name = 'params/decoder/layers_1/relpos_bias/rel_embedding'
    leaves[name] = jax.ShapeDtypeStruct((2, 16), leaves[name].dtype)
    with pytest.raises(UserError, match=r'decoder/layers_1/relpos_bias/rel_embedding is \(2, 16\)'):
        identify.check('here', leaves)


def test_position_biases_in_the_layers_of_one_stack_only():
    shared, own = (
        abstract(EncoderDecoderModel(small_t5(position_biases=biases)), random_batch())[0]
        for biases in ('shared', 'every_layer')
    )
    mixed = {name: leaf for name, leaf in own.items() if not name.startswith('params/decoder/')}
    mixed |= {name: leaf for name, leaf in shared.items() if name.startswith('params/decoder/')}
    with pytest.raises(UserError, match='^here has .*encoder/layers_0/.*and POSITION_BIASES is one for both stacks'):
        identify.check('here', mixed)


def test_a_router_for_other_experts():
    leaves = leaves_of()
    name = 'params/encoder/layers_1/mlp/router/router_weights/w/kernel'
    leaves[name] = jax.ShapeDtypeStruct((128, 12), leaves[name].dtype)
    with pytest.raises(UserError, match='w/kernel .* does not route to 8 experts'):
        identify.check('here', leaves)


def test_positions_of_no_square_image():
    leaves = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in vits.ours().items()}
    leaves['params/pos_embedding'] = jax.ShapeDtypeStruct((1, 8, vits.WIDTH), 'float32')
    with pytest.raises(UserError, match='here has 8 positions .pos_embedding., which is not a square number'):
        identify.check('here', leaves)


@pytest.mark.parametrize('family', ['t5', 'unknown', None, ['t5'], {}], ids=str)
def test_facts_of_any_metadata(family):
    metadata = {'family': family, 'model': {'config': {'num_heads': 2, 'vocab_size': 3}}}
    assert identify.facts_of(metadata) == {'num_heads': 2}


def test_the_bindings_that_would_fit_are_named():
    model = EncoderDecoderModel(small_t5())
    facts = {
        'mlp_activations': ['relu'],
        'logits_via_embedding': True,
        'num_heads': model.config.num_heads,
        'gelu': 'erf',
    }
    with pytest.raises(UserError) as caught:
        identify.require_function('here', model, facts)
    for words in (
        "made with mlp_activations = ('relu',), and the model has ('gelu', 'linear'); logits_via_embedding = True, and the",
        "set it in the gin files (MLP_ACTIVATIONS = ('relu',), LOGITS_VIA_EMBEDDING = True",
    ):
        assert words in str(caught.value)
    assert 'models/t5_1_0_base.gin' in str(caught.value) and 'NUM_HEADS' not in str(caught.value)
    with pytest.raises(UserError, match="made with gelu = 'erf', and the model has 'tanh': .*GELU = 'erf'"):
        identify.require_function('here', ImageClassifier(ViTConfig(**VIT, gelu=Gelu.TANH)), {'gelu': 'erf'})
    identify.require_function('here', model, facts, ignored=('mlp_activations', 'logits_via_embedding'))
