"""Decoder-only models: causality, padding, packing, cache, scan, upcycling, configuration. Transformers' numbers are compared in
`tests/checkpoints`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.moe.quick import jit, random_params
from tests.small import close_to_largest, llm_moe, small_llm, spec_of
from upcycle import cost
from upcycle.errors import UserError
from upcycle.hlo import Program
from upcycle.models import identify
from upcycle.models.causal_lm import CausalLM
from upcycle.models.decoder import default_positions
from upcycle.models.rope import Rope
from upcycle.moe.config import MoEConfig

B, L, V = 2, 12, 128
# Every option that changes attention, the norms or the residual stream.
GEMMA = {
    'norm_placement': 'both',
    'norm_offset': 1.0,
    'qk_norm': 'head',
    'tied_embeddings': True,
    'attention_soft_cap': 2.0,
    'logits_soft_cap': 5.0,
    'embedding_multiplier': 48**0.5,
    'window': 5,
    'window_layers': (0,),
    'window_rope_theta': 100.0,
}
OLMO = {'norm_placement': 'post', 'qk_norm': 'projection', 'clip_qkv': 1.5}
SMOLLM = {'rope_layers': (1,), 'qkv_bias': True, 'out_bias': True, 'rope_dims': 10, 'residual_multiplier': 0.5}
DENSE = {'llama': {}, 'gemma': GEMMA, 'olmo': OLMO, 'smollm': SMOLLM}
MOES = {
    'ragged': {'moe': llm_moe()},
    'gather': {'moe': llm_moe(dispatch='gather', group_size=8)},
    'einsum, one layer': {'moe': llm_moe(dispatch='einsum', train_capacity_factor=1.0), 'moe_layers': (1,)},
}
CONFIGS = {name: small_llm(**fields) for name, fields in (DENSE | MOES).items()}
CONFIGS['gemma, ragged'] = small_llm(**GEMMA, **MOES['ragged'])
ATTENTION = {'attention_moe': llm_moe(balance_bias_rate=0.01), 'moe_output_bias': True} | MOES['ragged']
CONFIGS['attention experts'] = small_llm(**ATTENTION, qk_norm='head', clip_qkv=2.0)


@functools.cache
def params_of(config):
    return random_params(CausalLM(config).module(), jnp.ones((B, 8), jnp.int32))


@functools.cache
def logits_of(config):
    return jit(CausalLM(config).logits)


def logits(config, tokens, **features):
    return np.asarray(logits_of(config)(params_of(config), {'tokens': tokens, **features}))


def random_tokens(seed=0, length=L):
    return np.random.default_rng(seed).integers(0, V, (B, length)).astype(np.int32)


def training_batch(length=L):
    tokens = random_tokens(length=length + 1)
    weights = np.ones((B, length), np.float32)
    weights[0, -3:] = 0
    return {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'loss_weights': weights}


# The last row changes: with slots, groups may reach over rows, and fill in the order of tokens.
@pytest.mark.parametrize('name', CONFIGS)
def test_no_output_depends_on_a_later_token(name):
    tokens = random_tokens()
    changed = tokens.copy()
    changed[-1, 7] = (changed[-1, 7] + 1) % V
    segments = np.repeat([[0, 1]], B, axis=0).repeat(6, axis=1)
    for features in ({}, {'segment_ids': segments}):
        before, after = logits(CONFIGS[name], tokens, **features), logits(CONFIGS[name], changed, **features)
        np.testing.assert_array_equal(before[:-1], after[:-1])
        np.testing.assert_array_equal(before[-1, :7], after[-1, :7])
        assert (before[-1, 7] != after[-1, 7]).any()


@pytest.mark.parametrize('name', [*DENSE, 'ragged', 'gemma, ragged'])
def test_padding_on_either_side_and_packing_change_nothing(name):
    config, tokens = CONFIGS[name], random_tokens()
    alone = logits(config, tokens)
    ones, zeros = np.ones((B, 5), bool), np.zeros((B, 5), np.int32)
    mask = np.concatenate([ones[:, :0], np.ones((B, L), bool), ~ones], axis=1)
    right = logits(config, np.concatenate([tokens, zeros], axis=1), mask=mask)[:, :L]
    left = logits(config, np.concatenate([zeros, tokens], axis=1), mask=mask[:, ::-1])[:, 5:]
    row = tokens.reshape(1, -1)
    packed = logits(config, row, segment_ids=np.arange(B).repeat(L)[None]).reshape(alone.shape)
    for other in (right, left, packed):
        np.testing.assert_allclose(other, alone, atol=2e-5)


def test_no_token_id_means_padding():
    tokens = random_tokens()
    tokens[:, 3] = 0
    changed = tokens.copy()
    changed[:, 3] = 1
    assert (logits(CONFIGS['ragged'], tokens)[:, 4:] != logits(CONFIGS['ragged'], changed)[:, 4:]).any(axis=2).all()


@pytest.mark.parametrize('name', [*DENSE, 'ragged', 'gemma, ragged', 'attention experts'])
def test_the_cache_gives_the_logits_of_the_whole_text(name):
    """A prefill of prompts of two lengths, padded on the left, then three tokens, then single ones."""
    config, tokens = CONFIGS[name], random_tokens()
    whole, params, module = logits(config, tokens), params_of(config), CausalLM(config).module()
    mask = np.ones((B, L), bool)
    mask[1, :3] = False
    tokens[1] = np.concatenate([[99, 99, 99], tokens[1, :-3]])

    @functools.partial(jax.jit, static_argnames='length')
    def append(cache, start, length):
        part = (jax.lax.dynamic_slice_in_dim(x, start, length, axis=1) for x in (tokens, mask))
        part = dict(zip(('tokens', 'mask'), part, strict=True))
        return module.apply({'params': params, **cache}, **part, max_length=L + 2, mutable=['cache'])

    cache, start, out = {}, 0, []
    for length in (6, 3, 1, 1, 1):
        logits_BxLxV, cache = append(cache, start, length=length)
        start += length
        out.append(logits_BxLxV)
    out = np.concatenate(out, axis=1)
    np.testing.assert_allclose(out[0], whole[0], atol=2e-5)
    np.testing.assert_allclose(out[1, 3:], whole[1, :-3], atol=2e-5)


@pytest.mark.parametrize(
    ('fields', 'remat'),
    [
        (GEMMA | MOES['ragged'] | {'window_layers': (0, 2)}, 'minimal'),
        (MOES['gather'] | {'moe_layers': (1, 3)}, 'full'),
        (ATTENTION, 'full'),
        pytest.param(SMOLLM | {'rope_layers': (0, 1, 3)}, 'exchange', marks=pytest.mark.exhaustive),
    ],
)
def test_a_loop_and_rematerialisation_compute_the_same(fields, remat):
    plain = small_llm(**{'num_layers': 4, **fields})
    batch = training_batch()

    def gradients(config):
        def loss(params):
            sums, auxiliary, metrics = CausalLM(config).forward(params, batch, None, training=True)
            return sums['loss'] + auxiliary, (sums, metrics)

        return jit(jax.value_and_grad(loss, has_aux=True))(params_of(plain))

    (loss, aux), grads = gradients(plain)
    (looped, looped_aux), looped_grads = gradients(dataclasses.replace(plain, scan_layers=True, remat=remat))
    np.testing.assert_allclose(looped, loss, rtol=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), looped_aux, aux)
    jax.tree.map(close_to_largest, looped_grads, grads)


@pytest.mark.parametrize('dispatch', ['ragged', 'gather'])
def test_experts_that_are_copies_compute_the_dense_model(dispatch):
    dense = small_llm()
    moe = llm_moe(num_experts=8, dispatch=dispatch, eval_capacity_factor=8.0)
    sparse = dataclasses.replace(dense, moe=moe)
    leaves, source = flatten_dict(params_of(sparse)), flatten_dict(params_of(dense))
    for path, leaf in leaves.items():
        if 'router' not in path:
            leaves[path] = jnp.broadcast_to(source[tuple(part for part in path if part != 'expert')], leaf.shape)
    tokens = random_tokens()
    ours = logits_of(sparse)(unflatten_dict(leaves), {'tokens': tokens})
    np.testing.assert_allclose(ours, logits(dense, tokens), atol=1e-5)


def test_the_loss_is_the_cross_entropy_of_weighted_targets():
    model, batch = CausalLM(CONFIGS['llama'], z_loss=0.1), training_batch()
    sums, auxiliary, metrics = model.forward(params_of(model.config), batch, None, training=False)
    log_probs = jax.nn.log_softmax(logits(model.config, batch['tokens']))
    picked = -np.take_along_axis(np.asarray(log_probs), batch['targets'][..., None], axis=2)[..., 0]
    expected = (picked * batch['loss_weights']).sum()
    np.testing.assert_allclose(sums['loss'] - sums['z_loss'], expected, rtol=1e-5)
    assert sums['z_loss'] > 0 and sums['weight'] == batch['loss_weights'].sum() == model.loss_normalizer(batch)
    assert auxiliary == 0 and metrics == {}


@pytest.mark.parametrize('name', ['llama', 'einsum, one layer'])
def test_matrix_products_are_counted_exactly(name):
    model, batch = CausalLM(CONFIGS[name]), training_batch(16)
    compiled = (
        jax.jit(lambda params, batch: model.forward(params, batch, None, training=True)[0]['loss'])
        .lower(params_of(model.config), batch)
        .compile(compiler_options={'xla_backend_optimization_level': 0})
    )
    analytic = cost.forward_flops(model, spec_of(batch), training=True)
    assert Program(compiled.as_text()).matmul_flops() == pytest.approx(analytic, rel=1e-6)


@pytest.mark.parametrize('name', CONFIGS)
def test_the_model_is_found_again_from_leaves_and_metadata(name):
    model = CausalLM(CONFIGS[name])
    shapes = {path: jax.ShapeDtypeStruct(shape, 'float32') for path, shape in identify.shapes(model).items()}
    facts = identify.facts_of({'model': model.describe()})
    assert identify.check('checkpoint', shapes, facts).config == model.dense().config
    assert CausalLM(small_llm()).saved(model.describe()).config == model.config
    assert not identify.different_function(model, facts)


def test_positions_count_real_tokens_of_the_segment():
    real = np.array([[0, 0, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], bool)
    assert default_positions(real, None).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]
    segments = np.array([[1, 1, 1, 1, 1, 1], [4, 4, 7, 7, 7, 2]])
    assert default_positions(real, segments).tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 0, 1, 2, 0]]


def test_angles_are_float32_in_a_bfloat16_model():
    x = jnp.ones((1, 1, 1, 16), jnp.bfloat16)
    turned = Rope(16).rotate(x, jnp.array([[1001]]))
    exact = Rope(16).rotate(x.astype(jnp.float32), jnp.array([[1001]]))
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ('one', 'other'),
    [
        ({'window': 4, 'window_layers': (1, 0)}, {'window': 4}),
        ({'window': 4, 'window_layers': 'none'}, {}),
        ({'rope_layers': [0, 1]}, {}),
        ({'attention_scale': 0.25, 'rope_dims': 16, 'final_norm_epsilon': 1e-6}, {}),
    ],
)
def test_settings_that_mean_the_same_are_equal(one, other):
    assert small_llm(**one) == small_llm(**other)


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'num_kv_heads': 3}, 'NUM_KV_HEADS = 3 must divide NUM_HEADS = 4'),
        ({'mlp_activations': ('swish',)}, "MLP_ACTIVATIONS = .'swish',. must be"),
        ({'rope_dims': 7}, 'ROPE_DIMS = 7 must be an even number'),
        ({'rope_dims': 18}, 'ROPE_DIMS = 18 .* at most HEAD_DIM = 16'),
        ({'rope_type': 'yarn'}, "ROPE_TYPE = 'yarn' needs ROPE_ORIGINAL_LENGTH"),
        ({'rope_type': 'dynamic'}, "ROPE_TYPE = 'dynamic' must be one of default, linear, llama3, yarn"),
        (
            {'rope_type': 'llama3', 'rope_original_length': 8, 'rope_high_freq_factor': 1.0},
            'ROPE_HIGH_FREQ_FACTOR = 1.0 must be above',
        ),
        ({'window_rope_theta': 5.0}, 'WINDOW_ROPE_THETA = 5.0 .* set WINDOW'),
        ({'window': 4, 'window_layers': (2,)}, 'WINDOW_LAYERS names layer 2'),
        ({'moe': llm_moe(), 'moe_layers': (5,)}, 'MOE_LAYERS names layer 5'),
        ({'moe': MoEConfig(num_experts=4)}, "ROUTER = 'expert_choice' .* leaks the future"),
    ],
)
def test_refusals_name_the_binding(settings, message):
    with pytest.raises(UserError, match=message):
        small_llm(**settings)


@pytest.mark.parametrize(
    ('batch', 'message'),
    [
        ({}, "no 'tokens'"),
        ({'tokens': np.ones((2, 3))}, 'tokens has type float'),
        ({'tokens': np.ones(3, int)}, r'shape \(3,\)'),
        ({'tokens': np.ones((2, 3), int), 'mask': np.ones((2, 4), bool)}, 'mask has type bool'),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch, message):
    with pytest.raises(UserError, match=message):
        CausalLM(CONFIGS['llama']).logits({}, batch)
