"""Arguments of the Python API: wrong ones are refused by name, before any work; none changes the result silently."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

import upcycle
from tests import runs
from tests.small import random_batch
from upcycle import trees
from upcycle.errors import UserError
from upcycle.in_memory import as_key, check_experts, seed_of
from upcycle.models import identify

RULE = upcycle.MoERule(path='mlp', num_experts=4, leaves={'up': 'EDF', 'down': 'EFD'}, experts='', router='router')
RULES = upcycle.PathRules(moe=[RULE], keep=['*'])
P = {
    'mlp': {'up': np.ones((8, 16), np.float32), 'down': np.ones((16, 8), np.float32)},
    'head': np.ones((8, 3), np.float32),
}


def foreign(params=P, surgery=None, **options):
    return upcycle.upcycle(params, RULES, surgery, **({'key': 0} | options))


@functools.cache
def dense():
    """A T5 with one layer in each stack."""
    return runs.build('dense', 'unused', 1, **runs.ONE_LAYER).model


@functools.cache
def moe():
    return upcycle.sparse(dense(), NUM_EXPERTS=4, ENCODER_MOE_LAYERS=(0,), DECODER_MOE_LAYERS=(0,))


@functools.cache
def weights():
    rng = np.random.default_rng(0)
    shapes = identify.shapes(dense())
    flat = {name: rng.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    return upcycle.api.unflatten_dict(flat, sep='/')['params']


class TestSurgery:
    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'router_stddev': float('nan')}, 'ROUTER_INIT_STDDEV = nan must be a number of at least 0'),
            ({'router_stddev': -1}, 'ROUTER_INIT_STDDEV = -1 must be'),
            ({'router_stddev': '1'}, "ROUTER_INIT_STDDEV = '1' must be"),
            ({'router_noise': float('inf')}, 'ROUTER_NOISE = inf must be'),
            ({'seed': -1}, 'UPCYCLE_SEED = -1 must be a whole number of at least 0'),
            ({'new_head': 'no'}, "NEW_HEAD = 'no' must be True or False"),
            ({'operator': 3}, 'EXPERT_OPERATOR = 3 must be'),
            ({'dense_operator': 3, 'operator': None}, 'DENSE_OPERATOR = 3 must be'),
            ({'router_init': 'uniform'}, "ROUTER_INIT = 'uniform' must be one of normal"),
            ({'optimizer_state': ['tile']}, 'OPTIMIZER_STATE = .* must be one of fresh'),
        ],
    )
    def test_out_of_bounds(self, arguments, message):
        with pytest.raises(UserError, match=message):
            upcycle.Surgery(**arguments)

    def test_numbers_of_numpy(self):
        surgery = upcycle.Surgery(router_stddev=np.float32(0.5), seed=np.int64(3))
        assert surgery == upcycle.Surgery(router_stddev=0.5, seed=3) and type(surgery.seed) is int


class TestSixtyFourBits:
    @pytest.mark.parametrize('value', [2**40, -(2**31) - 1])
    def test_a_number_beyond_32_bits(self, value):
        with pytest.raises(
            UserError, match=f'count of params holds {value}, which int32 cannot hold: .*jax_enable_x64'
        ):
            foreign({**P, 'count': np.array(value)})

    def test_a_float_beyond_32_bits(self):
        with pytest.raises(UserError, match='head of params holds 1e.300, which float32 cannot hold'):
            foreign({**P, 'head': np.full((8, 3), 1e300)})

    def test_numbers_within_32_bits(self):
        made, receipt = foreign({**P, 'count': np.array(7), 'head': np.full((8, 3), 0.5)})
        assert made['count'] == 7 and made['head'].dtype == np.float32
        types = {row['target']: row['dtype'] for row in receipt['plan']}
        assert types['count'] == 'int32' and types['head'] == 'float32'

    def test_the_optimizer_state(self):
        tx = optax.chain(optax.sgd(1e-3), optax.scale_by_schedule(lambda count: 1.0))
        state = tx.init(P)
        state = jax.tree.map(lambda leaf: np.array(2**40), state)
        with pytest.raises(UserError, match='which int32 cannot hold'):
            foreign(upcycle.State(P, state, tx.init))


class TestKeys:
    @pytest.mark.parametrize('key', [-1, 2**32, 2**70, np.int64(2**33)])
    def test_integers_that_would_collide(self, key):
        with pytest.raises(UserError, match='must be between 0 and 4294967295'):
            as_key(key)

    def test_the_largest_integer(self):
        assert jnp.all(jax.random.key_data(as_key(2**32 - 1)) == jnp.array([0, 2**32 - 1], jnp.uint32))

    def test_a_raw_key_on_the_host(self):
        assert seed_of(as_key(np.asarray(jax.random.PRNGKey(7)))) == 7

    @pytest.mark.parametrize('key', [np.zeros(3, np.uint32), np.zeros(2, np.int32), jnp.zeros(5, jnp.uint32), 1.0])
    def test_not_a_key(self, key):
        with pytest.raises(UserError, match='must be one key'):
            as_key(key)


class TestMesh:
    @staticmethod
    def mesh(size, *names):
        return Mesh(np.array(jax.devices()[:1] * size).reshape(size, *(1,) * (len(names) - 1)), names)

    @pytest.mark.parametrize('size', [3, 8])
    @pytest.mark.parametrize('kind', ['foreign', 'ours'])
    def test_experts_that_do_not_divide(self, kind, size):
        params, sparse = (P, RULES) if kind == 'foreign' else (weights(), moe())
        with pytest.raises(UserError, match=f'4 experts do not divide among the {size} shards of the axis `expert`'):
            upcycle.upcycle(params, sparse, key=0, mesh=self.mesh(size, 'expert', 'data'))

    def test_a_mesh_without_an_axis_for_experts(self, capsys):
        made, _ = foreign(mesh=Mesh(np.array(jax.devices()[:1]), ('model',)))
        assert made['mlp']['up'].shape == (4, 8, 16) and capsys.readouterr().err == ''
        check_experts(self.mesh(2, 'data', 'model'), [4])
        assert 'the axes data, model and none named `expert`: each device holds' in capsys.readouterr().err


TOKENS = {name: value for name, value in random_batch(384).items() if name.endswith('_input_tokens')}


class TestBatch:
    @pytest.mark.parametrize(
        ('batch', 'message'),
        [
            (TOKENS, "the batch has no 'decoder_target_tokens'"),
            ({}, "the batch has no '.*_tokens'"),
            (3, 'batch must be a dict of arrays by feature, not int'),
            ({**random_batch(384), 'decoder_target_tokens': np.zeros(3, int)}, 'the model cannot read the batch'),
        ],
    )
    def test_a_batch_that_cannot_be_compared(self, batch, message):
        with pytest.raises(UserError, match=message):
            upcycle.upcycle(weights(), moe(), key=0, batch=batch)

    def test_arrays_without_names(self):
        with pytest.raises(UserError, match="not .*: name the arrays 'encoder_input_tokens', 'decoder_input_tokens'"):
            moe().logits(weights(), TOKENS['encoder_input_tokens'])


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def deleted():
    head = jnp.ones((8, 3))
    head.delete()
    return {**P, 'head': head}


PARAMS = {
    'head of params is a shape without numbers': lambda: foreign(shapes(P)),
    'params is a model': lambda: upcycle.upcycle(dense(), moe(), key=0),
    'decoder/decoder_norm/scale of params is a shape': lambda: upcycle.upcycle(shapes(weights()), moe(), key=0),
    'head of params was deleted or donated': lambda: foreign(deleted()),
    '0 of opt_state was deleted': lambda: foreign(upcycle.State(P, (deleted()['head'],), lambda params: (0,))),
    'call upcycle outside of jax.jit': lambda: jax.jit(foreign)(P),
    'call upcycle outside of jax.jit and': lambda: jax.jit(lambda x: foreign())(0),
    'outside of jax.jit and other': lambda: jax.vmap(lambda x: foreign({**P, 'head': x}))(jnp.ones((2, 8, 3))),
    'a dict of params has keys of several types': lambda: foreign({**P, 0: P['head']}),
    'head holds 1 numbers that are NaN or infinite: fix them before': lambda: foreign(
        {**P, 'head': np.where(np.arange(24).reshape(8, 3) == 3, np.nan, 1).astype(np.float32)}
    ),
    r"pass params\['params'\]": lambda: upcycle.plan({'params': weights()}, moe()),
}


@pytest.mark.parametrize('message', PARAMS)
def test_parameters_that_are_refused(message):
    with pytest.raises(UserError, match=message):
        PARAMS[message]()


def test_leaves_of_other_kinds_are_not_numbers():
    trees.require_numbers(
        {'key': jax.random.key(0), 'count': 3, 'none': None, 'narrow': np.ones(2, jnp.bfloat16)}, 'state'
    )


def test_routers_are_float32_in_any_tree():
    made, _ = foreign(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), P))
    assert made['mlp']['router'].dtype == jnp.float32 and made['mlp']['up'].dtype == jnp.bfloat16


def test_a_plan_needs_no_numbers():
    assert upcycle.plan(shapes(P), RULES) == upcycle.plan(P, RULES)


TYPES = {
    r"surgery must be a Surgery, such as Surgery\(operator='copy'\), not str": lambda: foreign(surgery='drop'),
    'surgery must be a Surgery, .* not dict': lambda: upcycle.plan(P, RULES, {}),
    'model must be a model of this package, .* not dict': lambda: upcycle.sparse(P),
    'model must be a model of this package, .* not str': lambda: upcycle.sparse('/path'),
    'path must be the path of a checkpoint, not NoneType': lambda: upcycle.load(None),
    'path must be the path of a checkpoint, not int': lambda: upcycle.load(3),
    'model must be a model of this package, such as.* not dict': lambda: upcycle.load('/path', model=P),
    'source must be the path of a checkpoint, .* not NoneType': lambda: upcycle.convert(('x.gin',), None, 'y'),
    'source must be the path of a checkpoint, or a list': lambda: upcycle.convert(('x.gin',), ['x', 3], 'y'),
    'source is an empty list': lambda: upcycle.convert(('x.gin',), [], 'y'),
    'target must be the path of the new checkpoint, not NoneType': lambda: upcycle.convert(('x.gin',), 'x', None),
    r"gin_files must be a list of file names, such as \['models/NAME.gin'\], not str": lambda: upcycle.convert(
        'models/x.gin', 'x', 'y'
    ),
    'gin_files must be a list of file names, .*, not str': lambda: upcycle.train('models/x.gin'),
    'gin_files must be a list of file names, .* not dict': lambda: upcycle.train({}),
    'each item of files must be a file name, not int': lambda: upcycle.sparse(dense(), 3),
}


@pytest.mark.parametrize('message', TYPES)
def test_types_that_are_refused(message):
    with pytest.raises(UserError, match=message):
        TYPES[message]()
