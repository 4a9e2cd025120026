"""Operators that add experts: grow and merge."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tests.surgery.in_memory import ONE, abstract, leaves_of, params_of, plan_for, upcycle
from tests.surgery.test_function import dense_params, model_of
from upcycle.errors import UserError
from upcycle.surgery.operators.sparse import Grow, Merge
from upcycle.surgery.place import execute
from upcycle.surgery.plan import Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.receipt import check_function

OLD = 4
GROW = Surgery(operator='grow', router_init='copied', router_noise=0.0)


def small(**moe):
    """A model with OLD experts that drops no tokens."""
    return model_of('t5', num_experts=OLD, num_selected_experts=2, eval_capacity_factor=2.0, **moe)


@functools.cache
def source():
    """Parameters with different experts."""
    model, batch = small()
    return params_of(model, batch, seed=3)


def experts(params, name='encoder/layers_1/mlp/expert/wo/kernel'):
    return np.asarray(flatten_dict(params, sep='/')[name])


def test_growing_k_and_capacity_with_the_experts_keeps_the_function():
    moe = {'normalize_combine_weights': False}
    model, batch = model_of('t5', num_experts=8, num_selected_experts=4, eval_capacity_factor=4.0, **moe)
    params = upcycle(model, source(), GROW, batch)
    check = check_function(model, source(), params, batch, small(**moe)[0])
    for layer in check['layers'].values():
        assert layer['max_abs_difference_covered'] < 1e-5 * max(layer['dense_rms'], 1)
        assert layer['gap'] < 1e-5
    assert abs(check['whole_model']['loss_gap']) < 1e-5


def test_with_k_as_it_was_the_receipt_has_the_gap():
    model, batch = model_of('t5', num_experts=8, num_selected_experts=2, eval_capacity_factor=4.0)
    check = check_function(model, source(), upcycle(model, source(), GROW, batch), batch, small()[0])
    assert check['layers']['decoder/layers_1/mlp']['gap'] > 0.1


def test_uniform_copies_come_after_the_originals():
    model, batch = model_of('t5', num_experts=12)
    made, old = upcycle(model, source(), GROW, batch), experts(source())
    np.testing.assert_array_equal(experts(made), np.concatenate([old] * 3))
    router = 'encoder/layers_1/mlp/router/router_weights/w/kernel'
    np.testing.assert_array_equal(experts(made, router), np.tile(experts(source(), router), 3))


def with_state(params, of_experts):
    """State leaves with the given second moments for the experts of the encoder's MoE layer, 1 elsewhere."""
    leaves = leaves_of(params)
    for name, leaf in list(leaves.items()):
        v = jnp.ones_like(leaf)
        if 'encoder' in name and '/expert/' in name:
            v = jnp.broadcast_to(jnp.asarray(of_experts, jnp.float32)[:, None, None], leaf.shape)
        leaves[f'opt_state/param_states/{name.removeprefix("params/")}/v'] = v
    return leaves | {'step': jnp.asarray(3), 'opt_state/count': jnp.asarray(3)}


def grown(operator, of_experts, num_experts=8, **spec):
    model, batch = model_of('t5', num_experts=num_experts)
    shapes, axes = abstract(model, batch)
    for name, leaf in list(shapes.items()):
        shapes[f'opt_state/param_states/{name.removeprefix("params/")}/v'] = leaf
    shapes |= dict.fromkeys(('step', 'opt_state/count'), jax.ShapeDtypeStruct((), jnp.int32))
    leaves = with_state(source(), of_experts)
    settings = {'router_init': 'copied', 'router_noise': 0.0, 'optimizer_state': 'tile', **spec}
    plan = plan_surgery(
        {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in leaves.items()},
        shapes,
        Surgery(operator=operator, **settings),
        axes,
    )
    return execute(plan, lambda name, sharding: leaves[name], dict.fromkeys(shapes, ONE), new={})


@pytest.mark.parametrize(
    ('utility', 'of_experts', 'new'),
    [
        ('gradient', [1, 1, 100, 1], [2, 2, 2, 2]),  # one expert dominates
        ('saliency', [1, 1, 100, 1], [2, 2, 2, 2]),
        ('gradient', [8, 1, 1, 4.1], [0, 3, 0, 0]),  # highest per copy: 8; 4.1; 4; 2.67
    ],
)
def test_useful_experts_get_more_copies(utility, of_experts, new):
    made, old = grown(Grow(utility=utility), of_experts), experts(source())
    name = 'params/encoder/layers_1/mlp/expert/wo/kernel'
    np.testing.assert_array_equal(made[name], np.concatenate([old, old[np.asarray(new)]]))
    moments = made['opt_state/param_states/encoder/layers_1/mlp/expert/wo/kernel/v'][:, 0, 0]
    np.testing.assert_allclose(moments, [*of_experts, *np.asarray(of_experts)[np.asarray(new)]])
    router = 'params/encoder/layers_1/mlp/router/router_weights/w/kernel'
    columns = experts(source(), router.removeprefix('params/'))
    np.testing.assert_array_equal(made[router], np.concatenate([columns, columns[:, np.asarray(new)]], axis=1))


