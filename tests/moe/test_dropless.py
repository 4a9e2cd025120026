"""Dropless layers with a gated MLP: the dense function, shared experts, biases, decoding and the groups of the balance loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit, random_params
from upcycle.errors import UserError
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.groups import microbatch_groups
from upcycle.moe.layer import METRICS, replace_mlp

B, L, D, F = 3, 7, 16, 24
ARGUMENTS = {'mlp_dim': F, 'activations': ('silu', 'linear'), 'dropout_rate': 0.0, 'dtype': jnp.float32}
TOP_2 = MoEConfig(num_experts=8, router='top_k', dispatch='ragged', normalize_combine_weights=True)
GATED = dataclasses.replace(TOP_2, num_shared_experts=1, shared_gate=True)
# One token of padding in the second row, as many as there are in the first in the third.
REAL = jnp.arange(L) < jnp.asarray([L, L - 1, 2])[:, None]


def tokens():
    return jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)


def layer(config, **more):
    return replace_mlp(config, MlpBlock, ARGUMENTS | more, {})


@functools.cache
def params_of(config, **more):
    return random_params(layer(config, **more), tokens(), REAL, training=False)


@functools.cache
def dense(use_bias=False):
    """Parameters of the dense MLP, and its output."""
    module = MlpBlock(**ARGUMENTS, use_bias=use_bias)
    params = random_params(module, tokens(), training=False, seed=1)
    return params, module.apply({'params': params}, tokens(), False)


def upcycled(config, use_bias=False):
    """Every expert, the shared one too, is the dense MLP; the router is random, and the gate 0."""
    params = dict(params_of(config, use_bias=use_bias))
    params['expert'] = jax.tree.map(lambda leaf: jnp.stack([leaf] * config.num_experts), dense(use_bias)[0])
    if config.num_shared_experts:
        params |= {'shared': dense(use_bias)[0], 'shared_gate': jax.tree.map(jnp.zeros_like, params['shared_gate'])}
    return params


@functools.cache
def applied(config, decoding=False, **more):
    module = layer(config, **more)
    return jit(functools.partial(module.apply, training=False, decoding=decoding, mutable=[METRICS, 'intermediates']))


def output(config, params, x_BxLxD=None, real_BxL=REAL, **more):
    return applied(config, **more)({'params': params}, tokens() if x_BxLxD is None else x_BxLxD, real_BxL)[0]


@pytest.mark.parametrize(
    ('config', 'use_bias'),
    [
        (TOP_2, False),
        (TOP_2, True),
        (changed(TOP_2, num_experts=3), False),
        (changed(TOP_2, scores='sigmoid', correction_bias=True, score_groups=4, selected_groups=2), False),
        (changed(TOP_2, num_experts=4, num_selected_experts=4, normalize_combine_weights=False), False),
        (changed(GATED, weight_scale=0.5), False),  # recipes/gated_shared_expert.gin
    ],
)
def test_copies_of_an_mlp_are_the_mlp(config, use_bias):
    y_BxLxD = np.asarray(output(config, upcycled(config, use_bias), use_bias=use_bias))
    np.testing.assert_allclose(y_BxLxD[REAL], dense(use_bias)[1][REAL], atol=1e-5)
    if not config.num_shared_experts:
        assert not y_BxLxD[~np.asarray(REAL)].any()


def test_the_gate_weighs_the_shared_expert():
    """As in transformers' Qwen2-MoE: output + sigmoid(x . g) * shared(x)."""
    params = params_of(GATED)
    assert params['shared_gate']['kernel'].shape == (D, 1)
    routed = output(TOP_2, {name: params[name] for name in ('router', 'expert')})
    shared = MlpBlock(**ARGUMENTS).apply({'params': params['shared']}, tokens(), False)
    gate_BxLx1 = 1 / (1 + np.exp(-np.asarray(tokens() @ params['shared_gate']['kernel'], np.float64)))
    np.testing.assert_allclose(output(GATED, params), routed + gate_BxLx1 * shared, atol=1e-5)


def test_words_say_nothing_about_slots():
    assert TOP_2.in_words() == '8 experts, Top-2, dropless, normalised weights'


def test_widths_may_be_absolute():
    config = changed(GATED, expert_mlp_dim=10, shared_mlp_dim=36)
    shapes = jax.tree.map(jnp.shape, params_of(config))
    assert shapes['expert']['wo']['kernel'] == (8, 10, D) and shapes['shared']['wo']['kernel'] == (36, D)


@pytest.mark.parametrize('config', [TOP_2, GATED], ids=['routed', 'shared'])
def test_dispatches_agree_about_biases_and_gradients(config):
    """Experts that differ, with biases, and padding: outputs and gradients."""
    params = params_of(config, use_bias=True)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(B, L, D)), jnp.float32)

    def step(dispatch):
        roomy = changed(config, dispatch=dispatch, eval_capacity_factor=8.0)

        def loss(params, x_BxLxD):
            y_BxLxD = layer(roomy, use_bias=True).apply({'params': params}, x_BxLxD, REAL, training=False)
            return (y_BxLxD * weights).sum(), y_BxLxD

        return jit(jax.grad(loss, (0, 1), has_aux=True))(params, tokens())

    reference = step('einsum')
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(reference))
    for dispatch in ('gather', 'ragged'):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), step(dispatch), reference)


def test_decoding_is_the_whole_sequence():
    """Position by position, and a prompt followed by one position."""
    params, whole = params_of(GATED), output(GATED, params_of(GATED))
    by_position = [output(GATED, params, tokens()[:, i : i + 1], REAL[:, i : i + 1], decoding=True) for i in range(L)]
    np.testing.assert_allclose(jnp.concatenate(by_position, axis=1), whole, atol=1e-6)
    prompt = output(GATED, params, tokens()[:, :4], REAL[:, :4], decoding=True)
    np.testing.assert_allclose(prompt, whole[:, :4], atol=1e-6)


def test_real_tokens_do_not_see_padding():
    """Bit for bit, whatever it holds."""
    config = dataclasses.replace(TOP_2, num_experts=4)
    x_BxLxD = jnp.where(REAL[..., None], tokens(), 1e6)
    y_BxLxD, other_BxLxD = (output(config, params_of(config), x) for x in (tokens(), x_BxLxD))
    np.testing.assert_array_equal(np.asarray(y_BxLxD)[REAL], np.asarray(other_BxLxD)[REAL])


@pytest.mark.parametrize(
    ('rows', 'length', 'group_size', 'expected'),
    [(8, 31, 64, 4), (7, 1009, 64, 7), (7, 8, 64, 1), (12, 10, 50, 3), (1, 1, 1, 1)],
)
def test_groups_are_whole_examples(rows, length, group_size, expected):
    assert microbatch_groups(dataclasses.replace(TOP_2, group_size=group_size), rows, length) == expected


def test_microbatches_may_not_split_a_group():
    config = dataclasses.replace(TOP_2, num_microbatches=2, group_size=100)
    assert microbatch_groups(config, 10, 30) == 5  # ten groups of two
    with pytest.raises(UserError, match='NUM_MICROBATCHES = 2 .* 1 groups of 42 tokens'):
        microbatch_groups(config, 3, 7)
    with pytest.raises(UserError, match='GROUPS_MULTIPLE_OF = 4 does not divide the 6 examples of a batch'):
        microbatch_groups(dataclasses.replace(config, groups_multiple_of=4), 3, 7)
