"""Which parameters a layer does nothing with but cast: rounded before, they give the same numbers, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.moe.quick import jit, random_params
from tests.small import small_t5, small_vit, vit_moe
from upcycle.models import t5, vit
from upcycle.models.casting import needed_as_they_are
from upcycle.models.layers.attention import segments
from upcycle.moe.config import AdaptiveBalance, MoEConfig
from upcycle.moe.layer import METRICS

ROUTER = 'router/router_weights/w/kernel'
NORMS = {f'LayerNorm_{i}/{name}' for i in (0, 1) for name in ('scale', 'bias')}
EXPERTS = {f'expert/Dense_{i}/{name}' for i in (0, 1) for name in ('kernel', 'bias')}
SHARED = {name.replace('expert', 'shared') for name in EXPERTS}
TOP_2 = {'num_experts': 4, 'router': 'top_k'}


def t5_layer(moe, **fields):
    config = small_t5(emb_dim=32, mlp_dim=64, head_dim=16, dtype='bfloat16', **fields)
    real_BxL = jnp.arange(16)[None] < jnp.array([[16], [13]])
    return t5.EncoderLayer(config, moe), (real_BxL, segments(real_BxL, real_BxL), None, True)


def vit_layer(moe):
    config = small_vit(emb_dim=32, mlp_dim=64, num_heads=2, dtype='bfloat16')
    return vit.EncoderBlock(config, (moe, 0.0)), (jnp.ones((2, 16), bool), True)


CASES = {
    'top-2': (t5_layer, MoEConfig(**TOP_2), {ROUTER}),
    'state': (
        t5_layer,
        MoEConfig(**TOP_2, balance_bias_rate=0.1, adaptive_balance=AdaptiveBalance(), default_output_decay=0.9),
        {ROUTER, *(f'router_state/{name}' for name in ('bias', 'loss_weight', 'default_output'))},
    ),
    'ragged': (t5_layer, MoEConfig(**TOP_2, dispatch='ragged', balance_bias_rate=0.1), {ROUTER, 'router_state/bias'}),
    'dense MLP': (functools.partial(t5_layer, position_biases='every_layer'), None, set()),
    'expert choice': (vit_layer, vit_moe(num_experts=4, num_shared_experts=1), {ROUTER}),
    'soft': (vit_layer, vit_moe(num_experts=4, router='soft', slots_per_expert=2), {ROUTER, 'router/scale'}),
    # Experts are added up in float32, and the sum is cast.
    'merged': (vit_layer, vit_moe(num_experts=4, router='merged', num_shared_experts=1), {'mixing'} | EXPERTS | SHARED),
    'all experts': (vit_layer, vit_moe(num_experts=4, router='dense'), {ROUTER}),
}


@pytest.mark.parametrize('case', CASES)
def test_the_others_may_be_cast_before(case):
    """One program, once with the parameters as they are, once with those rounded that it is said to round itself."""
    build, moe, expected = CASES[case]
    layer, arguments = build(moe)
    x_BxLxD = jax.random.normal(jax.random.key(0), (2, 16, 32), jnp.bfloat16)
    *arrays, training = arguments

    def apply(params, x_BxLxD):
        rngs = {'jitter': jax.random.key(1)}
        return layer.apply({'params': params}, x_BxLxD, *arrays, training, rngs=rngs, mutable=[METRICS])

    params = random_params(layer, x_BxLxD, *arrays, training=training)
    needed = flatten_dict(needed_as_they_are(apply, jnp.bfloat16, params, x_BxLxD), sep='/')
    prefix = 'mlp/' if build is not vit_layer else 'MlpBlock_0/'
    norms = NORMS if build is vit_layer else set()
    assert {name for name, yes in needed.items() if yes} == {prefix + name for name in expected} | norms
    flat = flatten_dict(params, sep='/')
    rounded = {
        name: leaf if needed[name] else leaf.astype(jnp.bfloat16).astype(jnp.float32) for name, leaf in flat.items()
    }
    program = jit(apply)
    found, again = program(params, x_BxLxD), program(unflatten_dict(rounded, sep='/'), x_BxLxD)
    jax.tree.map(np.testing.assert_array_equal, again, found)
    everything = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    differs = jax.tree.map(lambda a, b: bool((a != b).any()), program(everything, x_BxLxD), found)
    assert any(jax.tree.leaves(differs)) == bool(expected | norms)


def test_what_is_found_through_a_program():
    """Moves and calls are looked through, loops are not, and what is returned, or used once more, is needed."""
    half = functools.partial(jax.lax.convert_element_type, new_dtype=jnp.bfloat16)

    def branches(x, y):
        return jax.lax.cond(x.sum() > 0, lambda y: half(y[:2]), lambda y: half(y[2:4]), y)

    def loop(x, y):
        return jax.lax.scan(lambda total, row: (total + half(y).sum() + half(row).sum(), None), half(0.0), x)[0]

    x = jnp.arange(12.0).reshape(4, 3)
    for function, arguments, expected in (
        (lambda x, y: half(x.T.reshape(-1)[None]) * half(y).sum(), (x, x), (False, False)),
        (lambda x, y: half(x) + half(y * 2), (x, x), (False, True)),
        (lambda x: (half(x), x), (x,), (True,)),
        (lambda x: x.astype(jnp.float16), (x,), (True,)),
        (jax.jit(lambda x, y: half(x @ y.T)), (x, x), (True, True)),
        (jax.checkpoint(lambda x: jnp.sin(half(jax.lax.optimization_barrier(x)))), (x,), (False,)),
        (branches, (x, x), (True, False)),
        (loop, (x, x), (True, True)),
        (lambda x, y: jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x + half(y), x), (half(x), x), (True, True)),
    ):
        tree = dict(enumerate(arguments))
        found = needed_as_they_are(lambda tree, function=function: function(*tree.values()), jnp.bfloat16, tree)
        assert tuple(found.values()) == expected, function
