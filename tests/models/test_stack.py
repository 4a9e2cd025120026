"""Scanned and rematerialised stacks compute what the plain one does, with the same parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from tests.small import FEATURES, close_to_largest, random_batch, small_t5, with_moe
from upcycle.errors import UserError
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.models.stack import Remat, segments

SIZES = {'emb_dim': 32, 'mlp_dim': 64, 'num_heads': 2, 'head_dim': 16, 'num_encoder_layers': 4}


def model(**fields):
    config = with_moe(small_t5(**SIZES, num_decoder_layers=4), num_experts=4)
    return EncoderDecoderModel(dataclasses.replace(config, **fields), aux_loss_factor=1.0)


@functools.cache
def inputs():
    batch = random_batch(padding=3)
    return batch, random_params(model().module(), **{name: batch[name] for name in FEATURES[:3]})


@functools.cache
def step(which):
    """Loss, metrics and gradients."""
    batch, params = inputs()

    def loss(params):
        sums, moe_loss, metrics = which.forward(params, batch, jax.random.key(0), training=True)
        return sums['loss'] / sums['weight'] + moe_loss, metrics

    return jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    'fields',
    [
        {'scan_layers': True},
        {'scan_layers': True, 'remat': 'full'},
        {'remat': 'full'},
        {'remat': 'minimal'},
        {'remat': 'exchange'},
    ],
    ids=str,
)
def test_the_form_of_the_program_changes_nothing(fields):
    (loss, metrics), grads = step(model())
    (other, other_metrics), other_grads = step(model(**fields))
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    assert other_metrics.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(other_metrics[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_(close_to_largest(a, b)), other_grads, grads)


def test_a_scanned_stack_is_compiled_once():
    """The program of eight layers in a loop is hardly longer than that of four."""
    batch, _ = inputs()

    def length(depth, scan):
        deep = model(num_encoder_layers=depth, num_decoder_layers=depth, scan_layers=scan)
        params = jax.eval_shape(lambda: random_params(deep.module(), **{name: batch[name] for name in FEATURES[:3]}))
        lowered = jax.jit(lambda params: deep.forward(params, batch, None, training=True)[0]['loss']).lower(params)
        return lowered.as_text().count('dot_general')

    assert length(8, scan=True) == length(4, scan=True)
    assert length(8, scan=False) > 1.8 * length(4, scan=False)


@pytest.mark.parametrize(
    ('kinds', 'expected'),
    [
        ('aaaa', [(0, 1, 4)]),
        ('abab', [(0, 2, 2)]),
        ('aabb', [(0, 1, 2), (2, 1, 2)]),
        ('aba', [(0, 1, 1), (1, 1, 1), (2, 1, 1)]),
        ('a', [(0, 1, 1)]),
        ('', []),
    ],
)
def test_segments(kinds, expected):
    assert segments(kinds) == expected


def test_dropout_differs_from_layer_to_layer_of_a_loop():
    """Two equal layers of a loop must not drop the same neurons."""
    batch, params = inputs()
    looped = model(scan_layers=True, dropout_rate=0.5)
    losses = [
        float(jit(lambda rng: looped.forward(params, batch, rng, training=True)[0]['loss'])(jax.random.key(seed)))
        for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_an_unknown_policy_is_refused():
    with pytest.raises(UserError, match="REMAT = 'some' is not one of none, minimal, exchange, full"):
        small_t5(remat='some')
    assert small_t5(remat='full').remat is Remat.FULL


def test_routers_stay_in_float32_in_a_loop():
    """Their kernels are stacked as they are, whatever the activations' type."""
    batch, params = inputs()
    looped, plain = (model(dtype='bfloat16', scan_layers=scan) for scan in (True, False))
    metrics = [
        jit(lambda params, which=which: which.forward(params, batch, None, training=True)[2])(params)
        for which in (looped, plain)
    ]
    first = 'experts/encoder/layers_1/router_entropy'
    assert jnp.abs(metrics[0][first] - metrics[1][first]) < 1e-3 * metrics[1][first]
