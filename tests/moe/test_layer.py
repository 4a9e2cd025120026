"""The MoE layer against the dense MLP that its experts are."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.moe.quick import jit, random_params
from upcycle.errors import UserError
from upcycle.models.layers import MlpBlock
from upcycle.moe.config import MoEConfig, changed
from upcycle.moe.dispatch import masks
from upcycle.moe.layer import METRICS, MoELayer
from upcycle.moe.routing import covered_tokens, token_sums

B, L, D, F, E = 4, 12, 16, 32, 4
MLP = {'mlp_dim': F, 'dtype': jnp.float32}
EXPERT_CHOICE = MoEConfig(num_experts=E, train_capacity_factor=0.75, eval_capacity_factor=0.75, min_capacity=1)
TOP_2 = changed(EXPERT_CHOICE, router='top_k')
REAL = jnp.ones((B, L), bool)


def tokens(seed=0, batch=B):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, L, D)), jnp.float32)


def layer(config, **expert_arguments):
    return MoELayer(config, MlpBlock, MLP | expert_arguments)


@functools.cache
def upcycled_params():
    """Router and experts, every expert the dense MLP; and the dense MLP."""
    dense = random_params(MlpBlock(**MLP), tokens(), training=False)
    sparse = random_params(layer(TOP_2), tokens(), REAL, training=False)
    return sparse | {'expert': jax.tree.map(lambda leaf: jnp.stack([leaf] * E), dense)}, dense


def apply(config, params, x_BxLxD, real_BxL, training=False, decoding=False):
    """Output, routing and metrics."""
    y_BxLxD, written = layer(config).apply(
        {'params': params},
        x_BxLxD,
        real_BxL,
        training=training,
        decoding=decoding,
        mutable=['intermediates', METRICS],
    )
    return y_BxLxD, written['intermediates']['routing'][0], written[METRICS]


@functools.cache
def applied(config, **options):
    return jit(functools.partial(apply, config, **options))


@functools.cache
def random_experts():
    return random_params(layer(TOP_2), tokens(), REAL, training=False, seed=1)


class TestEqualsTheDenseMlp:
    """With identical experts, as an upcycled model starts."""

    def setup_method(self):
        self.params, dense = upcycled_params()
        self.x_BxLxD = tokens()
        self.dense_BxLxD = jit(lambda x: MlpBlock(**MLP).apply({'params': dense}, x, training=False))(self.x_BxLxD)

    @pytest.mark.parametrize(
        ('num_selected', 'fill_order', 'dispatch'),
        [(2, 'token_major', 'gather'), (2, 'choice_major', 'einsum'), (3, 'priority', 'gather')],
    )
    def test_top_k_with_normalized_weights_and_room_for_all(self, num_selected, fill_order, dispatch):
        config = dataclasses.replace(
            TOP_2,
            num_selected_experts=num_selected,
            fill_order=fill_order,
            dispatch=dispatch,
            normalize_combine_weights=True,
            eval_capacity_factor=float(E),
        )
        y_BxLxD, _, metrics = applied(config)(self.params, self.x_BxLxD, REAL)
        assert metrics['fraction_dropped'] == 0
        np.testing.assert_allclose(y_BxLxD, self.dense_BxLxD, atol=1e-5)

    @pytest.mark.parametrize(('dispatch', 'group_size'), [('gather', L), ('einsum', B * L)])
    def test_expert_choice_with_normalized_weights(self, dispatch, group_size):
        """On covered tokens; nothing on uncovered ones."""
        config = dataclasses.replace(
            EXPERT_CHOICE, normalize_combine_weights=True, dispatch=dispatch, group_size=group_size
        )
        y_BxLxD, routing, metrics = applied(config)(self.params, self.x_BxLxD, REAL)
        covered_BxL = np.asarray(covered_tokens(routing, group_size)).reshape(B, L)
        assert 0 < covered_BxL.mean() < 1
        np.testing.assert_allclose(metrics['fraction_tokens_left_behind'], 1 - covered_BxL.mean(), atol=1e-6)
        np.testing.assert_allclose(y_BxLxD, np.where(covered_BxL[..., None], self.dense_BxLxD, 0), atol=1e-5)
        assert not np.asarray(y_BxLxD)[~covered_BxL].any()

    @pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
    def test_without_normalization_up_to_the_sum_of_weights(self, config):
        y_BxLxD, routing, _ = applied(config)(self.params, self.x_BxLxD, REAL)
        sums_BxLx1 = np.asarray(token_sums(routing, B * L)).reshape(B, L, 1)
        assert 0 < sums_BxLx1.max() < 1
        np.testing.assert_allclose(y_BxLxD, sums_BxLx1 * self.dense_BxLxD, atol=1e-5)


@pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
def test_no_gradient_is_nan_where_nobody_took_a_token(config):
    config = dataclasses.replace(config, normalize_combine_weights=True)
    real_BxL = REAL.at[1, 5:].set(False)

    def loss(params, x_BxLxD):
        y_BxLxD, routing, metrics = apply(config, params, x_BxLxD, real_BxL)
        return jnp.square(y_BxLxD).sum() + metrics['auxiliary_loss'], routing

    grads, routing = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(random_experts(), tokens())
    covered_BxL = np.asarray(covered_tokens(routing, B * L)).reshape(B, L)
    assert not covered_BxL[np.asarray(real_BxL)].all()
    assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
    assert not np.asarray(grads[1])[~covered_BxL & np.asarray(real_BxL)].any() or config.router == 'top_k'
    assert np.abs(grads[0]['router']['router_weights']['w']['kernel']).max() > 0


class TestCausality:
    """Changing token t of the flattened batch changes no output before t, however full the buffers are."""

    def first_change(self, config, t, seed):
        params = random_experts()
        x_BxLxD = tokens()
        changed = x_BxLxD.reshape(B * L, D).at[t].set(tokens(seed).reshape(B * L, D)[t]).reshape(B, L, D)
        before, _, metrics = applied(config)(params, x_BxLxD, REAL)
        after, _, _ = applied(config)(params, changed, REAL)
        assert metrics['fraction_dropped'] > 0.2
        differs = np.abs(before - after).max(axis=-1).reshape(B * L) > 1e-6
        return int(np.argmax(differs)) if differs.any() else B * L

    @pytest.mark.parametrize('t', [0, 7, 20, 30, 46])
    def test_token_major(self, t):
        assert min(self.first_change(TOP_2, t, seed) for seed in range(1, 6)) >= t

    @pytest.mark.parametrize('fill_order', ['choice_major', 'priority'])
    def test_the_other_orders_leak(self, fill_order):
        """So that the test above can fail."""
        config = dataclasses.replace(TOP_2, fill_order=fill_order)
        assert min(self.first_change(config, t, seed) - t for t in (20, 30, 40) for seed in range(1, 6)) < 0

    def test_expert_choice_leaks(self):
        params = random_experts()
        x_BxLxD = tokens()
        before, _, _ = applied(EXPERT_CHOICE)(params, x_BxLxD, REAL)
        after, _, _ = applied(EXPERT_CHOICE)(params, x_BxLxD.at[-1, -1].multiply(-3), REAL)
        assert np.abs(before - after)[:-1].max() > 1e-3


class TestPadding:
    """ROUTE_PADDING = skip."""

    real_BxL = REAL.at[0, 8:].set(False).at[2].set(False).at[3, :3].set(False)

    @pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
    @pytest.mark.parametrize('group_size', [B * L, L])
    def test_real_tokens_do_not_see_what_stands_at_padding(self, config, group_size):
        config = dataclasses.replace(config, group_size=group_size)
        params, x_BxLxD = random_experts(), tokens()
        real_BxLx1 = np.asarray(self.real_BxL)[..., None]
        y_BxLxD, _, metrics = applied(config)(params, x_BxLxD, self.real_BxL)
        assert not np.asarray(y_BxLxD)[~np.asarray(self.real_BxL)].any()
        for other in (jnp.zeros_like(x_BxLxD), 30 * tokens(2)):
            swapped = jnp.where(real_BxLx1, x_BxLxD, other)
            z_BxLxD, _, other_metrics = applied(config)(params, swapped, self.real_BxL)
            np.testing.assert_allclose(z_BxLxD, y_BxLxD, atol=1e-6)
            for name, value in metrics.items():
                np.testing.assert_allclose(other_metrics[name], value, atol=1e-6, err_msg=name)

    @pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
    def test_real_tokens_do_not_see_how_much_padding_follows(self, config):
        """Two real rows, and 0 or 6 rows of padding in the same group, at the same 9 slots per expert."""
        params = random_experts()
        rows = {}
        for padding in (0, 6):
            batch = 2 + padding
            factor = 9 * E / (batch * L)
            # One group whatever the batch, and 9 slots for each expert.
            exact = dataclasses.replace(config, eval_capacity_factor=factor)
            x_BxLxD = jnp.concatenate([tokens()[:2], tokens(3, batch=padding)])
            real_BxL = jnp.arange(batch)[:, None] < jnp.full((1, L), 2)
            rows[padding], routing, _ = applied(exact)(params, x_BxLxD, real_BxL)
            assert routing.token_GxExC.shape == (1, E, 9)
        np.testing.assert_allclose(rows[6][:2], rows[0], atol=1e-6)

    def test_route_gives_padding_slots(self):
        """So that the tests above can fail."""
        config = dataclasses.replace(EXPERT_CHOICE, route_padding='route')
        y_BxLxD, _, _ = applied(config)(random_experts(), tokens(), self.real_BxL)
        assert np.asarray(y_BxLxD)[~np.asarray(self.real_BxL)].any()


class TestMicrobatches:
    """Groups are those of the whole batch."""

    @pytest.mark.parametrize(
        ('config', 'group_size', 'parts'), [(EXPERT_CHOICE, 2 * L, 2), (TOP_2, L, 4), (TOP_2, L, 2)]
    )
    def test_give_the_same_rows(self, config, group_size, parts):
        config = dataclasses.replace(config, group_size=group_size)
        params, x_BxLxD = random_experts(), tokens()
        real_BxL = REAL.at[1, 7:].set(False)
        whole, _, metrics = applied(config)(params, x_BxLxD, real_BxL)
        part = applied(dataclasses.replace(config, num_microbatches=parts))
        outputs = [
            part(params, x, real) for x, real in zip(jnp.split(x_BxLxD, parts), jnp.split(real_BxL, parts), strict=True)
        ]
        np.testing.assert_allclose(np.concatenate([y for y, _, _ in outputs]), whole, atol=1e-6)
        # The balance loss is a mean over groups, so that the parts' mean is the whole batch's: no gradient changes.
        losses = [metrics['auxiliary_loss'] for _, _, metrics in outputs]
        np.testing.assert_allclose(np.mean(losses), metrics['auxiliary_loss'], rtol=1e-6)

    def test_that_would_cut_a_group_are_refused(self):
        config = dataclasses.replace(EXPERT_CHOICE, num_microbatches=2)
        with pytest.raises(UserError, match='NUM_MICROBATCHES = 2 .* 1 groups of 96 tokens: set GROUPS_MULTIPLE_OF'):
            jax.eval_shape(applied(config), random_experts(), tokens(), REAL)
        divisible = dataclasses.replace(config, groups_multiple_of=2)
        jax.eval_shape(applied(divisible), random_experts(), tokens(), REAL)


def test_decoding_is_dropless():
    """One position of every row, all of which want the same expert."""
    x_Bx1xD = jnp.repeat(tokens()[:1, :1], B, axis=0)
    real_Bx1 = jnp.ones((B, 1), bool)
    params = random_experts()
    tight = dataclasses.replace(TOP_2, eval_capacity_factor=0.1)
    y_Bx1xD, _, metrics = applied(tight, decoding=True)(params, x_Bx1xD, real_Bx1)
    assert metrics['fraction_dropped'] == 0
    np.testing.assert_allclose(y_Bx1xD, np.broadcast_to(y_Bx1xD[:1], y_Bx1xD.shape), atol=1e-6)
    _, _, metrics = applied(tight)(params, x_Bx1xD, real_Bx1)
    assert metrics['fraction_dropped'] == 0.75


def test_training_has_its_own_capacity():
    config = dataclasses.replace(EXPERT_CHOICE, train_capacity_factor=0.5, eval_capacity_factor=1.0)
    for training, capacity in ((True, 6), (False, 12)):
        _, routing, _ = jax.eval_shape(applied(config, training=training), random_experts(), tokens(), REAL)
        assert routing.token_GxExC.shape == (1, E, capacity)


def test_jitter_moves_the_router_in_training_only():
    config = dataclasses.replace(EXPERT_CHOICE, jitter_noise=0.5)
    params = random_experts()

    @functools.partial(jit, static_argnames='training')
    def apply(key, training):
        return layer(config).apply({'params': params}, tokens(), REAL, training=training, rngs={'jitter': key})

    keys = [jax.random.key(seed) for seed in range(2)]
    np.testing.assert_array_equal(*(apply(key, training=False) for key in keys))
    assert np.abs(np.subtract(*(apply(key, training=True) for key in keys))).max() > 1e-3


def test_dropout_is_drawn_for_every_expert_and_slot():
    """A mask shared by experts or by slots would drop a neuron for many tokens at once."""
    config = dataclasses.replace(TOP_2, num_selected_experts=1, eval_capacity_factor=4.0, train_capacity_factor=4.0)
    module = layer(config, dropout_rate=0.5, dropout_broadcast_axis=None)
    # The first E features say which expert a token goes to and are invisible to the experts, which are all equal.
    experts = upcycled_params()[0]['expert']
    blind = {name: {'kernel': experts[name]['kernel'].at[:, :E].set(0)} for name in ('wi_0', 'wi_1')}
    params = {
        'expert': experts | blind,
        'router': {'router_weights': {'w': {'kernel': jnp.eye(D, E)}}},
    }
    x_1xLxD = jnp.ones((1, 3 * E, D)).at[:, :, :E].set(jnp.tile(jnp.eye(E), (3, 1)))

    @functools.partial(jit, static_argnames='training')
    def outputs(training):
        rngs = {'dropout': jax.random.key(0)}
        return module.apply({'params': params}, x_1xLxD, jnp.ones((1, 3 * E), bool), training=training, rngs=rngs)[0]

    assert len(np.unique(outputs(training=False).round(4), axis=0)) == 1
    assert len(np.unique(outputs(training=True).round(4), axis=0)) == 3 * E


def with_shared(config):
    return MoELayer(config, MlpBlock, MLP, MLP | {'mlp_dim': 2 * F})


@functools.cache
def shared_params():
    return random_params(with_shared(dataclasses.replace(TOP_2, num_shared_experts=2)), tokens(), REAL, training=False)


class TestSharedExperts:
    """Next to the routed ones: the same layer without them, and a dense MLP of their joint width."""

    @staticmethod
    @functools.cache
    def applied(config):
        return jit(functools.partial(with_shared(config).apply, training=False, mutable=['intermediates', METRICS]))

    def apply(self, config, real_BxL=REAL):
        """Output, each token's weights by expert (B, L, E), and the sum of all its weights."""
        y_BxLxD, written = self.applied(config)({'params': shared_params()}, tokens(), real_BxL)
        routing, weight_BxL = written['intermediates']['routing'][0], written['intermediates']['token_weight'][0]
        if config.dispatch == 'ragged':
            chose_BxLxKxE = jax.nn.one_hot(routing.expert_GxSxK, E)
            weights_BxLxE = (chose_BxLxKxE * routing.weight_GxSxK[..., None]).sum(axis=2).reshape(B, L, E)
        else:
            _, combine_GxSxExC = masks(routing, B * L)
            weights_BxLxE = combine_GxSxExC.sum(axis=-1).reshape(B, L, E)
        return y_BxLxD, np.asarray(weights_BxLxE), np.asarray(weight_BxL)

    @staticmethod
    @functools.cache
    def shared():
        params = {'params': shared_params()['shared']}
        return jit(lambda x: MlpBlock(**MLP | {'mlp_dim': 2 * F}).apply(params, x, training=False))(tokens())

    @pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
    def test_are_added(self, config):
        with_BxLxD, _, weight_BxL = self.apply(dataclasses.replace(config, num_shared_experts=2))
        routed = {name: shared_params()[name] for name in ('router', 'expert')}
        without_BxLxD, routing, _ = applied(config)(routed, tokens(), REAL)
        np.testing.assert_allclose(with_BxLxD, without_BxLxD + self.shared(), atol=1e-5)
        np.testing.assert_allclose(weight_BxL, 1 + token_sums(routing, B * L).reshape(B, L), atol=1e-6)

    @pytest.mark.parametrize(
        ('router', 'dispatch', 'factor'),
        [
            ('expert_choice', 'gather', 0.75),
            ('top_k', 'einsum', 0.75),
            ('top_k', 'gather', 4.0),
            ('top_k', 'ragged', 1.0),
        ],
    )
    def test_xfts_weights(self, router, dispatch, factor):
        config = changed(
            EXPERT_CHOICE,
            router=router,
            dispatch=dispatch,
            eval_capacity_factor=factor,
            num_shared_experts=2,
        )
        plain_BxLxD, raw_BxLxE, _ = self.apply(config)
        y_BxLxD, weights_BxLxE, weight_BxL = self.apply(dataclasses.replace(config, shared_weights='xft'))
        np.testing.assert_allclose(weight_BxL, 1, atol=1e-6)
        for raw_E, weights_E in zip(raw_BxLxE.reshape(-1, E), weights_BxLxE.reshape(-1, E), strict=True):
            took = raw_E > 0
            expected_E = np.where(took, np.exp(raw_E), 0)
            expected_E *= raw_E.max() / max(expected_E.sum(), 1e-9)
            np.testing.assert_allclose(weights_E, expected_E, atol=1e-6)
        uncovered_BxL = ~(raw_BxLxE > 0).any(axis=-1)
        assert uncovered_BxL.any() == (factor < 1)
        np.testing.assert_allclose(y_BxLxD[uncovered_BxL], self.shared()[uncovered_BxL], atol=1e-5)
        assert not np.allclose(y_BxLxD, plain_BxLxD, atol=1e-3)

    @pytest.mark.parametrize('config', [EXPERT_CHOICE, TOP_2], ids=['expert_choice', 'top_k'])
    def test_gradients_are_finite_and_reach_the_router(self, config):
        config = dataclasses.replace(config, num_shared_experts=2, shared_weights='xft')
        real_BxL = REAL.at[1, 5:].set(False)

        def loss(params):
            y_BxLxD, _ = with_shared(config).apply(
                {'params': params}, tokens(), real_BxL, training=False, mutable=[METRICS]
            )
            return jnp.square(y_BxLxD).sum()

        grads = jit(jax.grad(loss))(shared_params())
        assert all(np.isfinite(grad).all() for grad in jax.tree.leaves(grads))
        assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(grads))

    def test_need_arguments(self):
        layer = MoELayer(dataclasses.replace(TOP_2, num_shared_experts=1), MlpBlock, MLP)
        with pytest.raises(ValueError, match='no shared_arguments'):
            jax.eval_shape(lambda: layer.init(jax.random.key(0), tokens(), REAL, training=False))

    def test_are_one_mlp(self):
        names = set(flatten_dict(shared_params(), sep='/'))
        assert {name for name in names if name.startswith('shared/')} == {
            'shared/wi_0/kernel',
            'shared/wi_1/kernel',
            'shared/wo/kernel',
        }
        assert shared_params()['shared']['wo']['kernel'].shape == (2 * F, D)


