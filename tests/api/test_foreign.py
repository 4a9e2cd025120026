"""Foreign models: the function is preserved, every operator and policy works, and errors name every gap in the rules."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.traverse_util import flatten_dict, unflatten_dict

import upcycle
from tests.api.mixer import Mixer
from upcycle.errors import UserError
from upcycle.surgery.operators import EXPERT_OPERATORS
from upcycle.surgery.operators.fine_grained import Granular

DENSE, SPARSE = Mixer(), Mixer(sparse_layers=(1, 3))
IMAGE = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
LEAVES = {'Dense_0/kernel': 'EDF', 'Dense_0/bias': 'EF', 'Dense_1/kernel': 'EFD', 'Dense_1/bias': 'ED'}
RULE = upcycle.MoERule(path='params/block_{layer}/mlp', layers=(1, 3), num_experts=4, leaves=LEAVES)
RULES = upcycle.PathRules(moe=[RULE], keep=['*'], dense_apply=DENSE.apply, sparse_apply=SPARSE.apply)
MLP = 'params/block_1/mlp'


@functools.cache
def params():
    """Nonzero parameters of the dense model."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(DENSE.init, jax.random.key(0), IMAGE)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 4, jnp.float32), shapes)


def flat(tree):
    return flatten_dict(tree, sep='/')


def with_rule(**changes):
    return dataclasses.replace(RULES, moe=[dataclasses.replace(RULE, **changes)], dense_apply=None, sparse_apply=None)


def expert(leaf):
    return f'{MLP}/experts/{leaf}'


class TestCopy:
    def test_the_function_is_kept(self):
        made, receipt = upcycle.upcycle(params(), RULES, key=0, batch=IMAGE)
        shapes = jax.eval_shape(SPARSE.init, jax.random.key(0), IMAGE)
        assert jax.tree.map(jnp.shape, made) == jax.tree.map(lambda leaf: leaf.shape, shapes)
        check = receipt['function_check']['whole_model']
        assert check['max_abs_difference'] < 1e-5 * check['dense_rms'] and check['dense_rms'] > 0.01
        np.testing.assert_allclose(SPARSE.apply(made, IMAGE), DENSE.apply(params(), IMAGE), atol=1e-5)

    def test_the_receipt_has_their_names(self):
        _, receipt = upcycle.upcycle(params(), RULES, key=5)
        assert receipt['seed'] == 5 and receipt['operator'] == 'copy'
        assert receipt['sha256'].keys() == flat(params()).keys()
        rows = {row['target']: row for row in receipt['plan']}
        row = {'sources': [f'{MLP}/Dense_0/kernel'], 'action': 'experts', 'shape': [4, 16, 32], 'dtype': 'float32'}
        assert rows[expert('Dense_0/kernel')] == {'target': expert('Dense_0/kernel'), **row}
        assert rows[f'{MLP}/router/kernel']['action'] == 'router' and rows['params/head/bias']['action'] == 'keep'
        assert receipt['function_check']['whole_model'] == 'not compared: no batch was given'

    def test_the_plan_is_the_receipts(self):
        shapes = jax.eval_shape(DENSE.init, jax.random.key(0), IMAGE)
        rows = upcycle.plan(shapes, RULES).rows
        _, receipt = upcycle.upcycle(params(), RULES, key=0)
        assert [(row.target, str(row.action), list(row.shape)) for row in rows] == [
            (row['target'], row['action'], row['shape']) for row in receipt['plan']
        ]

    def test_dropped_leaves_are_told(self):
        rules = dataclasses.replace(RULES, drop={'params/head/*': 'another task'})
        plan = upcycle.plan(params(), rules)
        assert plan.dropped == dict.fromkeys(('params/head/bias', 'params/head/kernel'), 'another task')
        made, _ = upcycle.upcycle(params(), rules, key=0)
        assert 'head' not in made['params']

    def test_a_gap_is_told(self):
        rules = dataclasses.replace(RULES, sparse_apply=lambda made, x: DENSE.apply(params(), x) + 1)
        _, receipt = upcycle.upcycle(params(), rules, key=0, batch=IMAGE)
        assert receipt['function_check']['whole_model']['max_abs_difference'] == pytest.approx(1, abs=1e-5)


