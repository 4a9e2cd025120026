"""Execution: values, one read per source, random leaves by name, and the function check."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.fixtures import requires_fixtures
from tests.moe.quick import jit, random_params
from tests.small import (
    FIXTURE_T5,
    fixture,
    fixture_tree,
    flaxformer_moe,
    image_batch,
    module_inputs,
    random_batch,
    real_tokens,
    small_t5,
    small_vit,
    vit_moe,
    with_moe,
)
from tests.surgery.in_memory import abstract
from tests.surgery.test_plan import DENSE, SPARSE, leaves_of
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.image_classifier import ImageClassifier
from upcycle.surgery.fingerprint import sha256_of
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.receipt import check_function

ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def filled(leaves, seed=0):
    """Random values for every leaf of an abstract tree."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            rng.integers(1, 100, leaf.shape) if leaf.dtype == jnp.int32 else rng.random(leaf.shape), leaf.dtype
        )
        for name, leaf in leaves.items()
    }


def carry_out(spec, seed=0):
    source, read = filled(DENSE), []

    def reader(name, sharding):
        read.append(name)
        return jax.device_put(source[name], sharding)

    rng = jnp.zeros((2,), jnp.uint32)
    target = execute(plan_surgery(DENSE, SPARSE, spec), reader, dict.fromkeys(SPARSE, ONE), new={'rng': rng})
    return source, target, read


@pytest.mark.parametrize('state', ['fresh', 'tile'])
def test_copies_experts_and_keeps_the_rest(state):
    source, target, read = carry_out(Surgery(optimizer_state=state))
    assert set(target) == set(SPARSE)
    assert all(target[name].shape == leaf.shape and target[name].dtype == leaf.dtype for name, leaf in SPARSE.items())
    for stack in ('encoder', 'decoder'):
        for leaf in ('wi_0', 'wi_1', 'wo'):
            experts = target[f'params/{stack}/layers_1/mlp/expert/{leaf}/kernel']
            for expert in experts:
                np.testing.assert_array_equal(expert, source[f'params/{stack}/layers_1/mlp/{leaf}/kernel'])
        name = f'params/{stack}/layers_0/mlp/wo/kernel'
        np.testing.assert_array_equal(target[name], source[name])
    moments = target['opt_state/param_states/encoder/layers_1/mlp/expert/wo/kernel/v_row']
    expected = source['opt_state/param_states/encoder/layers_1/mlp/wo/kernel/v_row'] if state == 'tile' else 0
    np.testing.assert_array_equal(moments, jnp.broadcast_to(expected, moments.shape))
    assert target['step'] == source['step']
    assert target['opt_state/count'] == (source['opt_state/count'] if state == 'tile' else source['step'])
    assert len(read) - len(set(read)) == (0 if state == 'tile' else 1)  # the step is also the clock


@pytest.mark.parametrize('router', ['expert_choice', 'merged'])
def test_the_optimizer_state_of_an_average_is_the_experts_sum(router):
    of_moe = leaves_of(with_moe(small_t5(), num_experts=4, num_shared_experts=1, router=router))
    plan = plan_surgery(of_moe, DENSE, Surgery(operator=None, dense_operator='average', optimizer_state='tile'))
    assert all('/router/' in name or '/mixing' in name or name == 'rng' for name in plan.dropped)
    source = filled(of_moe)
    made = execute(plan, lambda name, sharding: source[name], dict.fromkeys(DENSE, ONE), new={'rng': source['rng']})
    mlp, leaf = 'opt_state/param_states/encoder/layers_1/mlp', 'wo/kernel/v_row'
    expected = source[f'{mlp}/expert/{leaf}'].sum(axis=0) + source[f'{mlp}/shared/{leaf}']
    np.testing.assert_allclose(made[f'{mlp}/{leaf}'], expected, rtol=1e-6)
    kept = 'opt_state/param_states/encoder/layers_0/mlp/wo/kernel/v_row'
    np.testing.assert_array_equal(made[kept], source[kept])
    assert made['opt_state/count'] == source['opt_state/count']


def test_routers_depend_on_seed_and_name_only():
    _, first, _ = carry_out(Surgery(seed=1))
    _, again, _ = carry_out(Surgery(seed=1, optimizer_state='tile'))
    _, other, _ = carry_out(Surgery(seed=2))
    routers = [name for name in SPARSE if name.startswith('params/') and 'router' in name]
    assert len(routers) == 2
    for name in routers:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
        assert float(jnp.std(first[name])) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(first[routers[0]], first[routers[1]])


def test_hash_knows_path_dtype_shape_and_bytes():
    leaf = jnp.arange(6, dtype=jnp.float32)
    hashes = {
        sha256_of('a', leaf),
        sha256_of('b', leaf),
        sha256_of('a', leaf.reshape(2, 3)),
        sha256_of('a', leaf.astype(jnp.bfloat16)),
        sha256_of('a', leaf.at[0].set(-0.0)),
    }
    assert len(hashes) == 5
    assert sha256_of('a', leaf) == sha256_of('a', np.asarray(leaf))


