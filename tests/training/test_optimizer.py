"""Optimizers: per expert, factored, equal to the dense MLP's, and equal to optax where the algorithms agree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from upcycle.training.optimizer import Adafactor, AdamW, Sgd

D, F, E = 128, 256, 4


def _leaf(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


OPTIMIZERS = {
    'adafactor': Adafactor(weight_decay_rate=1e-3),
    'adafactor with momentum': Adafactor(beta1=0.9, weight_decay_rate=1e-3),
    'adamw': AdamW(weight_decay_rate=1e-2, weight_decay_names='w'),
    'sgd': Sgd(nesterov=True),
}


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('shape', [(D, F), (F, D), (D, 8), (D,)])
def test_an_expert_given_the_dense_gradient_and_state_gets_the_dense_update(shape, name):
    optimizer = OPTIMIZERS[name]
    dense, stacked = {'w': _leaf(0, *shape)}, {'w': jnp.broadcast_to(_leaf(0, *shape), (E, *shape))}
    dense_state, stacked_state = optimizer.init(dense, {'w': 0}), optimizer.init(stacked, {'w': 1})
    for step in range(3):
        grad = _leaf(step + 1, *shape)
        dense, dense_state = optimizer.update({'w': grad}, dense_state, dense, 0.01, {'w': 0})
        stacked, stacked_state = optimizer.update(
            {'w': jnp.broadcast_to(grad, (E, *shape))}, stacked_state, stacked, 0.01, {'w': 1}
        )
    for expert in range(E):
        np.testing.assert_allclose(stacked['w'][expert], dense['w'], rtol=1e-6, atol=1e-7)
        for name, leaf in dense_state['param_states']['w'].items():
            rounding = 1e-6 * float(jnp.max(jnp.abs(leaf)))
            np.testing.assert_allclose(stacked_state['param_states']['w'][name][expert], leaf, rtol=1e-6, atol=rounding)


def test_experts_do_not_see_each_other():
    """An expert with large gradients does not change the clipping, scale and statistics of the others."""
    optimizer = Adafactor()
    params, grads = {'w': _leaf(0, E, D, F)}, _leaf(1, E, D, F)
    axes = {'w': 1}
    quiet, _ = optimizer.update({'w': grads}, optimizer.init(params, axes), params, 0.01, axes)
    loud_grads = {'w': grads.at[0].multiply(1e3)}
    loud_params = {'w': params['w'].at[0].multiply(1e2)}
    loud, _ = optimizer.update(loud_grads, optimizer.init(params, axes), loud_params, 0.01, axes)
    np.testing.assert_array_equal(quiet['w'][1:], loud['w'][1:])


def test_factored_state_of_large_leaves_only():
    shapes = jax.tree.map(
        jnp.shape, Adafactor().init({'w': jnp.zeros((D, F)), 'r': jnp.zeros((D, 8))}, {'w': 0, 'r': 0})
    )
    assert shapes['param_states'] == {'w': {'v_row': (D,), 'v_col': (F,)}, 'r': {'v': (D, 8)}}
    experts = Adafactor().init({'w': jnp.zeros((E, D, F))}, {'w': 1})
    assert jax.tree.map(jnp.shape, experts['param_states']) == {'w': {'v_row': (E, D), 'v_col': (E, F)}}


@pytest.mark.parametrize('shape', [(D, F), (F, D), (64, 32), (D,)])
def test_equals_optax_where_optax_is_right(shape):
    """On a single unstacked leaf, optax's Adafactor is the same algorithm."""
    optimizer = Adafactor(decay_rate=0.8)
    reference = optax.adafactor(0.01, decay_rate=0.8, multiply_by_parameter_scale=True, clipping_threshold=1.0)
    ours = theirs = {'w': _leaf(0, *shape)}
    our_state, their_state = optimizer.init(ours, {'w': 0}), reference.init(theirs)
    for step in range(4):
        grads = {'w': _leaf(step + 1, *shape)}
        ours, our_state = optimizer.update(grads, our_state, ours, 0.01, {'w': 0})
        updates, their_state = reference.update(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours['w'], theirs['w'], rtol=1e-5, atol=1e-6)


def test_state_lies_on_the_mesh_as_its_parameter_does():
    from jax.sharding import PartitionSpec as P

    optimizer = Adafactor(beta1=0.9)
    params = {'w': jax.ShapeDtypeStruct((E, D, F), jnp.float32), 'b': jax.ShapeDtypeStruct((E, D), jnp.float32)}
    specs = {'w': P('expert', None, 'model'), 'b': P('expert', None)}
    state = optimizer.state_specs(params, specs, {'w': 1, 'b': 1})['param_states']
    assert state['w'] == {'v_row': P('expert', None), 'v_col': P('expert', 'model'), 'm': P('expert', None, 'model')}
    assert state['b'] == {'v': P('expert', None), 'm': P('expert', None)}


def test_adamw_and_sgd_are_optax_with_a_mask_and_clipping():
    shapes = {'mlp': {'kernel': (D, F), 'bias': (F,)}, 'norm': {'scale': (D,)}}
    params = jax.tree.map(lambda shape: _leaf(len(shape), *shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    mask = {'mlp': {'kernel': True, 'bias': False}, 'norm': {'scale': False}}
    clip = optax.clip_by_global_norm(1.0)
    decay = optax.add_decayed_weights(0.1, mask)
    for ours, theirs in (
        (AdamW(weight_decay_rate=0.1, clip_global_norm=1.0), optax.scale_by_adam()),
        (Sgd(weight_decay_rate=0.1, clip_global_norm=1.0), optax.trace(0.9)),
    ):
        chain = optax.chain(clip, theirs, decay, optax.scale(-0.01))
        mine = expected = params
        my_state, state = ours.init(params, None), chain.init(params)
        for step in range(3):
            grads = jax.tree.map(lambda leaf, step=step: leaf * (step + 1.0), params)
            mine, my_state = ours.update(grads, my_state, mine, 0.01, None)
            updates, state = chain.update(grads, state, expected)
            expected = optax.apply_updates(expected, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), mine, expected)
        assert my_state['count'] == 3


def test_decay_only_where_it_is_named():
    optimizer = Adafactor(weight_decay_rate=0.5, weight_decay_names='kernel$')
    params = {'kernel': _leaf(0, D, F), 'scale': _leaf(1, D)}
    axes = {'kernel': 0, 'scale': 0}
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = optimizer.update(zeros, optimizer.init(params, axes), params, 0.0, axes)
    np.testing.assert_allclose(new['kernel'], 0.5 * params['kernel'])
    np.testing.assert_array_equal(new['scale'], params['scale'])