class TestTrees:
    """Kinds of parameter trees."""

    @pytest.fixture(scope='class')
    @staticmethod
    def expected():
        return flat(upcycle.upcycle(params(), RULES, upcycle.Surgery('drop'), key=0)[0])

    def same(self, made, expected):
        leaves = flat(made)
        assert leaves.keys() == expected.keys()
        for name, leaf in leaves.items():
            np.testing.assert_array_equal(leaf, expected[name])

    def test_frozen(self, expected):
        made, _ = upcycle.upcycle(freeze(params()), RULES, upcycle.Surgery('drop'), key=0)
        assert isinstance(made, FrozenDict)
        self.same(made.unfreeze(), expected)

    @pytest.mark.parametrize('box', [nn.Partitioned, nn.LogicallyPartitioned])
    def test_boxed(self, box, expected):
        boxed = jax.tree.map(lambda leaf: box(leaf, (None,) * leaf.ndim), params())
        self.same(upcycle.upcycle(boxed, RULES, upcycle.Surgery('drop'), key=0)[0], expected)

    def test_numpy(self, expected):
        self.same(
            upcycle.upcycle(jax.tree.map(np.asarray, params()), RULES, upcycle.Surgery('drop'), key=0)[0], expected
        )

    def test_nnx(self):
        nnx = pytest.importorskip('flax.nnx')

        class Block(nnx.Module):
            def __init__(self, rngs):
                self.first, self.second = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.blocks = nnx.List([Block(rngs) for _ in range(2)])

        state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
        leaves = {'first/kernel': 'EDF', 'first/bias': 'EF', 'second/kernel': 'EFD', 'second/bias': 'ED'}
        rule = upcycle.MoERule(path='blocks/{layer}', layers=[1], leaves=leaves, num_experts=2)
        made, _ = upcycle.upcycle(state, upcycle.PathRules(moe=rule, keep='blocks/0/*'), key=0)
        assert isinstance(made, nnx.State)
        kernel = made['blocks'][1]['experts']['first']['kernel']
        assert isinstance(kernel, nnx.Param) and kernel.shape == (2, 3, 8)
        np.testing.assert_array_equal(kernel[...], np.stack([state['blocks'][1]['first']['kernel'][...]] * 2))
        assert isinstance(made['blocks'][1]['router']['kernel'], nnx.Param)
        np.testing.assert_array_equal(made['blocks'][0]['first']['bias'][...], state['blocks'][0]['first']['bias'][...])

    @pytest.mark.parametrize(
        ('tree', 'message'),
        [
            ([1], 'must be nested dicts'),
            ({'a': [np.zeros(3)]}, 'a/0 of params is in a list'),
            ({'a': 'text'}, 'a of params is not a numeric array'),
            ({'a': jax.random.key(0)}, 'a of params is not a numeric array'),
            ({}, 'contains no arrays'),
            ({'a/b': np.zeros(1), 'a': {'b': np.zeros(1)}}, 'a/b of params is the name of two paths'),
        ],
    )
    def test_refused(self, tree, message):
        with pytest.raises(UserError, match=message):
            upcycle.plan(tree, RULES)

    def test_keys_that_mean_something_to_us(self):
        """Leaves below `mixing`, `router`, `expert` or `shared` are ordinary leaves."""
        tree = {
            name: {'w': jnp.full((2,), 3.0)} for name in ('mixing', 'router', 'expert', 'shared', 'router_state', 'a@1')
        }
        tree['shared']['mlp'] = {'wi': jnp.ones((2, 4)), 'wo': jnp.ones((4, 2))}
        rule = upcycle.MoERule(path='shared/mlp', leaves={'wi': 'EDF', 'wo': 'EFD'}, num_experts=2, experts='')
        made, _ = upcycle.upcycle(tree, upcycle.PathRules(moe=rule, keep='*/w'), key=0)
        for name in tree:
            np.testing.assert_array_equal(made[name]['w'], tree[name]['w'])
        assert made['shared']['mlp']['wi'].shape == (2, 2, 4)


