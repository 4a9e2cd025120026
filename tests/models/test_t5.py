"""T5: T5X's numbers and names, causality, padding, packing, dropout, positions, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fixtures import requires_fixtures
from tests.moe.quick import jit, random_params
from tests.small import (
    FEATURES,
    FIXTURE_T5,
    close_to_largest,
    fixture,
    fixture_batch,
    fixture_tree,
    random_batch,
    small_t5,
    with_moe,
)
from upcycle.errors import UserError
from upcycle.models.attention import relative_position_bucket
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.layers import Dropout
from upcycle.models.t5 import T5Config, Transformer
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.layer import METRICS

INPUTS = FEATURES[:3]
DENSE = small_t5(emb_dim=64)
TIGHT = MoEConfig(num_experts=4, router='top_k', eval_capacity_factor=0.5)


@functools.cache
def parameters(config):
    return random_params(Transformer(config), *(jnp.ones((2, 8), jnp.int32) for _ in INPUTS))


@functools.cache
def applied(config, **options):
    """(params, inputs, rngs) -> (logits, routing metrics)."""
    apply = functools.partial(Transformer(config).apply, mutable=[METRICS], **options)
    return jit(lambda params, inputs, rngs: apply({'params': params}, **inputs, rngs=rngs))


def logits(config, inputs, **options):
    return np.asarray(applied(config, **options)(parameters(config), inputs, {})[0])


def inputs(**sizes):
    batch = random_batch(**sizes)
    return {name: batch[name] for name in INPUTS}


@requires_fixtures
class TestT5X:
    """The dense model that t5x wrote."""

    def test_encoder_output_and_logits(self):
        arrays = fixture('t5x_dense_reference.npz')
        batch, params = fixture_batch(arrays, 'input/'), fixture_tree(arrays, 'params/')
        module = Transformer(FIXTURE_T5)

        @jit
        def halves(params, inputs):
            encoded = module.apply({'params': params}, inputs[0], method='encode')
            return encoded, module.apply({'params': params}, encoded, *inputs, method='decode')

        encoded, decoded = halves(params, [batch[name] for name in INPUTS])
        np.testing.assert_allclose(encoded, arrays['encoded'], atol=1e-5)
        np.testing.assert_allclose(decoded, arrays['logits'], atol=1e-5)

    def test_loss(self):
        arrays = fixture('t5x_dense_reference.npz')
        model = EncoderDecoderModel(FIXTURE_T5)
        forward = jit(lambda params, batch: model.forward(params, batch, None, training=False))
        sums, moe_loss, metrics = forward(fixture_tree(arrays, 'params/'), fixture_batch(arrays, 'input/'))
        np.testing.assert_allclose(sums['loss'], arrays['loss'], rtol=1e-6)
        assert moe_loss == 0 and not metrics

    def test_parameter_names_and_shapes(self):
        arrays = fixture('t5x_dense_reference.npz')
        expected = {
            name.removeprefix('params/'): arrays[name].shape for name in arrays.files if name.startswith('params/')
        }
        assert {name: leaf.shape for name, leaf in flatten_dict(parameters(FIXTURE_T5), sep='/').items()} == expected

    @pytest.mark.parametrize('rows', ['nopad', 'pad'])
    def test_flaxformers_dense_logits(self, rows):
        """flaxformer multiplies the activations of padding by 0. Its logits there do not matter."""
        arrays = fixture('flaxformer_moe_reference.npz')
        batch = fixture_batch(arrays, f'{rows}/input/')
        config = dataclasses.replace(FIXTURE_T5, zero_padded_activations=True)
        dense = fixture_tree(fixture('t5x_dense_reference.npz'), 'params/')
        decoded, _ = applied(config)(dense, {name: batch[name] for name in INPUTS}, {})
        real_BxL = np.asarray(batch['decoder_target_tokens']) > 0
        expected = arrays[f'{rows}/dense_logits']
        np.testing.assert_allclose(np.asarray(decoded)[real_BxL], expected[real_BxL], atol=1e-5)


class TestNames:
    def test_t5_1_1_is_gated_and_has_its_own_output_layer(self):
        names = set(flatten_dict(parameters(DENSE), sep='/'))
        assert {
            'encoder/layers_0/mlp/wi_0/kernel',
            'encoder/layers_0/mlp/wi_1/kernel',
            'decoder/logits_dense/kernel',
        } <= names
        assert 'encoder/layers_0/mlp/wi/kernel' not in names

    def test_t5_1_0_is_not_and_ties_its_logits(self):
        config = dataclasses.replace(DENSE, mlp_activations=['relu'], logits_via_embedding=True)
        names = set(flatten_dict(parameters(config), sep='/'))
        assert 'encoder/layers_0/mlp/wi/kernel' in names
        assert not any('wi_' in name or 'logits_dense' in name for name in names)

    def test_t5_1_0s_logits_are_scaled_similarities(self):
        config = dataclasses.replace(DENSE, mlp_activations=('relu',), logits_via_embedding=True)
        params = parameters(config)
        doubled = params | {
            'decoder': params['decoder'] | {'decoder_norm': {'scale': 2 * params['decoder']['decoder_norm']['scale']}}
        }
        once, _ = applied(config)(params, inputs(), {})
        twice, _ = applied(config)(doubled, inputs(), {})
        assert once.dtype == jnp.float32 and once.shape == (4, 8, 256)
        np.testing.assert_allclose(twice, 2 * once, rtol=1e-4, atol=1e-5)
        # A unit-variance state against unit-variance embeddings, over sqrt(D).
        assert 0.8 < np.std(once) < 1.25

    def test_an_moe_differs_from_its_dense_model_in_the_sparse_mlps_only(self):
        moe = MoEConfig(num_experts=4)
        config = dataclasses.replace(DENSE, encoder_moe=moe, decoder_moe=changed(moe, router='top_k'))
        sparse, dense = (set(flatten_dict(parameters(c), sep='/')) for c in (config, config.dense()))
        assert {name.split('/mlp/')[0] for name in sparse ^ dense} == {'encoder/layers_1', 'decoder/layers_1'}
        assert {name.split('/mlp/')[1].split('/')[0] for name in sparse - dense} == {'expert', 'router'}
        assert config.dense() == DENSE


class TestPositionBiases:
    """Kind: an architecture with one table a layer, as umT5. The logits are compared with T5X's in `checkpoints/test_t5x.py`."""

    config = dataclasses.replace(DENSE, position_biases='every_layer')
    tables = tuple(
        f'{stack}/layers_{i}/relpos_bias/rel_embedding' for stack in ('encoder', 'decoder') for i in range(2)
    )

    @pytest.mark.parametrize('moe', [None, MoEConfig(num_experts=4)], ids=['dense', 'moe'])
    def test_every_layer_has_a_table(self, moe):
        shared, own = (
            set(flatten_dict(parameters(dataclasses.replace(config, encoder_moe=moe)), sep='/'))
            for config in (DENSE, self.config)
        )
        assert own - shared == {*self.tables}
        assert shared - own == {'encoder/relpos_bias/rel_embedding', 'decoder/relpos_bias/rel_embedding'}

    def with_tables(self, tables):
        flat = flatten_dict(parameters(DENSE), sep='/')
        shared = {stack: flat.pop(f'{stack}/relpos_bias/rel_embedding') for stack in ('encoder', 'decoder')}
        return unflatten_dict(flat | tables(shared), sep='/')

    def test_equal_tables_are_a_shared_one(self):
        params = self.with_tables(lambda shared: {name: shared[name.split('/')[0]] for name in self.tables})
        np.testing.assert_allclose(
            applied(self.config)(params, inputs(), {})[0], logits(DENSE, inputs()), rtol=1e-6, atol=1e-6
        )

    @staticmethod
    @functools.cache
    def gradients(**form):
        model = EncoderDecoderModel(dataclasses.replace(TestPositionBiases.config, **form))
        loss = jax.grad(lambda params, batch: model.forward(params, batch, None, training=True)[0]['loss'])
        return flatten_dict(jit(loss)(parameters(TestPositionBiases.config), random_batch()), sep='/')

    def test_every_table_has_a_gradient(self):
        sizes = [float(np.abs(self.gradients()[name]).max()) for name in self.tables]
        assert min(sizes) > 1e-4 and len(set(sizes)) == 4

    @pytest.mark.parametrize('remat', ['full', pytest.param('none', marks=pytest.mark.exhaustive)])
    def test_a_loop_has_the_same_gradients(self, remat):
        looped = self.gradients(scan_layers=True, remat=remat)
        for name, gradient in self.gradients().items():
            assert close_to_largest(looped[name], gradient), name

    def test_is_said_by_name(self):
        with pytest.raises(UserError, match="POSITION_BIASES = 'some' must be one of shared, every_layer"):
            dataclasses.replace(DENSE, position_biases='some')


