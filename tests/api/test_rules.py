"""Wrong rules, functions and states of foreign models are refused with a sentence; no result is silently wrong."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import upcycle
from upcycle.errors import UserError


def f32(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


PARAMS = {'mlp': {'up': f32(8, 16), 'down': f32(16, 8)}, 'head': f32(8, 3)}
BATCH = f32(2, 8)


def rule(**changes):
    given = {'path': 'mlp', 'num_experts': 4, 'leaves': {'up': 'EDF', 'down': 'EFD'}, 'experts': '', 'router': 'router'}
    return upcycle.MoERule(**given | changes)


def upcycled(params=PARAMS, rules=None, surgery=None, **options):
    rules = upcycle.PathRules(moe=[rule()], keep=['*']) if rules is None else rules
    return upcycle.upcycle(params, rules, surgery, key=0, **options)


def with_rules(**changes):
    return upcycle.PathRules(**{'moe': [rule()], 'keep': ['*']} | changes)


@pytest.mark.parametrize(
    'changes',
    [
        {'experts': 'experts', 'router': 'experts'},
        {'experts': 'experts', 'zeros': {'experts': 'E'}},
        {'router': 'up/x'},
        {'router': 'up'},
        {'zeros': {'router/bias': 'E'}},
    ],
)
def test_a_leaf_cannot_be_within_a_leaf(changes):
    with pytest.raises(UserError, match='twice|both'):
        upcycled(rules=with_rules(moe=rule(**changes)))


@pytest.mark.parametrize('axes', ['LEDF', 'ELDF', 'EDGF'])
def test_stacked_layers_are_refused(axes):
    with pytest.raises(UserError, match=f"axes '{axes}' of up must be among E, D and F.*unstack"):
        rule(leaves={'up': axes, 'down': 'EFD'})


def test_states_and_parameters_cannot_be_mixed():
    with pytest.raises(UserError, match='all or none'):
        upcycled([upcycle.State(PARAMS, ADAM.init(PARAMS), ADAM.init), PARAMS], surgery=upcycle.Surgery('branches'))


def test_a_router_needs_a_width():
    with pytest.raises(UserError, match='no leaf of mlp has an axis D: set `router_width`'):
        upcycled({'mlp': {'up': f32(8)}}, with_rules(moe=rule(leaves={'up': 'EF'})))


def test_a_shared_leaf_may_have_any_axes():
    params = {**PARAMS, 'mlp': {**PARAMS['mlp'], 'table': f32(3, 5)}}
    made, _ = upcycled(params, with_rules(moe=rule(leaves={'up': 'EDF', 'down': 'EFD', 'table': 'AB'})))
    np.testing.assert_array_equal(made['mlp']['table'], params['mlp']['table'])


@pytest.mark.parametrize(
    ('states', 'message'),
    [
        (np.full((5, 8), np.nan), 'hidden_states for mlp returns NaN or infinity'),
        (f32(5, 9), r'hidden_states for mlp returns .*\(5, 9\): .*\(tokens, 8\)'),
        (f32(8), r'\(tokens, 8\)'),
        (f32(0, 8), r'\(tokens, 8\)'),
        (None, 'hidden_states for mlp returns None'),
        ('x', "hidden_states for mlp returns 'x'"),
    ],
)
def test_hidden_states_are_checked(states, message):
    rules = with_rules(
        hidden_states=lambda *_: states, dense_apply=lambda params, x: x, sparse_apply=lambda params, x: x
    )
    with pytest.raises(UserError, match=message):
        upcycled(rules=rules, surgery=upcycle.Surgery(router_init='hidden'), batch=BATCH)


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        ({'x': None}, 'x of params is None'),
        ({'x': {'y': {}}}, 'x/y of params is an empty'),
        ({'x': []}, 'x of params is an empty'),
        ({'x': optax.EmptyState()}, 'x of params is an empty'),
    ],
)
def test_nothing_disappears(more, message):
    with pytest.raises(UserError, match=message):
        upcycled(PARAMS | more)


ADAM, SGD = optax.adam(1e-3), optax.sgd(1e-3)


@pytest.mark.parametrize('policy', ['fresh', 'fresh_clock', 'tile'])
@pytest.mark.parametrize(
    ('state', 'message'),
    [
        (lambda: SGD.init(PARAMS), 'opt_state is not the state that init makes.*0/count'),
        (lambda: ADAM.init({**PARAMS, 'head': f32(8, 4)}), 'opt_state is not the state that init makes.*head'),
        (lambda: (ADAM.init(PARAMS), SGD.init(PARAMS)), 'opt_state is not the state that init makes'),
        (lambda: 3, 'opt_state is not the state that init makes'),
        (lambda: {'mu': 'text'}, "opt_state/mu = 'text' is not an array"),
    ],
)
def test_the_state_of_another_optimizer(policy, state, message):
    with pytest.raises(UserError, match=message):
        upcycled(upcycle.State(PARAMS, state(), ADAM.init, step=5), surgery=upcycle.Surgery(optimizer_state=policy))


def test_hyperparameters_may_be_numbers_or_initial():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.25)
    for state in (tx.init(PARAMS)._replace(hyperparams={'learning_rate': 0.5}), None):
        made, _ = upcycled(upcycle.State(PARAMS, state, tx.init, step=5))
        assert float(made.opt_state.hyperparams['learning_rate']) == (0.25 if state is None else 0.5)


def test_a_state_restored_as_dicts_fits():
    moments = ADAM.init(PARAMS)[0]
    state = {'0': {'count': moments.count, 'mu': moments.mu, 'nu': moments.nu}}
    made, _ = upcycled(upcycle.State(PARAMS, state, ADAM.init), surgery=upcycle.Surgery(optimizer_state='tile'))
    assert made.opt_state[0].mu['mlp']['up'].shape == (4, 8, 16)


@pytest.mark.parametrize('init', [lambda params: 3, lambda params: 'text', lambda params: jnp.zeros(3)])
def test_init_must_make_a_state(init):
    with pytest.raises(UserError, match='init must return'):
        upcycled(upcycle.State(PARAMS, None, init, step=5))


@pytest.mark.parametrize('step', [-1, 'x', 1.5, True, 2**40])
def test_steps_are_whole(step):
    with pytest.raises(UserError, match=r'step = .* must be a whole number of at least 0 or None'):
        upcycle.State(PARAMS, None, ADAM.init, step=step)


@pytest.mark.parametrize('step', [5, np.int64(5), np.asarray(5), jnp.asarray(5)])
def test_steps_of_any_integer_type(step):
    assert type(upcycle.State(PARAMS, None, ADAM.init, step=step).step) is int


@pytest.mark.parametrize(
    ('output', 'message'),
    [
        (jnp.full((2, 3), jnp.nan), '{} returns NaN or infinity'),
        (jnp.full((2, 3), jnp.inf), '{} returns NaN or infinity'),
        (None, 'dense_apply returns .*None'),
        ({}, 'dense_apply returns .*{{}}'),
        (jnp.zeros((0, 3)), r'dense_apply returns .*\(0, 3\)'),
        ('text', "{} returns 'text'"),
        (jax.random.key(0), '(?s){} returns .*must return numeric'),
    ],
)
@pytest.mark.parametrize('name', ['dense_apply', 'sparse_apply'])
def test_outputs_are_checked(name, output, message):
    functions = dict.fromkeys(('dense_apply', 'sparse_apply'), lambda params, x: jnp.zeros((2, 3)))
    with pytest.raises(UserError, match=message.format(name)):
        upcycled(rules=with_rules(**functions | {name: lambda params, x: output}), batch=BATCH)


@pytest.mark.parametrize('output', [None, {}, jnp.zeros((0, 3))])
def test_both_outputs_are_empty(output):
    with pytest.raises(UserError, match='dense_apply returns .*without a number'):
        upcycled(rules=with_rules(dense_apply=lambda *_: output, sparse_apply=lambda *_: output), batch=BATCH)


def test_masked_outputs_are_equal():
    output = (np.asarray([3.0, -np.inf], np.float32), None)
    rules = with_rules(dense_apply=lambda *_: output, sparse_apply=lambda *_: output)
    check = upcycled(rules=rules, batch=BATCH)[1]['function_check']['whole_model']
    assert check['gap'] == 0 and check['dense_rms'] == pytest.approx(3 / np.sqrt(2))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'layers': '02', 'path': 'mlp_{layer}'}, "layers = '02' must be a list"),
        ({'layers': 2, 'path': 'mlp_{layer}'}, 'layers = 2 must be a list'),
        ({'layers': [None], 'path': 'mlp_{layer}'}, 'layers = .* must be a list'),
        ({'num_experts': True}, 'num_experts = True must be a whole number'),
        ({'num_experts': 4.0}, 'num_experts = 4.0 must be a whole number'),
        ({'granularity': '2'}, "granularity = '2' must be a whole number"),
        ({'router_width': 0}, 'router_width = 0 must be a whole number of at least 1'),
        ({'router_width': -1}, 'router_width = -1 must be a whole number of at least 1'),
        ({'leaves': ['up']}, 'leaves = .* must be a dictionary'),
        ({'leaves': {'up': None}}, 'leaves = .* must be a dictionary'),
        ({'zeros': 'b'}, 'zeros = .* must be a dictionary'),
        ({'router': None}, 'router = None must be a string'),
        ({'router': ''}, "router = '' must be the keys"),
        ({'experts': None}, 'experts = None must be a string'),
        ({'experts': 'experts/'}, "experts = 'experts/' must be the keys of a path joined with"),
        ({'path': '/mlp'}, "path = '/mlp' must be the keys"),
        ({'path': 3}, 'path = 3 must be a string'),
        ({'leaves': {'/up': 'EDF'}}, "'/up' must be the keys"),
        ({'zeros': {'a//b': 'E'}}, "'a//b' must be the keys"),
        ({'router_axes': None}, 'router_axes = None must be'),
    ],
)
def test_types_of_a_rule(changes, message):
    with pytest.raises(UserError, match=message):
        rule(**changes)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'moe': [{}]}, 'moe = .* must be a MoERule or a list of them'),
        ({'moe': None}, 'moe = None must be a MoERule or a list of them'),
        ({'keep': [3]}, 'keep = .* must be a list'),
        ({'keep': None}, 'keep = None must be a list'),
        ({'drop': ['x']}, 'drop = .* must be a dictionary'),
        ({'dense_apply': 3}, 'dense_apply = 3 must be a function'),
        ({'sparse_apply': {}}, 'sparse_apply = .* must be a function'),
        ({'hidden_states': 'f'}, "hidden_states = 'f' must be a function"),
    ],
)
def test_types_of_rules(changes, message):
    with pytest.raises(UserError, match=message):
        with_rules(**changes)


@pytest.mark.parametrize('layers', [range(2), np.arange(2), (np.int64(0), '1'), {0: 1, 1: 1}.keys()])
def test_integers_and_sequences_of_any_type(layers):
    made = rule(path='mlp_{layer}', layers=layers, num_experts=np.int64(4), granularity=np.int32(1))
    assert made.mlps == ('mlp_0', 'mlp_1') and type(made.num_experts) is type(made.granularity) is int


@pytest.mark.parametrize(
    ('operator', 'granularity', 'way_out'), [('granular', 1, 2), ('partial', 4, 2), ('copy', 2, 1)]
)
def test_granularity_of_the_operator(operator, granularity, way_out):
    with pytest.raises(UserError, match=re.escape(f'set MoERule(granularity={way_out})')):
        upcycle.plan(PARAMS, with_rules(moe=rule(granularity=granularity)), upcycle.Surgery(operator))


class TestFactoredMoments:
    """32 experts are more than D and F, so that optax factors the moments along the experts."""

    TX = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    RULES = upcycle.PathRules(moe=rule(num_experts=32), keep='*')

    def test_tile_is_refused(self):
        state = upcycle.State(PARAMS, self.TX.init(PARAMS), self.TX.init)
        with pytest.raises(UserError, match=r"factored.*optimizer_state='fresh'") as refused:
            upcycled(state, self.RULES, upcycle.Surgery(optimizer_state='tile'))
        assert 'put the expert axis first' not in str(refused.value)

    @pytest.mark.parametrize('axes', ['EDF', 'DEF'])
    def test_fresh_maps_nothing(self, axes):
        rules = with_rules(moe=rule(num_experts=32, leaves={'up': axes, 'down': 'EFD'}))
        made, _ = upcycled(upcycle.State(PARAMS, self.TX.init(PARAMS), self.TX.init), rules)
        expected = jax.eval_shape(self.TX.init, made.params)
        assert jax.tree.map(jnp.shape, made.opt_state) == jax.tree.map(lambda leaf: leaf.shape, expected)


def test_everything_may_be_an_mlp():
    upcycled({'mlp': PARAMS['mlp']})
    made, _ = upcycled(PARAMS['mlp'], with_rules(moe=rule(path='')))
    assert made['up'].shape == (4, 8, 16) and made['router'].shape == (8, 4)
    with pytest.raises(UserError, match='matches no leaf'):
        upcycled({'mlp': PARAMS['mlp']}, with_rules(keep=['*', 'head*']))


@pytest.mark.parametrize('policy', ['fresh', 'tile'])
@pytest.mark.parametrize('given', [True, False])
def test_random_keys_in_the_state(policy, given):
    if policy == 'tile' and not given:
        return
    tx = optax.chain(optax.scale_by_adam(), optax.add_noise(0.1, 0.5, jax.random.key(3)))
    state = upcycle.State(PARAMS, tx.init(PARAMS) if given else None, tx.init, step=5)
    made, receipt = upcycled(state, surgery=upcycle.Surgery(optimizer_state=policy))
    assert jax.tree.structure(made.opt_state) == jax.tree.structure(tx.init(made.params))
    assert made.opt_state[1].rng_key == jax.random.key(3)
    assert any('rng_key' in row['target'] for row in receipt['plan'])