class TestAxes:
    def test_where_the_expert_axis_goes(self):
        first, _ = upcycle.upcycle(params(), RULES, upcycle.Surgery('drop'), key=0)
        leaves = {'Dense_0/kernel': 'DEF', 'Dense_0/bias': 'FE', 'Dense_1/kernel': 'FDE', 'Dense_1/bias': 'ED'}
        moved, receipt = upcycle.upcycle(
            params(), with_rule(leaves=leaves, router_axes='ED'), upcycle.Surgery('drop'), key=0
        )
        first, moved = flat(first), flat(moved)
        for name, axis in (('Dense_0/kernel', 1), ('Dense_0/bias', 1), ('Dense_1/kernel', 2), ('Dense_1/bias', 0)):
            np.testing.assert_array_equal(moved[expert(name)], np.moveaxis(first[expert(name)], 0, axis))
        np.testing.assert_array_equal(moved[f'{MLP}/router/kernel'], first[f'{MLP}/router/kernel'].T)
        shapes = {row['target']: tuple(row['shape']) for row in receipt['plan']}
        assert shapes == {name: leaf.shape for name, leaf in moved.items()}

    def test_in_place_kept_within_and_zeros(self):
        leaves = LEAVES | {'Dense_1/bias': 'D'}
        zeros = {'router/bias': 'E', 'scale': 'EF'}
        made, _ = upcycle.upcycle(params(), with_rule(leaves=leaves, experts='', router='gate', zeros=zeros), key=0)
        made = flat(made)
        assert made[f'{MLP}/Dense_0/kernel'].shape == (4, 16, 32) and made[f'{MLP}/gate'].shape == (16, 4)
        np.testing.assert_array_equal(made[f'{MLP}/Dense_1/bias'], flat(params())[f'{MLP}/Dense_1/bias'])
        assert made[f'{MLP}/router/bias'].shape == (4,) and made[f'{MLP}/scale'].shape == (4, 32)
        assert not made[f'{MLP}/router/bias'].any()

    def test_a_router_that_reads_something_else(self):
        made, _ = upcycle.upcycle(params(), with_rule(router_width=7), key=0)
        assert flat(made)[f'{MLP}/router/kernel'].shape == (7, 4)