class TestCausality:
    """Changing the decoder's token t changes no logits before t."""

    @staticmethod
    def change(config, row, t):
        """Largest difference of the logits before t of the row and in earlier rows; and at t."""
        batch = inputs(batch=4, targets=16)
        changed = batch | {'decoder_input_tokens': batch['decoder_input_tokens'].at[row, t].add(1)}
        difference_BxL = np.abs(logits(config, batch) - logits(config, changed)).max(axis=-1)
        past = difference_BxL.ravel()[: row * 16 + t]
        return past.max(), difference_BxL[row, t]

    @pytest.mark.parametrize('moe', [None, TIGHT], ids=['dense', 'moe'])
    @pytest.mark.parametrize(('row', 't'), [(0, 5), (1, 1), (2, 15), (3, 8)])
    def test_the_past_stays(self, moe, row, t):
        config = dataclasses.replace(DENSE, decoder_moe=moe, decoder_moe_layers=(0, 1))
        past, now = self.change(config, row, t)
        assert past < 1e-6 and now > 1e-3

    def test_the_buffers_of_this_test_overflow(self):
        config = dataclasses.replace(DENSE, decoder_moe=TIGHT, decoder_moe_layers=(0, 1))
        _, written = applied(config)(parameters(config), inputs(batch=4, targets=16), {})
        for i in (0, 1):
            assert written[METRICS]['decoder'][f'layers_{i}']['mlp']['fraction_dropped'] > 0.5

    def test_choice_major_changes_the_past(self):
        """What flaxformer does, and why it is not the default here."""
        leaky = dataclasses.replace(TIGHT, fill_order='choice_major')
        config = dataclasses.replace(DENSE, decoder_moe=leaky, decoder_moe_layers=(0, 1))
        assert max(self.change(config, 3, t)[0] for t in range(2, 10)) > 1e-3