def test_utility_of_weights_needs_no_state():
    scaled = jax.tree.map(lambda leaf: leaf, source())
    for name in ('wi_0', 'wi_1', 'wo'):
        kernel = scaled['encoder']['layers_1']['mlp']['expert'][name]['kernel']
        scaled['encoder']['layers_1']['mlp']['expert'][name]['kernel'] = kernel.at[1].multiply(10.0)
    model, batch = model_of('t5', num_experts=6)
    made = upcycle(model, scaled, dataclasses.replace(GROW, operator=Grow(utility='weight')), batch)
    np.testing.assert_array_equal(experts(made)[4:], experts(scaled)[[1, 1]])


def test_merging_takes_the_most_dissimilar_pairs():
    # Experts 0 and 1 are opposite, 2 and 3 similar; other pairs are dissimilar.
    changed = jax.tree.map(lambda leaf: leaf, source())
    for name in ('wi_0', 'wi_1', 'wo'):
        kernel = changed['encoder']['layers_1']['mlp']['expert'][name]['kernel']
        kernel = kernel.at[1].set(-kernel[0]).at[3].set(kernel[2])
        changed['encoder']['layers_1']['mlp']['expert'][name]['kernel'] = kernel
    model, batch = model_of('t5', num_experts=5)
    plain, dare = (
        upcycle(model, changed, dataclasses.replace(GROW, operator=Merge(drop=p)), batch) for p in (0.0, 0.5)
    )
    old = experts(changed)
    np.testing.assert_array_equal(experts(plain)[:4], old)
    np.testing.assert_allclose(experts(plain)[4], (old[0] + old[1]) / 2, atol=1e-7)
    # Each weight is the first's, the second's or the mean, with probabilities 1/4, 1/4, 1/2.
    new = experts(dare)[4]
    shares = [np.isclose(new, choice, atol=1e-7).mean() for choice in (old[0], old[1], (old[0] + old[1]) / 2)]
    np.testing.assert_allclose(shares, [0.25, 0.25, 0.5], atol=0.02)
    router = 'encoder/layers_1/mlp/router/router_weights/w/kernel'
    columns = experts(changed, router)
    np.testing.assert_allclose(experts(dare, router)[:, 4], (columns[:, 0] + columns[:, 1]) / 2, atol=1e-7)


def test_merged_state_is_the_parents_mean():
    made = grown(Merge(), [1.0, 2.0, 3.0, 4.0], num_experts=10)
    moments = made['opt_state/param_states/encoder/layers_1/mlp/expert/wo/kernel/v'][:, 0, 0]
    pairs = [(a + b) / 2 for a in range(1, 5) for b in range(a + 1, 5)]
    np.testing.assert_allclose(moments[:4], [1, 2, 3, 4])
    np.testing.assert_allclose(sorted(moments[4:]), sorted(pairs))


@pytest.mark.parametrize(
    ('operator', 'num_experts', 'message'),
    [
        ('grow', 4, "'grow' adds experts to the 4 of the checkpoint, and NUM_EXPERTS = 4: raise it"),
        (
            'grow',
            6,
            "not a multiple of the checkpoint's 4 experts, which GROW_UTILITY = 'uniform' copies equally often",
        ),
        ('merge', 11, 'needs 7 new experts, and the 4 of the checkpoint form 6 pairs: set it to at most 10'),
        (Grow(utility='gradient'), 6, "measures the optimizer's second moments, and the checkpoint has none"),
        (
            'copy',
            8,
            "EXPERT_OPERATOR = 'copy' starts from a dense checkpoint, and this one has experts: name a dense one, or add "
            'experts to this one with surgery/grow.gin or surgery/merge.gin',
        ),
    ],
)
def test_nonsense_is_refused(operator, num_experts, message):
    model, batch = model_of('t5', num_experts=num_experts)
    init = 'normal' if operator == 'copy' else 'copied'
    with pytest.raises(UserError, match=message):
        plan_for(model, source(), Surgery(operator=operator, router_init=init), batch)


def test_dense_checkpoints_do_not_grow():
    model, batch = model_of('t5')
    with pytest.raises(UserError, match="'grow' starts from a checkpoint with experts, and this one has none"):
        plan_for(model, dense_params('t5'), GROW, batch)
    with pytest.raises(UserError, match="ROUTER_INIT = 'copied' needs the checkpoint's router"):
        plan_for(model, dense_params('t5'), Surgery(router_init='copied'), batch)


def test_a_router_can_start_anew():
    model, batch = model_of('t5')
    plan = plan_for(model, source(), Surgery(operator='grow', router_init='orthogonal'), batch)
    assert "ROUTER_INIT = 'orthogonal' reinitialises routers" in plan.dropped.values()


@pytest.mark.parametrize('setting', [{'utility': 'rank'}, {'drop': 1.0}])
def test_unknown_options(setting):
    with pytest.raises(UserError, match='GROW_UTILITY|MERGE_DROP'):
        (Grow if 'utility' in setting else Merge)(**setting)