class TestOperators:
    @pytest.mark.parametrize('operator', ['noise', 'random', 'drop'])
    def test_experts_differ_and_the_seed_decides(self, operator):
        makes = [flat(upcycle.upcycle(params(), RULES, upcycle.Surgery(operator), key=key)[0]) for key in (0, 0, 1)]
        name = expert('Dense_0/kernel')
        np.testing.assert_array_equal(makes[0][name], makes[1][name])
        assert (makes[0][name] != makes[2][name]).any() and (makes[0][name][0] != makes[0][name][1]).any()

    def test_granular(self):
        surgery = upcycle.Surgery(Granular(shards=2))
        made = flat(upcycle.upcycle(params(), with_rule(granularity=2), surgery, key=0)[0])
        dense = flat(params())
        np.testing.assert_array_equal(made[expert('Dense_0/kernel')][1], dense[f'{MLP}/Dense_0/kernel'][:, 16:])
        np.testing.assert_array_equal(made[expert('Dense_1/kernel')][2], 2 * dense[f'{MLP}/Dense_1/kernel'][:16])

    def test_branches(self):
        twice = jax.tree.map(lambda leaf: 3 * leaf, params())
        made = flat(upcycle.upcycle([params(), twice], RULES, upcycle.Surgery('branches'), key=0)[0])
        dense = flat(params())
        np.testing.assert_array_equal(made[expert('Dense_0/bias')][1], 3 * dense[f'{MLP}/Dense_0/bias'])
        np.testing.assert_allclose(made['params/head/bias'], 2 * dense['params/head/bias'], rtol=1e-6)

    @pytest.mark.parametrize('axes', ['EDF', 'DEF'])
    def test_grow_and_merge_start_from_experts(self, axes):
        few = with_rule(num_experts=2, leaves=LEAVES | {'Dense_0/kernel': axes})
        many = with_rule(num_experts=3, leaves=LEAVES | {'Dense_0/kernel': axes})
        start, _ = upcycle.upcycle(params(), few, upcycle.Surgery('noise'), key=0)
        made, receipt = upcycle.upcycle(start, many, upcycle.Surgery('merge', router_init='copied'), key=0)
        start, made = flat(start), flat(made)
        old, new = (np.moveaxis(tree[expert('Dense_0/kernel')], axes.index('E'), 0) for tree in (start, made))
        np.testing.assert_array_equal(new[:2], old)
        assert new.shape == (3, 16, 32) and (new[2] != old[0]).any()
        np.testing.assert_array_equal(made[f'{MLP}/router/kernel'][:, :2], start[f'{MLP}/router/kernel'])
        assert receipt['lineage'][MLP] == [[0], [1], [0, 1]]

    def test_every_operator_is_here(self):
        tested = {'copy', 'noise', 'random', 'drop', 'granular', 'branches', 'merge'}
        assert EXPERT_OPERATORS.keys() - tested == {'partial', 'grow'}  # similar to tested ones

    @pytest.mark.parametrize('init', ['normal', 'orthogonal', 'hidden'])
    def test_router_initialisation(self, init):
        seen = []

        def states(params, mlp, batch):
            seen.append(mlp)
            return jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16)), jnp.float32)

        rules = dataclasses.replace(RULES, hidden_states=states)
        surgery = upcycle.Surgery(router_init=init, router_stddev=0.5)
        kernel = flat(upcycle.upcycle(params(), rules, surgery, key=0, batch=IMAGE)[0])[f'{MLP}/router/kernel']
        assert 0.3 < float(jnp.sqrt(jnp.mean(kernel**2))) < 0.7
        if init == 'orthogonal':
            assert np.abs(kernel.T @ kernel - 4 * jnp.eye(4)).max() < 1e-4
        assert seen == ([MLP, 'params/block_3/mlp'] if init == 'hidden' else [])


def optimizer_state(tx):
    """Nonzero state after 7 steps."""
    state = tx.init(params())
    rng = np.random.default_rng(2)

    def fill(leaf):
        return (
            jnp.full((), 7, leaf.dtype)
            if leaf.shape == () and leaf.dtype == jnp.int32
            else jnp.asarray(rng.random(leaf.shape), leaf.dtype)
        )

    return jax.tree.map(fill, state)


ADAM = optax.adamw(1e-3)