def upcycled(family, **settings):
    """A dense model of a family with random parameters, and its upcycled version."""
    settings = {'num_experts': 4, **settings}
    if family == 'vit':
        config = small_vit(moe=vit_moe(**settings), pooling='map', group_images=2)
        model, batch = ImageClassifier(config), image_batch(config, filled=1)
    else:
        model, batch = EncoderDecoderModel(with_moe(small_t5(), **settings)), random_batch(padding=3)
    dense, sparse = (
        flatten_dict(random_params(which.module(), **module_inputs(batch)), sep='/') for which in (model.dense(), model)
    )
    for name, leaf in sparse.items():
        if '/expert/' in name:
            sparse[name] = jnp.broadcast_to(dense[name.replace('/expert/', '/')], leaf.shape)
        elif '/router/' not in name:
            sparse[name] = dense[name]
    return model, unflatten_dict(dense, sep='/'), unflatten_dict(sparse, sep='/'), batch


FAMILIES = ('t5', 'vit')


# By default, every pair of the three settings occurs once.
REPEATED = {('t5', True, 1.0), ('t5', False, 2.0), ('vit', False, 1.0), ('vit', True, 2.0)}


@pytest.mark.parametrize(
    ('family', 'normalize', 'factor'),
    [
        pytest.param(*case, marks=pytest.mark.exhaustive if case in REPEATED else ())
        for case in itertools.product(FAMILIES, (False, True), (1.0, 2.0))
    ],
)
def test_function_check_layer_by_layer(family, normalize, factor):
    model, *rest = upcycled(family, eval_capacity_factor=factor, normalize_combine_weights=normalize)
    check = check_function(model, *rest)
    assert set(check['layers']) == set(model.moe_layers()) and len(check['layers']) == 2
    for layer in check['layers'].values():
        assert 0 < layer['covered'] <= 1
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)
        assert layer['max_abs_on_uncovered'] == 0
        if normalize:
            assert layer['ratio'] == pytest.approx(1, abs=1e-5)
        else:
            assert layer['ratio'] < 0.9


@pytest.mark.parametrize('family', FAMILIES)
def test_whole_model_is_the_same_where_every_token_reaches_every_expert(family):
    settings = {'eval_capacity_factor': 4.0, 'normalize_combine_weights': True, 'num_selected_experts': 4}
    model, dense, sparse, batch = upcycled(family, **settings)
    check = check_function(model, dense, sparse, batch)
    assert all(layer['covered'] == 1 for layer in check['layers'].values())
    assert abs(check['whole_model']['loss_gap']) < 1e-5
    inputs = module_inputs(batch)
    before, after = (
        jit(lambda params, which=which: which.module().apply({'params': params}, **inputs))(params)
        for which, params in ((model.dense(), dense), (model, sparse))
    )
    before, after = np.asarray(before), np.asarray(after)
    real = np.asarray(real_tokens(batch, 'decoder', num_tokens=1))
    assert np.abs((before - after).reshape(*real.shape, -1)[real]).max() <= 1e-5 * np.abs(before).max()


def test_function_check_notices_a_wrong_expert():
    model, dense, sparse, batch = upcycled('t5')
    kernel = sparse['encoder']['layers_1']['mlp']['expert']['wo']['kernel']
    sparse['encoder']['layers_1']['mlp']['expert']['wo']['kernel'] = kernel.at[2].multiply(1.01)
    check = check_function(model, dense, sparse, batch)
    assert check['layers']['encoder/layers_1/mlp']['max_abs_difference_covered'] > 1e-4


@requires_fixtures
def test_gives_the_parameters_that_t5x_upcycled():
    """t5x's UpcycleCheckpointer and our surgery agree on every leaf except routers, which are random in both."""
    dense, moe = fixture('t5x_dense_reference.npz'), fixture('flaxformer_moe_reference.npz')
    source = {'params/' + name: leaf for name, leaf in flatten_dict(fixture_tree(dense, 'params/'), sep='/').items()}
    expected = {'params/' + name: leaf for name, leaf in flatten_dict(fixture_tree(moe, 'params/'), sep='/').items()}
    model = EncoderDecoderModel(flaxformer_moe())
    target, _ = abstract(model, random_batch(FIXTURE_T5.vocab_size, batch=8, inputs=8))
    assert {name: leaf.shape for name, leaf in target.items()} == {name: leaf.shape for name, leaf in expected.items()}
    plan = plan_surgery(source, target, Surgery())
    made = execute(plan, lambda name, sharding: source[name], dict.fromkeys(target, ONE), new={})
    for name, leaf in expected.items():
        if '/router/' not in name:
            np.testing.assert_array_equal(made[name], leaf)