@functools.cache
def gradients(config):
    """(params, x_BxLxD, real_BxL) -> gradients of a sum of outputs, each times another number, and the outputs."""

    def loss(params, x_BxLxD, real_BxL):
        y_BxLxD, _ = layer(config).apply({'params': params}, x_BxLxD, real_BxL, training=False, mutable=[METRICS])
        return (y_BxLxD * tokens(seed=1)).sum(), y_BxLxD

    return jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize('padding', [0, 4])
@pytest.mark.parametrize('normalize', [False, True])
def test_dispatches_agree_about_experts_that_differ(padding, normalize):
    """Where nothing is dropped: each row reaches its own expert, and each gradient the expert that made it."""
    roomy = dataclasses.replace(TOP_2, eval_capacity_factor=float(E), normalize_combine_weights=normalize)
    real_BxL = REAL.at[1:, L - padding :].set(False)

    def step(dispatch):
        return gradients(dataclasses.replace(roomy, dispatch=dispatch))(random_experts(), tokens(), real_BxL)

    reference = step('einsum')
    assert np.abs(reference[1]).max() > 0.1
    for dispatch in ('gather', 'ragged'):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), step(dispatch), reference)


@pytest.mark.parametrize('router', ['expert_choice', 'top_k'])
def test_only_einsum_makes_arrays_of_tokens_by_slots(router):
    """No term of tokens x experts x capacity in the default dispatch, forward or backward."""

    def largest(dispatch, tokens):
        config = MoEConfig(
            num_experts=16, router=router, train_capacity_factor=4.0, group_size=tokens, dispatch=dispatch
        )
        module = layer(config)
        x_BxLxD = jnp.zeros((16, tokens // 16, 8))
        real_BxL = jnp.ones(x_BxLxD.shape[:2], bool)
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), x_BxLxD, real_BxL, training=True))['params']

        def loss(params, x_BxLxD):
            y_BxLxD, _ = module.apply({'params': params}, x_BxLxD, real_BxL, training=True, mutable=[METRICS])
            return y_BxLxD.sum()

        program = jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x_BxLxD)
        return max(math.prod(shape) for shape in shapes_of(program.jaxpr))

    assert largest('einsum', 4096) == 4 * largest('einsum', 2048)
    assert largest('gather', 4096) <= 2.1 * largest('gather', 2048)
    assert largest('gather', 4096) < largest('einsum', 4096) / 20