class TestOptimizerState:
    def upcycled(self, policy, tx=ADAM, rules=RULES, **state):
        given = upcycle.State(params(), **{'opt_state': optimizer_state(tx), 'init': tx.init, **state})
        return given, *upcycle.upcycle(given, rules, upcycle.Surgery(optimizer_state=policy), key=0)

    def test_tile(self):
        given, made, receipt = self.upcycled('tile')
        assert jax.tree.structure(made.opt_state) == jax.tree.structure(ADAM.init(made.params))
        for moment in ('mu', 'nu'):
            old, new = (flat(getattr(state.opt_state[0], moment)) for state in (given, made))
            for leaf in LEAVES:
                np.testing.assert_array_equal(new[expert(leaf)], np.stack([old[f'{MLP}/{leaf}']] * 4))
            np.testing.assert_array_equal(new['params/head/kernel'], old['params/head/kernel'])
            assert not new[f'{MLP}/router/kernel'].any()
        assert int(made.opt_state[0].count) == 7
        rows = {row['target']: row['action'] for row in receipt['plan']}
        assert rows[f'opt_state/0/mu/{expert("Dense_0/bias")}'] == 'tile'
        assert rows[f'opt_state/0/mu/{MLP}/router/kernel'] == 'new' and rows['opt_state/0/count'] == 'keep'
        # Another step works.
        grads = jax.tree.map(jnp.ones_like, made.params)
        updates, _ = ADAM.update(grads, made.opt_state, made.params)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, made.params)

    @pytest.mark.parametrize(('policy', 'count'), [('fresh', 7), ('fresh_clock', 0)])
    def test_fresh(self, policy, count):
        _, made, _ = self.upcycled(policy)
        assert int(made.opt_state[0].count) == count
        assert not any(leaf.any() for leaf in jax.tree.leaves((made.opt_state[0].mu, made.opt_state[0].nu)))

    def test_fresh_state_is_what_the_optimizer_starts_with(self):
        tx = optax.contrib.schedule_free_adamw(1e-3)
        _, made, _ = self.upcycled('fresh', tx)
        z = flat(made.opt_state.z)
        for name, leaf in flat(made.params).items():
            np.testing.assert_array_equal(z[name], leaf)

    def test_factored_moments_with_their_placeholders(self):
        tx = optax.scale_by_factored_rms(min_dim_size_to_factor=16)
        given, made, _ = self.upcycled('tile', tx)
        old, new = flat(given.opt_state.v_row), flat(made.opt_state.v_row)
        np.testing.assert_array_equal(new[expert('Dense_0/kernel')], np.stack([old[f'{MLP}/Dense_0/kernel']] * 4))
        np.testing.assert_array_equal(new[expert('Dense_0/bias')], old[f'{MLP}/Dense_0/bias'])
        assert new[expert('Dense_0/bias')].shape == (1,)

    def test_hyperparameters_stay(self):
        tx = optax.inject_hyperparams(optax.adam)(learning_rate=0.25)
        given, made, _ = self.upcycled('fresh', tx)
        assert made.opt_state.hyperparams == given.opt_state.hyperparams
        assert int(made.opt_state.count) == 7

    def test_the_expert_axis_of_moments(self):
        _, first, _ = self.upcycled('tile')
        _, moved, _ = self.upcycled('tile', rules=with_rule(leaves=LEAVES | {'Dense_0/kernel': 'DEF'}))
        first, moved = (flat(state.opt_state[0].mu)[expert('Dense_0/kernel')] for state in (first, moved))
        np.testing.assert_array_equal(moved, np.moveaxis(first, 0, 1))

    def test_a_new_optimizer_begins_at_the_step(self):
        _, made, receipt = self.upcycled('fresh', opt_state=None, step=9)
        assert int(made.opt_state[0].count) == 9 and made.step == 9 and receipt['source']['step'] == 9

    def test_state_of_dropped_leaves_goes_with_them(self):
        rules = dataclasses.replace(RULES, drop={'params/head/*': 'another task'}, dense_apply=None, sparse_apply=None)
        _, made, receipt = self.upcycled('tile', rules=rules)
        assert receipt['dropped']['opt_state/0/mu/params/head/bias'] == 'its parameter is dropped'
        assert 'head' not in made.opt_state[0].mu['params']

    def test_refused(self):
        with pytest.raises(UserError, match='opt_state/0/count counts steps, and their number is unknown'):
            self.upcycled('fresh', opt_state=None)
        with pytest.raises(UserError, match="optimizer_state='tile' repeats"):
            upcycle.upcycle(params(), RULES, upcycle.Surgery(optimizer_state='tile'), key=0)
        with pytest.raises(UserError, match="set OPTIMIZER_STATE = 'fresh'|needs the checkpoint's optimizer state"):
            self.upcycled('tile', opt_state=None, step=1)
        with pytest.raises(UserError, match='init = None must be a function'):
            upcycle.State(params(), None)
        rules = with_rule(leaves=LEAVES | {'Dense_0/kernel': 'DEF'})
        with pytest.raises(UserError, match=r'v_row.*Dense_0/kernel .* put the expert axis first, or use'):
            self.upcycled('tile', optax.scale_by_factored_rms(min_dim_size_to_factor=4), rules=rules)


