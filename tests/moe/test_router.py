"""Routers and dispatch against the slow obvious definitions, in plain Python."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.moe.quick import jit
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.conventions import CapacityRule, Dispatch, FillOrder, RoutePadding
from upcycle.moe.dispatch import combine, dispatch, masks
from upcycle.moe.routing import covered_tokens, token_sums

E = 4
ROUTERS = [('expert_choice', 'token_major'), *(('top_k', order.value) for order in FillOrder)]
# Odd on purpose. One size for most tests, because every new shape is compiled anew.
G, S = 2, 13


def case(G=G, S=S, seed=0):
    """Router logits and which tokens are real: at least a few in every group."""
    rng = np.random.default_rng(seed)
    real = rng.random((G, S)) < 0.7
    real[:, :4] = True
    return jnp.asarray(2 * rng.normal(size=(G, S, E)), jnp.float32), jnp.asarray(real)


def configurations():
    """Every pair of settings, with the capacity rule alternating."""
    for i, (router, order) in enumerate(ROUTERS):
        for j, padding in enumerate(RoutePadding):
            for normalize in (False, True):
                yield MoEConfig(
                    num_experts=E,
                    router=router,
                    train_capacity_factor=1.0,
                    fill_order=order,
                    route_padding=padding,
                    normalize_combine_weights=normalize,
                    capacity_rule=list(CapacityRule)[(i + j + normalize) % 2],
                    min_capacity=3,
                )


def name(config):
    router = config.fill_order if config.router == 'top_k' else config.router
    weights = 'normalized' if config.normalize_combine_weights else 'raw'
    return f'{router}-{config.route_padding}-{weights}-{config.capacity_rule}'


every_configuration = pytest.mark.parametrize('config', list(configurations()), ids=name)


def slow_group(probs_SxE, real_S, config, C):
    """One group, choice by choice: a dict from (expert, slot) to (token, weight)."""
    S, _ = probs_SxE.shape
    skip = config.route_padding == 'skip'
    if config.route_padding == 'down_weight':
        probs_SxE = probs_SxE * real_S[:, None]
    taken = {}
    if config.router == 'expert_choice':
        for e in range(E):
            tokens = [t for t in range(S) if real_S[t] or not skip]
            for slot, t in enumerate(sorted(tokens, key=lambda t: -probs_SxE[t, e])[:C]):
                taken[e, slot] = t
    else:
        tokens = [t for t in range(S) if real_S[t] or config.route_padding == 'route']
        choices = {t: np.argsort(-probs_SxE[t], kind='stable')[: config.num_selected_experts] for t in tokens}
        if config.fill_order == 'priority':
            tokens.sort(key=lambda t: -probs_SxE[t].max())
        queue = [(t, k) for t in tokens for k in range(config.num_selected_experts)]
        if config.fill_order != 'token_major':
            queue.sort(key=lambda tk: tk[1])
        for t, k in queue:
            e = choices[t][k]
            slot = sum(expert == e for expert, _ in taken)
            if slot < C:
                taken[e, slot] = t
    sums = np.zeros(S)
    for (e, _), t in taken.items():
        sums[t] += probs_SxE[t, e]
    safe = np.where(sums > 0, sums, 1.0) if config.normalize_combine_weights else np.ones(S)
    return {(e, slot): (t, probs_SxE[t, e] / safe[t]) for (e, slot), t in taken.items()}


@functools.cache
def run(config):
    """A layer whose experts are not linear, on `case()`: for each dispatch ((loss, (output, routing, metrics)), gradients)."""
    logits_GxSxE, real_GxS = case()
    rng = np.random.default_rng(2)
    x_GxSxD, target_GxSxD = jnp.asarray(rng.normal(size=(2, G, S, 6)), jnp.float32)

    def layer(x_GxSxD, logits_GxSxE, how):
        routing, metrics = config.route(logits_GxSxE, real_GxS, config.capacity(S, training=True))
        y_ExGxCxD = jnp.tanh(
            dispatch(x_GxSxD, routing, how, config.experts_of_a_token) * jnp.arange(1.0, E + 1)[:, None, None, None]
        )
        y_GxSxD = combine(y_ExGxCxD, routing, S, how, config.experts_of_a_token)
        loss = (y_GxSxD * target_GxSxD).sum() + 0.01 * metrics['auxiliary_loss']
        return loss, (y_GxSxD, routing, metrics)

    def both(*arguments):
        grad = jax.value_and_grad(layer, argnums=(0, 1), has_aux=True)
        return {how.value: grad(*arguments, how) for how in (Dispatch.GATHER, Dispatch.EINSUM)}

    return jit(both)(x_GxSxD, logits_GxSxE)


@every_configuration
def test_routing_is_the_slow_definition(config):
    logits_GxSxE, real_GxS = case()
    (_, (_, routing, metrics)), _ = jax.tree.map(np.asarray, run(config)['gather'])
    C = config.capacity(S, training=True)
    probs_GxSxE = np.asarray(jax.nn.softmax(logits_GxSxE))
    assert routing.token_GxExC.shape == (G, E, C)
    seen = {g: slow_group(probs_GxSxE[g], np.asarray(real_GxS)[g], config, C) for g in range(G)}
    for g, e, slot in np.ndindex(G, E, C):
        token, weight = seen[g].get((e, slot), (S, 0.0))
        # Down-weighted padding has probability 0 everywhere: a tie, and no weight, whichever of it is taken.
        tie = config.router == 'expert_choice' and config.route_padding == 'down_weight' and weight == 0
        assert routing.token_GxExC[g, e, slot] == token or tie
        np.testing.assert_allclose(routing.weight_GxExC[g, e, slot], weight, atol=1e-6)
    assert_metrics(metrics, seen, probs_GxSxE, np.asarray(real_GxS), config, C)


def assert_metrics(metrics, seen, probs_GxSxE, real_GxS, config, C):
    """The metrics, from the slow routing. Switch's loss and the entropy are checked where padding needs no convention."""
    G, S, _ = probs_GxSxE.shape
    slots = [(g, e, t, w) for g, taken in seen.items() for (e, _), (t, w) in taken.items()]
    counted_GxS = real_GxS if config.route_padding != 'route' else np.ones_like(real_GxS)
    covered = len({(g, t) for g, _, t, _ in slots})
    load = np.bincount([e for _, e, _, _ in slots], minlength=E) / len(slots)
    expected = {
        'expert_usage': len(slots) / (G * E * C),
        'router_confidence': sum(w for _, _, _, w in slots) / len(slots),
        'load': load,
        'load_cv': load.std() / load.mean(),
    }
    if (config.router, config.route_padding) != ('expert_choice', 'down_weight'):
        expected['fraction_tokens_left_behind'] = 1 - covered / counted_GxS.sum()
    if config.router == 'top_k':
        expected['fraction_dropped'] = 1 - len(slots) / (counted_GxS.sum() * config.num_selected_experts)
    if config.route_padding != 'down_weight':
        log_z_GxS = np.log(np.exp(np.log(probs_GxSxE)).sum(-1))
        np.testing.assert_allclose(log_z_GxS, 0, atol=1e-6)
        expected['router_entropy'] = -(probs_GxSxE * np.log(probs_GxSxE)).sum(-1)[counted_GxS].mean()
        if config.router == 'top_k':
            by_group = []
            for g in range(G):
                probs = probs_GxSxE[g][counted_GxS[g]]
                chosen = np.argsort(-probs, axis=-1)[:, : config.num_selected_experts]
                share = np.bincount(chosen.ravel(), minlength=E) / len(probs)
                by_group.append((share * probs.mean(0)).mean())
            expected['auxiliary_loss'] = np.mean(by_group) * E**2
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], value, atol=1e-5, err_msg=key)


