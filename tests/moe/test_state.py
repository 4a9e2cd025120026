"""The routers' state: what it follows, and that no optimizer knows it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.moe import one_layer
from tests.moe.quick import jit, random_params
from upcycle.models.layers import MlpBlock
from upcycle.moe import state as moe_state
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.conventions import AdaptiveBalance, RoutePadding
from upcycle.moe.dispatch import masks
from upcycle.moe.layer import METRICS, MoELayer
from upcycle.training.optimizer import Adafactor

E = 4


# Config and capacity are static; one program for a router, not one for each of its operations.
@functools.partial(jit, static_argnums=(2, 3))
def route(logits_GxSxE, real_GxS, config, capacity, bias_E=None):
    return config.route(logits_GxSxE, real_GxS, capacity, bias_E=bias_E)


@functools.partial(jit, static_argnums=2)
def route_dropless(logits_GxSxE, real_GxS, config, bias_E=None):
    return config.route_dropless(logits_GxSxE, real_GxS, bias_E)


OPTIMIZER = Adafactor()
BIAS, WEIGHT = (f'{one_layer.MLP}/router_state/{name}' for name in ('bias', 'loss_weight'))
SEEN = 'experts/layers_0'


def model_of(**moe):
    return one_layer.OneLayer(MoEConfig(E, **{'router': 'top_k', **moe}))


def stepped(model, steps=1, microbatches=1, change=lambda flat: flat):
    """Parameters before and after some steps, flat, the last metrics, and the optimizer's state."""

    def changed(params):
        return unflatten_dict(change(flatten_dict(params, sep='/')), sep='/')

    before = one_layer.start(model, OPTIMIZER, changed)
    after, metrics = one_layer.train(model, OPTIMIZER, before, steps, microbatches)
    return *(flatten_dict(state.params, sep='/') for state in (before, after)), metrics, after.opt_state


def test_most_layers_have_none():
    params = one_layer.start(model_of(), OPTIMIZER).params
    assert moe_state.split(params) == (params, {})
    assert MoEConfig(E, balance_bias_rate=0.1).state_shapes(32) == {}  # Expert Choice


class TestBias:
    @pytest.mark.parametrize(('rate', 'moves'), [(0.0, False), (0.5, True)])
    def test_a_correction_bias_only_moves_with_a_rate(self, rate, moves):
        """It starts at its stored value, which chooses experts; sigmoid scores weigh them."""
        model = model_of(correction_bias=True, balance_bias_rate=rate, scores='sigmoid', dispatch='ragged')
        stored_E = jnp.asarray([0.0, 10.0, 0.0, -10.0])
        before, after, metrics, _ = stepped(model, change=lambda flat: flat | {BIAS: stored_E})
        np.testing.assert_array_equal(before[BIAS], stored_E)
        assert (after[BIAS] != stored_E).any() == moves
        np.testing.assert_allclose(np.asarray(metrics[f'{SEEN}/load'])[[1, 3]], [0.5, 0.0])

    def test_it_chooses_and_does_not_weigh(self):
        rng = np.random.default_rng(0)
        logits_GxSxE = jnp.asarray(rng.normal(size=(2, 16, E)), jnp.float32)
        real_GxS = jnp.ones((2, 16), bool)
        bias_E = jnp.asarray([0.0, 10.0, 0.0, 0.0])
        config = MoEConfig(E, router='top_k', num_selected_experts=2)
        probs_GxSxE = jax.nn.softmax(logits_GxSxE)
        for choices in (
            route_dropless(logits_GxSxE, real_GxS, config, bias_E)[0],
            route_dropless(logits_GxSxE, real_GxS, config)[0],
        ):
            taken = jnp.take_along_axis(probs_GxSxE, choices.expert_GxSxK, axis=-1)
            np.testing.assert_allclose(choices.weight_GxSxK, taken)
        biased = route_dropless(logits_GxSxE, real_GxS, config, bias_E)[0]
        assert (np.asarray(biased.expert_GxSxK) == 1).any(axis=-1).all()
        routing, _ = route(logits_GxSxE, real_GxS, config, 16, bias_E=bias_E)
        assert (np.asarray(routing.token_GxExC)[:, 1] < 16).all()

    @pytest.mark.parametrize('dispatch', ['gather', 'ragged'])
    @pytest.mark.parametrize('microbatches', [1, 2])
    def test_it_follows_the_load_where_nothing_is_dropped(self, dispatch, microbatches):
        moe = {'balance_bias_rate': 0.01, 'groups_multiple_of': 2, 'dispatch': dispatch, 'train_capacity_factor': 4.0}
        before, after, metrics, opt_state = stepped(model_of(**moe), microbatches=microbatches)
        expected = 0.01 * np.sign(np.round(1 / E - np.asarray(metrics[f'{SEEN}/load']), 6))
        assert expected.any()
        np.testing.assert_allclose(after[BIAS], expected, atol=1e-7)
        assert not any('router_state' in name for name in flatten_dict(opt_state, sep='/'))
        assert not np.asarray(before[BIAS]).any()

    def test_what_finds_no_slot_counts_too(self):
        """Full experts look alike by their slots; what was asked of them differs."""
        follows = {'balance_bias_rate': 0.01, 'min_capacity': 1, 'train_capacity_factor': 0.25}
        _, full, metrics, _ = stepped(model_of(**follows))
        _, dropless, _, _ = stepped(model_of(**follows, dispatch='ragged'))
        assert float(metrics[f'{SEEN}/fraction_dropped']) > 0.5 and float(metrics[f'{SEEN}/load_cv']) < 1e-6
        assert np.asarray(full[BIAS]).any()
        np.testing.assert_array_equal(full[BIAS], dropless[BIAS])

    def test_it_evens_the_load(self):
        model = model_of(balance_bias_rate=0.05, num_selected_experts=1, train_capacity_factor=4.0)

        def lopsided(flat):
            name = f'{one_layer.MLP}/router/router_weights/w/kernel'
            return {**flat, name: 30 * flat[name]}

        loads = [float(stepped(model, steps, change=lopsided)[2][f'{SEEN}/load_cv']) for steps in (1, 30)]
        assert loads[1] < 0.7 * loads[0]