def shapes_of(jaxpr):
    """Of all values of a program, those of programs inside it included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from shapes_of(inner)


def test_parameters_are_named_as_flaxformers_and_experts_lead():
    shapes = {name: leaf.shape for name, leaf in flatten_dict(random_experts(), sep='/').items()}
    assert shapes == {
        'router/router_weights/w/kernel': (D, E),
        'expert/wi_0/kernel': (E, D, F),
        'expert/wi_1/kernel': (E, D, F),
        'expert/wo/kernel': (E, F, D),
    }


def test_experts_start_different_from_one_another():
    params = jit(functools.partial(layer(TOP_2).init, training=False))(jax.random.key(0), tokens(), REAL)
    (kernel,) = jax.tree.leaves(params['params']['expert']['wo'])
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_runs_in_bfloat16_with_a_float32_router():
    module = MoELayer(EXPERT_CHOICE, MlpBlock, MLP | {'dtype': jnp.bfloat16})
    y_BxLxD, written = jax.eval_shape(
        functools.partial(module.apply, training=False, mutable=['intermediates']),
        {'params': random_experts()},
        tokens().astype(jnp.bfloat16),
        REAL,
    )
    assert y_BxLxD.dtype == jnp.bfloat16
    assert written['intermediates']['routing'][0].weight_GxExC.dtype == jnp.float32


def test_merged_layers_have_no_groups():
    layer = MoELayer(MoEConfig(E, router='merged', groups_multiple_of=7), MlpBlock, MLP)
    params = layer.init(jax.random.key(0), tokens(), REAL, training=False)
    assert layer.apply(params, tokens(), REAL, training=False).shape == tokens().shape