@every_configuration
def test_einsum_equals_gather(config):
    """Values, and gradients with respect to tokens and logits."""
    for gathered, summed in zip(*map(jax.tree.leaves, run(config).values()), strict=True):
        assert np.isfinite(gathered).all()
        np.testing.assert_allclose(gathered, summed, rtol=0, atol=1e-5 * np.abs(summed).max())


def test_masks_are_one_hot():
    config = MoEConfig(num_experts=E, router='top_k', train_capacity_factor=1.0)
    routing, _ = jit(functools.partial(config.route, capacity=3))(*case())
    mask_GxSxExC, combine_GxSxExC = (np.asarray(mask) for mask in masks(routing, S))
    assert mask_GxSxExC.sum(axis=1).max() == 1
    np.testing.assert_allclose(combine_GxSxExC.sum(axis=(2, 3)), token_sums(routing, S), atol=1e-6)
    np.testing.assert_array_equal(mask_GxSxExC.any(axis=(2, 3)), covered_tokens(routing, S))


class TestCausality:
    """Two tokens, two experts with one slot each."""

    # Token 0 wants expert 0, then 1. Token 1 wants 1 first in one world and 0 first in the other.
    worlds = (((2.0, 1.0), (1.0, 2.0)), ((2.0, 1.0), (2.0, 1.0)))

    def weight_of_token_0(self, fill_order):
        config = MoEConfig(num_experts=2, router='top_k', fill_order=fill_order)
        routed = jit(functools.partial(config.route, capacity=1))
        for logits in self.worlds:
            routing, _ = routed(jnp.array([logits]), jnp.ones((1, 2), bool))
            yield float(token_sums(routing, 2)[0, 0])

    def test_token_major_ignores_later_tokens(self):
        np.testing.assert_allclose(list(self.weight_of_token_0('token_major')), [1.0, 1.0], rtol=1e-6)

    def test_choice_major_leaks_through_overflow(self):
        """A first choice of token 1 takes the slot of token 0's second choice: why it is not the decoder's default."""
        first = 1 / (1 + np.exp(-1))
        np.testing.assert_allclose(list(self.weight_of_token_0('choice_major')), [first, 1.0], rtol=1e-6)