class TestLossWeight:
    how = AdaptiveBalance(rate=0.5, largest=0.2, decay=0.9)

    def test_it_follows_what_is_dropped(self):
        model = model_of(adaptive_balance=self.how, train_capacity_factor=0.5, min_capacity=1)
        _, after, metrics, _ = stepped(model)
        dropped = float(metrics[f'{SEEN}/fraction_dropped'])
        assert dropped > 0.1
        np.testing.assert_allclose(after[WEIGHT], 0.1 * min(0.5 * dropped, 0.2), rtol=1e-5)
        assert MoEConfig(E, adaptive_balance=self.how).state_shapes(16) == {}  # Expert Choice drops nothing

    def test_it_weighs_the_loss(self):
        model = model_of(adaptive_balance=self.how)
        silent, weighed = (
            stepped(model, change=lambda flat, weight=weight: {**flat, WEIGHT: jnp.asarray(weight)})[2]
            for weight in (0.0, 0.25)
        )
        plain = stepped(model_of())[2]
        name = f'{SEEN}/auxiliary_loss'
        assert silent[name] == 0
        np.testing.assert_allclose(weighed[name], 0.25 * plain[name], rtol=1e-6)

    def test_a_checkpoints_json_is_enough(self):
        config = MoEConfig(E, router='top_k', adaptive_balance=self.how)
        assert MoEConfig(**dataclasses.asdict(config)) == config


def test_logits_are_normalised():
    rng = np.random.default_rng(0)
    logits_GxSxE = jnp.asarray(3 + 0.01 * rng.normal(size=(2, 16, E)), jnp.float32)
    real_GxS = jnp.ones((2, 16), bool)
    config = MoEConfig(E, router='top_k', logit_normalization=1.5)
    centred = np.asarray(logits_GxSxE) - np.asarray(logits_GxSxE).mean(axis=-1, keepdims=True)
    expected = 1.5 * centred / centred.std(axis=-1, keepdims=True)
    plain = dataclasses.replace(config, logit_normalization=None)
    for which in (config, changed(config, router='expert_choice')):
        same = changed(plain, router=which.router)
        made, wanted = route(logits_GxSxE, real_GxS, which, 8)[0], route(jnp.asarray(expected), real_GxS, same, 8)[0]
        np.testing.assert_array_equal(made.token_GxExC, wanted.token_GxExC)
        np.testing.assert_allclose(made.weight_GxExC, wanted.weight_GxExC, rtol=1e-4)
    grads = jit(jax.grad(lambda z: config.route(z, real_GxS, 8)[0].weight_GxExC.sum()))(0 * logits_GxSxE)
    assert np.isfinite(grads).all()