class TestPadding:
    @pytest.mark.parametrize('sparse', [False, True], ids=['dense', 'moe'])
    def test_of_the_encoder_changes_nothing(self, sparse):
        """In MoE layers where every token reaches every expert."""
        config = DENSE
        if sparse:
            moe = MoEConfig(num_experts=4, eval_capacity_factor=4.0)
            config = dataclasses.replace(DENSE, encoder_moe=moe, decoder_moe=changed(moe, router='top_k'))
        batch = inputs()
        padded = batch | {'encoder_input_tokens': jnp.pad(batch['encoder_input_tokens'], ((0, 0), (0, 5)))}
        np.testing.assert_allclose(logits(config, padded), logits(config, batch), atol=1e-5)

    def test_of_the_targets_changes_no_earlier_logits(self):
        batch = inputs()
        shorter = batch | {'decoder_target_tokens': batch['decoder_target_tokens'].at[:, 5:].set(0)}
        np.testing.assert_allclose(logits(DENSE, shorter)[:, :5], logits(DENSE, batch)[:, :5], atol=1e-5)

    def test_of_a_whole_row_is_not_nan(self):
        batch = {name: tokens.at[1].set(0) for name, tokens in inputs().items()}
        assert np.isfinite(logits(DENSE, batch)).all()


def test_packed_sequences_do_not_see_each_other():
    """Two examples in one row; positions are relative, so the second does not mind standing further on."""
    first, second = inputs(seed=1), inputs(seed=2)
    packed = {name: jnp.concatenate([first[name], second[name]], axis=1) for name in INPUTS}
    segments = {
        'encoder_segment_ids': jnp.repeat(jnp.array([[1] * 16 + [2] * 16]), 4, axis=0),
        'decoder_segment_ids': jnp.repeat(jnp.array([[1] * 8 + [2] * 8]), 4, axis=0),
    }
    together = logits(DENSE, packed | segments)
    np.testing.assert_allclose(together[:, :8], logits(DENSE, first), atol=1e-5)
    np.testing.assert_allclose(together[:, 8:], logits(DENSE, second), atol=1e-5)
    assert np.abs(logits(DENSE, packed) - together).max() > 1e-2


class TestDropout:
    config = dataclasses.replace(DENSE, dropout_rate=0.3)

    def test_is_drawn_in_training_only(self):
        params, batch = parameters(self.config), inputs()
        keys = [{'dropout': jax.random.key(seed)} for seed in range(2)]
        drawn = [applied(self.config, training=True)(params, batch, rngs)[0] for rngs in (*keys, keys[0])]
        assert np.abs(drawn[0] - drawn[1]).max() > 1e-2
        np.testing.assert_array_equal(drawn[0], drawn[2])
        np.testing.assert_array_equal(logits(self.config, batch), logits(DENSE, batch))

    def test_of_0_needs_no_key(self):
        jax.eval_shape(applied(DENSE, training=True), parameters(DENSE), inputs(), {})

    def test_of_experts_has_its_own_rate(self):
        moe = MoEConfig(num_experts=4)
        rates = {
            expert: EncoderDecoderModel(dataclasses.replace(self.config, encoder_moe=moe, expert_dropout_rate=expert))
            .moe_module('encoder/layers_1/mlp')
            .expert_arguments['dropout_rate']
            for expert in (None, 0.0, 0.1)
        }
        assert rates == {None: 0.3, 0.0: 0.0, 0.1: 0.1}

    def test_shares_its_mask_along_the_sequence(self):
        ones = Dropout(0.5).apply({}, jnp.ones((2, 7, 64)), True, rngs={'dropout': jax.random.key(0)})
        np.testing.assert_array_equal(ones, np.broadcast_to(ones[:, :1], ones.shape))
        np.testing.assert_array_equal(np.unique(ones), [0.0, 2.0])


