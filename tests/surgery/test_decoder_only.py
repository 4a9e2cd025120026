"""Operators on a decoder-only model with the recipe of its family: dropless Top-2, normalised weights, biases in all MLPs."""

import functools

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.moe.quick import jit
from tests.small import llm_batch, llm_moe, small_llm
from tests.surgery.in_memory import leaves_of, params_of, upcycle
from upcycle.models.causal_lm import CausalLM
from upcycle.surgery.operators import Granular, Partial
from upcycle.surgery.operators.dense import Drop
from upcycle.surgery.plan import Surgery
from upcycle.surgery.receipt import check_layer

PATH = 'decoder/layers_1/mlp'
GATED = {'num_shared_experts': 1, 'shared_gate': True, 'weight_scale': 0.5}


def model_of(**moe):
    """One MoE layer behind a dense one, and a batch."""
    return CausalLM(small_llm(mlp_bias=True, moe=llm_moe(**moe), moe_layers=(1,))), llm_batch()


@functools.cache
def dense():
    model, batch = model_of()
    return params_of(model.dense(), batch)


def check(model, source, target):
    """The function check of the MoE layer."""

    def below(params):
        start = f'params/{PATH}/'
        return {name.removeprefix(start): leaf for name, leaf in leaves_of(params).items() if name.startswith(start)}

    return check_layer(model, PATH, below(source), below(target), 64)


@pytest.mark.parametrize(
    ('operator', 'moe', 'kept'),
    [
        ('copy', {'router_bias': True}, True),
        ('copy', GATED, True),
        ('copy', {'num_shared_experts': 1, 'shared_gate': True}, False),  # one half too much
        (Granular(shards=2), {'granularity': 2, 'num_selected_experts': 4, 'num_experts': 8}, True),
        (Granular(shards=2), {'granularity': 2, 'num_selected_experts': 2, **GATED, 'num_shared_experts': 2}, True),
        (Partial(shards=2, ratio=0.0), {'granularity': 2, 'num_selected_experts': 4, 'num_experts': 8}, True),
        (Drop(ratio=0.0), {}, True),
        (Drop(ratio=0.5), {}, False),
        ('random', {'expert_mlp_dim': 40}, False),
    ],
)
def test_what_keeps_the_function(operator, moe, kept):
    model, batch = model_of(**moe)
    layer = check(model, dense(), upcycle(model, dense(), Surgery(operator, router_stddev=0.3), batch))
    assert layer.gap < 1e-5 if kept else layer.gap > 1e-2
    assert not kept or layer.max_abs_difference_covered < 1e-5


def test_growing_k_with_the_experts_keeps_the_function():
    """With a router bias and a gated shared expert, which stay as they are."""
    settings = {**GATED, 'router_bias': True}
    small, batch = model_of(num_experts=4, num_selected_experts=2, **settings)
    old = params_of(small, batch)
    grown, _ = model_of(num_experts=8, num_selected_experts=4, **settings)
    new = upcycle(grown, old, Surgery('grow', router_init='copied', router_noise=0.0), batch)
    x_BxLxD = np.random.default_rng(0).normal(size=(4, 16, 48)).astype(np.float32)
    expected, actual = (
        jit(functools.partial(model.moe_module(PATH).apply, training=False))(
            {'params': params['decoder']['layers_1']['mlp']}, x_BxLxD, batch['mask']
        )
        for model, params in ((small, old), (grown, new))
    )
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    old, new = flatten_dict(old, sep='/'), flatten_dict(new, sep='/')
    for name in (f'{PATH}/shared_gate/kernel', f'{PATH}/shared/wo/bias'):
        np.testing.assert_array_equal(new[name], old[name])


def test_merging_keeps_the_old_experts_and_the_mean_of_all_is_dense_again():
    small, batch = model_of(num_experts=3)
    old = params_of(small, batch)
    grown, _ = model_of(num_experts=4)
    new = flatten_dict(upcycle(grown, old, Surgery('merge', router_init='copied'), batch), sep='/')
    old_flat = flatten_dict(old, sep='/')
    for leaf in ('wi_0/kernel', 'wo/bias'):
        np.testing.assert_array_equal(new[f'{PATH}/expert/{leaf}'][:3], old_flat[f'{PATH}/expert/{leaf}'])
    average = upcycle(small.dense(), old, Surgery(None, dense_operator='average'), batch)
    for leaf in ('wi_0/kernel', 'wo/bias'):
        mean = old_flat[f'{PATH}/expert/{leaf}'].mean(axis=0)
        np.testing.assert_allclose(flatten_dict(average, sep='/')[f'{PATH}/{leaf}'], mean, atol=1e-6)