def test_mutual_information():
    """Minus what a token tells about its expert: 0 where all tokens are alike, -log E where each expert has its own."""
    config = MoEConfig(E, router='top_k', num_selected_experts=1, balance_loss='mutual_information')
    real_GxS = jnp.ones((2, 16), bool).at[:, 12:].set(False)

    def loss(logits_GxSxE, config=config):
        return route(logits_GxSxE, real_GxS, config, 16)[1]['auxiliary_loss']

    same = jnp.broadcast_to(jnp.asarray([2.0, 1.0, 0.0, 0.0]), (2, 16, E))
    own = 50.0 * jax.nn.one_hot(jnp.arange(16) % E, E) * jnp.ones((2, 1, 1))
    np.testing.assert_allclose(loss(same), 0, atol=1e-6)
    np.testing.assert_allclose(loss(own), -np.log(E), rtol=1e-5)
    # Padding says nothing.
    np.testing.assert_allclose(loss(own.at[:, 12:].set(0.0)), -np.log(E), rtol=1e-5)
    routed = dataclasses.replace(config, route_padding=RoutePadding.ROUTE)
    assert loss(own.at[:, 12:].set(0.0), routed) > -np.log(E) + 0.1
    dropless = route_dropless(own, real_GxS, config)[1]['auxiliary_loss']
    np.testing.assert_allclose(dropless, -np.log(E), rtol=1e-5)


class TestDefaultOutput:
    """Against the definition: y = sum over chosen of p_i E_i(x) + sum over the others of p_i m_i."""

    B, L, D, F = 2, 8, 16, 32
    config = MoEConfig(
        E, router='top_k', default_output_decay=0.9, train_capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=1
    )
    layer = MoELayer(config, MlpBlock, {'mlp_dim': F, 'dtype': jnp.float32})
    apply = staticmethod(jit(functools.partial(layer.apply, training=True, mutable=['intermediates', METRICS])))
    x_BxLxD = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, D)), jnp.float32)
    real_BxL = jnp.ones((B, L), bool).at[1, 6:].set(False)
    default_ExD = jnp.asarray(np.random.default_rng(1).normal(size=(E, D)), jnp.float32)

    @functools.cached_property
    def params(self):
        params = random_params(self.layer, self.x_BxLxD, self.real_BxL, training=False)
        return params | {'router_state': {'default_output': self.default_ExD}}

    def parts(self):
        """Every expert's output for every token, probabilities, who took whom, and what the layer gives and writes."""
        mlp = functools.partial(MlpBlock(self.F, dtype=jnp.float32).apply, training=False)
        y_ExBxLxD = jit(jax.vmap(mlp, (0, None)))({'params': self.params['expert']}, self.x_BxLxD)
        logits_BxLxE = np.asarray(self.x_BxLxD) @ np.asarray(self.params['router']['router_weights']['w']['kernel'])
        y_BxLxD, written = self.apply({'params': self.params}, self.x_BxLxD, self.real_BxL)
        mask_GxSxExC, _ = masks(written['intermediates']['routing'][0], self.B * self.L)
        took_BxLxE = np.asarray(mask_GxSxExC.any(axis=-1)).reshape(self.B, self.L, E)
        return np.asarray(y_ExBxLxD), np.asarray(jax.nn.softmax(logits_BxLxE)), took_BxLxE, y_BxLxD, written

    def test_who_is_not_asked_answers_with_the_default(self):
        y_ExBxLxD, probs_BxLxE, took_BxLxE, y_BxLxD, _ = self.parts()
        assert 0 < took_BxLxE.sum() < 2 * self.real_BxL.sum()  # something is dropped, too
        answers = np.where(took_BxLxE[..., None], y_ExBxLxD.transpose(1, 2, 0, 3), self.default_ExD)
        expected = (probs_BxLxE[..., None] * answers).sum(axis=2) * np.asarray(self.real_BxL)[..., None]
        np.testing.assert_allclose(y_BxLxD, expected, atol=1e-5)

    def test_the_router_has_a_gradient_for_every_expert(self):
        def loss(params):
            y_BxLxD, _ = self.layer.apply(
                {'params': params}, self.x_BxLxD, self.real_BxL, training=True, mutable=[METRICS]
            )
            return jnp.square(y_BxLxD).sum()

        grads = jit(jax.grad(loss))(self.params)
        assert (np.abs(grads['router']['router_weights']['w']['kernel']).max(axis=0) > 0).all()
        assert not np.asarray(grads['router_state']['default_output']).any()

    def test_the_default_is_a_running_mean_of_outputs(self):
        y_ExBxLxD, _, took_BxLxE, _, written = self.parts()
        metrics = {f'experts/a/{name}': value for name, value in written[METRICS].items()}
        old = self.default_ExD
        new = moe_state.follow(
            {}, {('a', 'mlp', 'router_state', 'default_output'): old}, metrics, {'a/mlp': self.config}
        )
        for e in range(E):
            taken = y_ExBxLxD[e][took_BxLxE[..., e]]
            expected = 0.9 * old[e] + 0.1 * taken.mean(axis=0) if len(taken) else old[e]
            np.testing.assert_allclose(new['a']['mlp']['router_state']['default_output'][e], expected, atol=1e-5)
        assert set(moe_state.for_the_log(metrics)) == {
            name for name in metrics if not name.endswith(('output_sum', 'output_count'))
        }

    def test_microbatches_add_up(self):
        moe = {'default_output_decay': 0.9, 'groups_multiple_of': 2}
        name = f'{one_layer.MLP}/router_state/default_output'
        whole, halves = (stepped(model_of(**moe), microbatches=n)[1][name] for n in (1, 2))
        np.testing.assert_allclose(whole, halves, atol=1e-6)
        assert np.asarray(whole).any()