@pytest.mark.parametrize('bidirectional', [True, False])
@pytest.mark.parametrize(('num_buckets', 'max_distance'), [(32, 128), (8, 20)])
def test_relative_position_buckets(bidirectional, num_buckets, max_distance):
    """Half of a direction's buckets for one distance each, the others logarithmic up to `max_distance`."""

    def bucket(distance):
        buckets = num_buckets // 2 if bidirectional else num_buckets
        start = buckets if bidirectional and distance > 0 else 0
        length = abs(distance) if bidirectional else max(-distance, 0)
        exact = buckets // 2
        if length < exact:
            return start + length
        octaves = math.log(length / exact) / math.log(max_distance / exact)
        # 1e-6: distances such as 16 lie on an edge, and belong above it.
        return start + min(exact + int(octaves * (buckets - exact) + 1e-6), buckets - 1)

    distances = np.arange(-300, 301)
    expected = [bucket(int(distance)) for distance in distances]
    np.testing.assert_array_equal(
        relative_position_bucket(distances, bidirectional, num_buckets, max_distance), expected
    )


class TestConfig:
    @pytest.mark.parametrize(
        ('settings', 'message'),
        [
            ({'dtype': 'float8'}, "ACTIVATION_DTYPE = 'float8'"),
            ({'encoder_moe': TIGHT, 'encoder_moe_layers': 'some'}, "ENCODER_MOE_LAYERS = 'some' is not one of"),
            ({'decoder_moe': TIGHT, 'decoder_moe_layers': [2]}, 'DECODER_MOE_LAYERS names layer 2'),
            ({'decoder_moe': MoEConfig(num_experts=4)}, "DECODER_ROUTER = 'expert_choice' .* leaks the future"),
            ({'decoder_moe': dataclasses.replace(TIGHT, fill_order='priority')}, "FILL_ORDER = 'priority'"),
        ],
    )
    def test_refusals_name_the_binding(self, settings, message):
        with pytest.raises(UserError, match=message):
            small_t5(**settings)

    def test_sparse_layers(self):
        config = small_t5(num_encoder_layers=4, encoder_moe=MoEConfig(4), decoder_moe=TIGHT, decoder_moe_layers=[0])
        assert [moe is not None for moe in config.layer_moe('encoder')] == [False, True, False, True]
        assert [moe is not None for moe in config.layer_moe('decoder')] == [True, False]
        assert config.decoder_moe.causal and not config.encoder_moe.causal

    def test_takes_gins_lists(self):
        config = T5Config(**(vars(DENSE) | {'mlp_activations': ['gelu', 'linear'], 'encoder_moe_layers': [1]}))
        assert hash(config) and config.mlp_activations == ('gelu', 'linear')


def test_parameters_are_float32_and_activations_bfloat16_by_default():
    config = dataclasses.replace(DENSE, dtype='bfloat16', encoder_moe=MoEConfig(4), decoder_moe=TIGHT)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters(config))} == {jnp.dtype('float32')}
    assert T5Config.dtype == 'bfloat16'
    module = Transformer(config)
    encoded = jax.eval_shape(
        functools.partial(module.apply, method='encode'), {'params': parameters(config)}, inputs()[INPUTS[0]]
    )
    assert encoded.dtype == jnp.bfloat16
    decoded, exact = logits(dataclasses.replace(DENSE, dtype='bfloat16'), inputs()), logits(DENSE, inputs())
    assert decoded.dtype == np.float32
    # Three digits of bfloat16, through four layers.
    np.testing.assert_allclose(decoded, exact, atol=0.2 * exact.std())


def test_padding_is_masked_in_float16():
    """-1e10 is infinite in float16, and a row that masks everything was nan: padding in a row, and rows of nothing else."""
    sizes = {'emb_dim': 32, 'mlp_dim': 64, 'head_dim': 16, 'num_encoder_layers': 1, 'num_decoder_layers': 1}
    batch = random_batch(padding=3)
    batch = {name: array.at[-1].set(0) for name, array in batch.items()}

    def loss_of(dtype):
        model = EncoderDecoderModel(with_moe(small_t5(**sizes, dtype=dtype), num_experts=4, min_capacity=1))
        params = random_params(model.module(), **{name: batch[name] for name in FEATURES[:3]})

        def loss(params):
            sums, moe_loss, _ = model.forward(params, batch, None, training=True)
            return sums['loss'] / sums['weight'] + moe_loss

        return jit(jax.value_and_grad(loss))(params)

    loss, grads = loss_of('float16')
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(loss, loss_of('float32')[0], rtol=0.02)
