"""Experts from several checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.surgery.in_memory import leaves_of, params_of, plan_for, upcycle
from tests.surgery.test_function import dense_params, model_of
from upcycle.checkpoints.several import SeveralReader
from upcycle.errors import UserError
from upcycle.surgery.operators import Start
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.planning import plan_surgery

BRANCHES = Surgery(operator='branches')


def branch(i):
    model, batch = model_of('t5')
    return params_of(model.dense(), batch, seed=i)


def flat(params):
    return flatten_dict(params, sep='/')


def test_experts_are_the_branches_and_the_rest_is_their_mean():
    model, batch = model_of('t5', num_experts=4)
    branches = [branch(0), branch(1)]
    made, (first, second) = flat(upcycle(model, branches, BRANCHES, batch)), map(flat, branches)
    for name, leaf in made.items():
        if '/router/' in name:
            continue
        if '/expert/' in name:
            dense = name.replace('/expert', '')
            for e, expert in enumerate(leaf):
                np.testing.assert_array_equal(expert, (first, second)[e % 2][dense])
        else:
            np.testing.assert_allclose(leaf, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)


def test_equal_branches_are_copies():
    model, batch = model_of('t5', num_experts=6)
    dense = dense_params('t5')
    made = flat(upcycle(model, [dense] * 3, BRANCHES, batch))
    for name, leaf in flat(upcycle(model, dense, Surgery(), batch)).items():
        np.testing.assert_allclose(made[name], leaf, rtol=1e-6)


def test_the_plan_names_every_source():
    model, batch = model_of('t5', num_experts=4)
    rows = {row.target: row for row in plan_for(model, [branch(0)] * 2, BRANCHES, batch).rows}
    expert = rows['params/encoder/layers_1/mlp/expert/wo/kernel']
    assert expert.action is Action.EXPERTS
    assert expert.sources == ('params/encoder/layers_1/mlp/wo/kernel@0', 'params/encoder/layers_1/mlp/wo/kernel@1')
    norm = rows['params/encoder/encoder_norm/scale']
    assert (norm.action, len(norm.sources)) == (Action.MEAN, 2)


def test_state_goes_with_the_branch_and_the_step_is_the_largest():
    shape = {'params/m/wi/kernel': (4, 8), 'params/n/scale': (4,)}
    sparse = {'params/m/expert/wi/kernel': (2, 4, 8), 'params/n/scale': (4,)}

    def state(shapes):
        leaves = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
        leaves |= {
            f'opt_state/param_states/{name.removeprefix("params/")}/v': leaf for name, leaf in list(leaves.items())
        }
        return leaves | {name: jax.ShapeDtypeStruct((), jnp.int32) for name in ('step', 'opt_state/count')}

    values = {
        f'{name}@{i}': jnp.full(leaf.shape, 10 * i + 1, leaf.dtype)
        for i in (0, 1)
        for name, leaf in state(shape).items()
    }
    plan = plan_surgery(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in values.items()},
        state(sparse),
        Surgery(operator='branches', optimizer_state='tile'),
    )
    from upcycle.surgery.place import execute

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    made = execute(plan, lambda name, sharding: values[name], dict.fromkeys(state(sparse), one), new={})
    np.testing.assert_array_equal(made['opt_state/param_states/m/expert/wi/kernel/v'][:, 0, 0], [1, 11])
    np.testing.assert_array_equal(made['opt_state/param_states/n/scale/v'], 6)
    assert made['step'] == made['opt_state/count'] == 11


@pytest.mark.parametrize(
    ('operator', 'count', 'experts', 'message'),
    [
        (
            'branches',
            1,
            4,
            "'branches' needs several checkpoints, and INITIAL_CHECKPOINT_PATH names one",
        ),
        ('branches', 3, 4, 'NUM_EXPERTS = 4 is not a multiple of the 3 checkpoints'),
        ('copy', 2, 4, "INITIAL_CHECKPOINT_PATH names 2 checkpoints, and EXPERT_OPERATOR = 'copy' starts from one"),
        (None, 2, 4, 'names 2 checkpoints, and this run starts from one'),
    ],
)
def test_nonsense_is_refused(operator, count, experts, message):
    model, batch = model_of('t5', num_experts=experts)
    source = [dense_params('t5')] * count if count > 1 else dense_params('t5')
    with pytest.raises(UserError, match=message):
        plan_for(model, source, Surgery(operator=operator), batch)


def test_checkpoints_that_differ():
    model, batch = model_of('t5')
    other = leaves_of([dense_params('t5'), branch(1)])
    other.pop('params/encoder/encoder_norm/scale@1')
    leaves = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in other.items()}
    sparse = {'params/encoder/encoder_norm/scale': jax.ShapeDtypeStruct((128,), jnp.float32)}
    with pytest.raises(UserError, match=r'encoder_norm/scale differs between the checkpoints: \(128,\), missing'):
        plan_surgery(leaves, sparse, BRANCHES)


def test_what_starts_from_several():
    assert BRANCHES.operator.starts_from is Start.SEVERAL


class OfARun:
    """A reader without leaves."""

    format = 'upcycle'

    def __init__(self, path, step=None, flops=0.0, source=None):
        self.path, self.step = path, step
        self.metadata = {'cost': {'flops': flops}} | ({'source': {'path': source}} if source else {})

    def leaves(self):
        return {}

    def read(self, name, sharding=None, dtype=None, region=()):
        return name, region


@pytest.mark.parametrize(
    ('readers', 'flops'),
    [
        ([('/a/checkpoints/4', 4), ('/a/checkpoints/8', 8)], 8),
        ([('/a/checkpoints/4', 4), ('/b/checkpoints/8', 8)], 12),
        ([('/m/checkpoint_100', 4), ('/m/checkpoint_200', 8)], 8),
        ([('/exports/a.npz', 4), ('/exports/b.npz', 8)], 12),
        ([('/exports/a', 4), ('/exports/b', 8)], 12),
        ([('/exports/a', 4, '/a/checkpoints/4'), ('/exports/b', 8, '/a/checkpoints/8')], 8),
        ([('/exports/a', 4, '/a/checkpoints/4'), ('/a/checkpoints/8', 8)], 8),
        ([('gs://bucket/a/checkpoints/4', 4), ('gs://bucket/b/checkpoints/4', 4)], 8),
    ],
)
def test_a_run_is_counted_once(readers, flops):
    """Several steps of one run cost as much as the last; exports in one folder count as the runs they were made from."""
    reader = SeveralReader(
        [OfARun(path, flops=cost, source=next(iter(source), None)) for path, cost, *source in readers]
    )
    assert reader.metadata['cost']['flops'] == flops


def test_steps_and_regions_of_several():
    assert SeveralReader([OfARun('a', 3), OfARun('b'), OfARun('c', 5)]).step == 5
    assert SeveralReader([OfARun('a'), OfARun('b')]).step is None
    region = (slice(0, 1),)
    assert SeveralReader([OfARun('a'), OfARun('b')]).read('params/x@1', region=region) == ('params/x', region)