BAD_RULES = {
    # A dense leaf without a rule.
    'params/block_1/mlp/Dense_1/bias belongs to an MLP that becomes sparse and has no rule': lambda: with_rule(
        layers=[1], leaves={name: axes for name, axes in LEAVES.items() if name != 'Dense_1/bias'}
    ),
    'params/head/bias has no rule': lambda: dataclasses.replace(
        RULES, keep=['params/block*', 'params/stem*', 'params/norm*', '*kernel']
    ),
    # A rule that matches nothing.
    r'params/block_9/mlp/Dense_0/kernel is not in the tree': lambda: with_rule(layers=(1, 9)),
    r"Dense_2/kernel is not in the tree, but the rule for 'params/block_\{layer\}/mlp' names it \(did you mean": lambda: (
        with_rule(layers=[1], leaves=LEAVES | {'Dense_2/kernel': 'EDF'})
    ),
    "the pattern 'params/haed/\\*' matches no leaf outside `moe`": lambda: dataclasses.replace(
        RULES, keep=['*', 'params/haed/*']
    ),
    "the pattern 'x\\*' matches no leaf": lambda: dataclasses.replace(RULES, drop={'x*': 'gone'}),
    # Axes.
    r'Dense_0/kernel \(16, 32\) has 2 axes, but its rule names F': lambda: with_rule(
        layers=[1], leaves=LEAVES | {'Dense_0/kernel': 'EF'}
    ),
    r'has D = 32, but .*Dense_0/kernel has 16': lambda: with_rule(
        layers=[1], leaves=LEAVES | {'Dense_1/kernel': 'EDF'}
    ),
    'would be made twice': lambda: with_rule(zeros={'router/kernel': 'DE'}),
    'does not divide F = 32': lambda: with_rule(granularity=3),
}


@pytest.mark.parametrize('message', BAD_RULES)
def test_rules_that_do_not_fit(message):
    with pytest.raises(UserError, match=message):
        upcycle.plan(params(), BAD_RULES[message]())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'layers': ()}, 'give both or neither'),
        ({'layers': (1, '1')}, 'names a layer twice'),
        ({'num_experts': 0}, 'num_experts = 0 must be'),
        ({'granularity': 1.5}, 'granularity = 1.5 must be'),
        ({'leaves': {'w': 'DF'}}, 'no leaf has an axis E'),
        ({'leaves': {'w': 'E-F'}}, "axes 'E-F' of w must be letters"),
        ({'leaves': {'w': 'EDD'}}, 'repeat a letter'),
        ({'zeros': {'b': 'EX'}}, 'must be among E, D and F'),
        ({'router_axes': 'DF'}, "must be 'DE' or 'ED'"),
    ],
)
def test_rules_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(RULE, **changes)


def test_what_surgery_refuses():
    with pytest.raises(UserError, match='`moe` has no rules'):
        upcycle.PathRules(moe=[])
    with pytest.raises(UserError, match='name each MLP once'):
        upcycle.PathRules(moe=[RULE, RULE])
    with pytest.raises(UserError, match='operator=None'):
        upcycle.plan(params(), RULES, upcycle.Surgery(None))
    with pytest.raises(UserError, match='must be a jax.sharding.Mesh'):
        upcycle.upcycle(params(), RULES, key=0, mesh=(1, 1))
    with pytest.raises(UserError, match='needs `dense_apply`'):
        upcycle.upcycle(params(), with_rule(), key=0, batch=IMAGE)
    with pytest.raises(UserError, match='pass a batch, and `hidden_states`'):
        upcycle.upcycle(params(), RULES, upcycle.Surgery(router_init='hidden'), key=0)
    with pytest.raises(UserError, match='with several dense models'):
        upcycle.upcycle([params()] * 2, RULES, upcycle.Surgery('branches'), key=0, batch=IMAGE)
    with pytest.raises(UserError, match='must return the same shapes'):
        wrong = dataclasses.replace(RULES, sparse_apply=lambda params, x: jnp.zeros(3))
        upcycle.upcycle(params(), wrong, key=0, batch=IMAGE)
    with pytest.raises(UserError, match=r"'copy' divides the width of an MLP by 1, .* set MoERule\(granularity=1\)"):
        upcycle.plan(params(), with_rule(granularity=2, layers=[1]))
    broken = unflatten_dict(flat(params()) | {'params/head/bias': jnp.full(10, jnp.nan)}, sep='/')
    with pytest.raises(UserError, match='head/bias holds 10 numbers that are NaN'):
        upcycle.upcycle(broken, RULES, key=0)