class TestDenseTraining:
    config = MoEConfig(E, router='dense', num_selected_experts=2, eval_capacity_factor=4.0)
    logits_GxSxE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, E)), jnp.float32)
    real_GxS = jnp.ones((2, 16), bool).at[:, 13:].set(False)

    def route(self, config, training):
        config = config.when(training=training)
        return route(self.logits_GxSxE, self.real_GxS, config, config.capacity(16, training=training))

    def test_everybody_takes_everybody_in_training(self):
        routing, metrics = self.route(self.config, True)
        _, combine_GxSxExC = masks(routing, 16)
        expected = jax.nn.softmax(self.logits_GxSxE) * self.real_GxS[..., None]
        np.testing.assert_allclose(combine_GxSxExC.sum(axis=-1), expected, atol=1e-7)
        np.testing.assert_allclose(metrics['fraction_tokens_left_behind'], 0, atol=1e-6)
        mutual = changed(self.config, router='top_k', balance_loss='mutual_information')
        np.testing.assert_allclose(metrics['auxiliary_loss'], self.route(mutual, True)[1]['auxiliary_loss'], rtol=1e-6)

    def test_top_k_at_inference(self):
        top_2 = changed(self.config, router='top_k')
        for made, wanted in zip(self.route(self.config, False)[0], self.route(top_2, False)[0], strict=True):
            np.testing.assert_array_equal(made, wanted)

    def test_a_threshold_at_inference(self):
        config = dataclasses.replace(self.config, inference_threshold=0.3)
        _, combine_GxSxExC = masks(self.route(config, False)[0], 16)
        probs = np.asarray(jax.nn.softmax(self.logits_GxSxE)) * np.asarray(self.real_GxS)[..., None]
        np.testing.assert_allclose(combine_GxSxExC.sum(axis=-1), np.where(probs > 0.3, probs, 0), atol=1e-7)
        assert self.route(config, True)[0].weight_GxExC.sum() == pytest.approx(float(probs.sum()), rel=1e-6)

    def test_a_decoder_may_have_it(self):
        MoEConfig(E, router='dense', causal=True)


def test_the_load_loss_is_of_training():
    """Without noise there is no load, however many groups a batch has."""
    config = MoEConfig(E, router='top_k', balance_loss='importance_load', gate_noise=1.0, group_size=32)
    for groups in (1, 2):
        B, L = 2, 16
        config = dataclasses.replace(config, groups_multiple_of=groups)
        layer = MoELayer(config, MlpBlock, {'mlp_dim': 16, 'dtype': jnp.float32})
        quiet = MoELayer(dataclasses.replace(config, gate_noise=0.0), MlpBlock, {'mlp_dim': 16, 'dtype': jnp.float32})
        x_BxLxD = jax.random.normal(jax.random.key(0), (B, L, 8))
        real_BxL = jnp.ones((B, L), bool)
        params = layer.init(
            {'params': jax.random.key(1), 'jitter': jax.random.key(2)}, x_BxLxD, real_BxL, training=False
        )

        def loss(layer, training, params=params, x_BxLxD=x_BxLxD, real_BxL=real_BxL):
            rngs = {'jitter': jax.random.key(3)}
            apply = jax.jit(functools.partial(layer.apply, training=training, rngs=rngs, mutable=[METRICS]))
            _, seen = apply(params, x_BxLxD, real_BxL)
            return float(seen[METRICS]['auxiliary_loss'])

        assert loss(layer, False) == loss(quiet, False) < loss(layer, True)