class TestPadding:
    """ROUTE_PADDING = skip: as if padding were not there."""

    @pytest.mark.parametrize(('router', 'fill_order'), ROUTERS)
    def test_routing_and_metrics_are_those_of_the_real_tokens(self, router, fill_order):
        config = MoEConfig(num_experts=E, router=router, fill_order=fill_order, normalize_combine_weights=True)
        routed = jit(functools.partial(config.route, capacity=3))
        rng = np.random.default_rng(3)
        n = 7
        logits_1xNxE = jnp.asarray(rng.normal(size=(1, n, E)), jnp.float32)
        expected, expected_metrics = routed(logits_1xNxE, jnp.ones((1, n), bool))
        for positions in (range(n), range(S - n, S), [0, 2, 3, 5, 8, 9, 12]):
            where = np.array(positions)
            # Padding that every expert would love to take.
            padded = jnp.asarray(50 * rng.normal(size=(1, S, E)), jnp.float32)
            real = jnp.zeros((1, S), bool).at[0, where].set(True)
            routing, metrics = routed(padded.at[0, where].set(logits_1xNxE[0]), real)
            original = np.append(where, S)[np.asarray(expected.token_GxExC)]
            np.testing.assert_array_equal(routing.token_GxExC, original)
            np.testing.assert_allclose(routing.weight_GxExC, expected.weight_GxExC, atol=1e-6)
            for key, value in metrics.items():
                np.testing.assert_allclose(value, expected_metrics[key], atol=1e-5, err_msg=key)

    @pytest.mark.parametrize(('router', 'fill_order'), ROUTERS[:2])
    def test_more_slots_than_real_tokens(self, router, fill_order):
        config = MoEConfig(num_experts=E, router=router, fill_order=fill_order)
        logits_GxSxE, _ = case()
        real_GxS = jnp.zeros((G, S), bool).at[0, 5].set(True)  # group 1 is padding only
        routing, metrics = jit(functools.partial(config.route, capacity=8))(logits_GxSxE, real_GxS)
        assert set(np.unique(routing.token_GxExC)) == {5, S}
        assert not np.asarray(routing.weight_GxExC)[1].any()
        assert all(np.isfinite(value).all() for value in metrics.values())
        assert metrics['fraction_tokens_left_behind'] == 0


@pytest.mark.parametrize(('router', 'fill_order'), ROUTERS)
def test_no_gradient_is_nan(router, fill_order):
    """Tokens that no expert took, groups of padding, probabilities that underflow to 0."""
    config = MoEConfig(
        num_experts=E,
        router=router,
        fill_order=fill_order,
        normalize_combine_weights=True,
    )
    logits_GxSxE, real_GxS = case(3)
    logits_GxSxE = logits_GxSxE.at[0].multiply(50.0)
    real_GxS = real_GxS.at[2].set(False)

    def total(logits_GxSxE):
        routing, metrics = config.route(logits_GxSxE, real_GxS, 1)
        scalars = metrics['auxiliary_loss'] + metrics['router_z_loss']
        return (routing.weight_GxExC * jnp.arange(1.0, E + 1)[:, None]).sum() + scalars, routing

    grad, routing = jit(jax.grad(total, has_aux=True))(logits_GxSxE)
    assert not np.asarray(covered_tokens(routing, S))[:2].all()
    assert np.isfinite(grad).all() and np.isfinite(routing.weight_GxExC).all()
    assert np.abs(grad[1]).max() > 0


def test_normalizing_a_vanishing_weight():
    """Expert 0 prefers token 0, so that token 1 is left to expert 1, where its probability is exp(-gap)."""
    config = MoEConfig(num_experts=2, normalize_combine_weights=True)

    @jit
    @jax.value_and_grad
    def last_weight(logits):
        routing, _ = config.route(logits, jnp.ones((1, 2), bool), 1)
        return routing.weight_GxExC[0, 1, 0]

    for gap, weight in ((0.0, 1.0), (30.0, 1.0), (60.0, 0.0), (200.0, 0.0)):
        value, grad = last_weight(jnp.array([[[gap + 1000, 0.0], [gap, 0.0]]]))
        np.testing.assert_allclose(value, weight, atol=1e-6)
        np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_metrics_have_no_gradient():
    """Only the two losses do: a metric must not move the router."""
    logits_GxSxE, real_GxS = case()
    config = changed(MoEConfig(num_experts=E), router='top_k')

    def total(logits):
        _, metrics = config.route(logits, real_GxS, 3)
        return sum(jnp.sum(value) for key, value in metrics.items() if key not in ('auxiliary_loss', 'router_z_loss'))

    assert not np.asarray(jit(jax.grad(total))(logits_GxSxE)).any()


def test_router_maths_is_float32():
    config = MoEConfig(num_experts=E)
    logits_GxSxE, real_GxS = case()
    routing, metrics = jax.eval_shape(
        functools.partial(config.route, capacity=3), logits_GxSxE.astype(jnp.bfloat16), real_GxS
    )
    assert {routing.weight_GxExC.dtype, *(value.dtype for value in metrics.values())} == {jnp.dtype('float32')}
