"""Soft MoE against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from upcycle.errors import UserError
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig
from upcycle.moe.layer import METRICS, MoELayer

B, L, D, F, E, C = 3, 8, 16, 32, 4, 2
MLP = {'mlp_dim': F, 'dtype': jnp.float32}
CONFIG = MoEConfig(E, router='soft', slots_per_expert=C, group_size=L)
LAYER = MoELayer(CONFIG, MlpBlock, MLP)
REAL = jnp.ones((B, L), bool)


def tokens(seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, L, D)), jnp.float32)


@functools.cache
def params():
    made = random_params(LAYER, tokens(), REAL, training=False)
    return made | {'router': made['router'] | {'scale': jnp.asarray(3.0)}}


def apply(x_BxLxD, real_BxL=REAL, which=None):
    y_BxLxD, written = jit(functools.partial(LAYER.apply, training=False, mutable=['intermediates', METRICS]))(
        {'params': which or params()}, x_BxLxD, real_BxL
    )
    return np.asarray(y_BxLxD), written


def definition(x_BxLxD, real_BxL):
    """Section 2.1, image by image and expert by expert."""
    phi_DxN = np.asarray(params()['router']['router_weights']['w']['kernel'])
    phi_DxN = 3.0 * phi_DxN / np.linalg.norm(phi_DxN, axis=0)
    out_BxLxD = np.zeros_like(x_BxLxD)
    for b in range(B):
        real = np.asarray(real_BxL)[b]
        x_LxD = np.asarray(x_BxLxD)[b][real]
        logits_LxN = x_LxD / np.linalg.norm(x_LxD, axis=1, keepdims=True) @ phi_DxN
        dispatch_LxN, combine_LxN = (np.exp(logits_LxN) / np.exp(logits_LxN).sum(axis=i, keepdims=True) for i in (0, 1))
        slots_NxD = dispatch_LxN.T @ x_LxD
        y_NxD = np.concatenate(
            [
                MlpBlock(**MLP).apply(
                    {'params': jax.tree.map(lambda leaf, e=e: leaf[e], params()['expert'])},
                    jnp.asarray(slots_NxD[e * C : (e + 1) * C], jnp.float32),
                    training=False,
                )
                for e in range(E)
            ]
        )
        out_BxLxD[b][real] = combine_LxN @ y_NxD
    return out_BxLxD


@pytest.mark.parametrize('padding', [False, True])
def test_is_the_definition(padding):
    real_BxL = REAL.at[1, 5:].set(False) if padding else REAL
    y_BxLxD, written = apply(tokens(), real_BxL)
    np.testing.assert_allclose(y_BxLxD, definition(tokens(), real_BxL), atol=1e-5)
    metrics = written[METRICS]
    np.testing.assert_allclose(metrics['load'].sum(), 1, rtol=1e-6)
    assert metrics['fraction_tokens_left_behind'] == metrics['fraction_dropped'] == metrics['auxiliary_loss'] == 0
    np.testing.assert_allclose(written['intermediates']['token_weight'][0], real_BxL, atol=1e-6)


def test_a_group_of_padding_is_silent():
    real_BxL = REAL.at[2].set(False)

    def loss(params, x_BxLxD):
        return jnp.square(LAYER.apply({'params': params}, x_BxLxD, real_BxL, training=False)).sum()

    assert not apply(tokens(), real_BxL)[0][2].any()
    grads = jit(jax.grad(loss, argnums=(0, 1)))(params(), tokens())
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert not np.asarray(grads[1][2]).any()


def test_every_parameter_has_a_gradient():
    grads = jit(jax.grad(lambda p: jnp.square(LAYER.apply({'params': p}, tokens(), REAL, training=False)).sum()))(
        params()
    )
    assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'causal': True}, "^ROUTER = 'soft' mixes every token with later ones"),
        ({'slots_per_expert': 0}, 'SLOTS_PER_EXPERT = 0 must be'),
        ({'shared_weights': 'xft', 'num_shared_experts': 1}, "the router 'soft' leaves none: use 'one'"),
    ],
)
def test_nonsense_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        MoEConfig(E, router='soft', **fields)
