"""Plans: every leaf has one source, and all mismatches are reported before anything is read."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.small import random_batch, small_t5, spec_of, with_moe
from upcycle import partitioning
from upcycle.errors import UserError
from upcycle.models.encoder_decoder import EncoderDecoderModel
from upcycle.moe import state as moe_state
from upcycle.surgery.plan import Action, OptimizerState, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.training.optimizer import Adafactor


def leaves_of(config):
    """The flat abstract state of a model."""
    from flax.traverse_util import flatten_dict

    model = EncoderDecoderModel(config)
    boxed = jax.eval_shape(lambda key: model.init(key, spec_of(random_batch())), jax.random.key(0))
    params, axes = partitioning.unbox(boxed), partitioning.batch_axes(boxed)
    trained, axes = (moe_state.split(tree)[0] for tree in (params, axes))
    opt_state = jax.eval_shape(lambda p: Adafactor().init(p, axes), trained)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    tree = {'step': scalar, 'params': params, 'opt_state': opt_state, 'rng': jax.ShapeDtypeStruct((2,), jnp.uint32)}
    return flatten_dict(tree, sep='/')


DENSE = leaves_of(small_t5())
SPARSE = leaves_of(with_moe(small_t5(), num_experts=4))
WI = 'params/encoder/layers_1/mlp/wi_0/kernel'


def test_every_target_has_a_row_and_every_source_an_end():
    result = plan_surgery(DENSE, SPARSE, Surgery())
    assert {row.target for row in result.rows} == set(SPARSE)
    used = {source for row in result.rows for source in row.sources}
    assert used | set(result.dropped) | {'opt_state/count'} == set(DENSE)
    by_target = {row.target: row for row in result.rows}
    expert = by_target['params/encoder/layers_1/mlp/expert/wi_0/kernel']
    assert (expert.action, expert.sources, expert.shape) == (Action.EXPERTS, (WI,), (4, 128, 256))
    router = by_target['params/decoder/layers_1/mlp/router/router_weights/w/kernel']
    assert (router.action, router.sources) == (Action.ROUTER, ())
    kept = by_target['params/encoder/layers_0/mlp/wi_0/kernel']
    assert (kept.action, kept.sources) == (Action.KEEP, ('params/encoder/layers_0/mlp/wi_0/kernel',))


def test_fresh_state_keeps_the_clock():
    rows = {row.target: row for row in plan_surgery(DENSE, SPARSE, Surgery()).rows}
    assert (rows['opt_state/count'].action, rows['opt_state/count'].sources) == (Action.KEEP, ('step',))
    states = [row for row in rows.values() if row.target.startswith('opt_state/param_states')]
    assert states and all(row.action is Action.ZEROS for row in states)
    anew = plan_surgery(DENSE, SPARSE, Surgery(optimizer_state=OptimizerState.FRESH_CLOCK))
    assert {row.target: row.action for row in anew.rows}['opt_state/count'] is Action.ZEROS


def test_tiled_state_follows_the_parameters():
    rows = {row.target: row for row in plan_surgery(DENSE, SPARSE, Surgery(optimizer_state='tile')).rows}
    row = rows['opt_state/param_states/encoder/layers_1/mlp/expert/wi_0/kernel/v_row']
    assert row.action is Action.TILE
    assert row.sources == ('opt_state/param_states/encoder/layers_1/mlp/wi_0/kernel/v_row',)
    assert row.shape == (4, 128)
    router = rows['opt_state/param_states/encoder/layers_1/mlp/router/router_weights/w/kernel/v']
    assert router.action is Action.ZEROS
    assert rows['opt_state/count'].sources == ('opt_state/count',)


def test_continuation_keeps_everything():
    result = plan_surgery(DENSE, DENSE, Surgery(operator=None, optimizer_state='tile'))
    assert all(row.action is Action.KEEP for row in result.rows if row.target != 'rng')
    assert set(result.dropped) == {'rng'}


def test_a_new_head_starts_afresh_and_the_old_one_is_dropped():
    """For any shape, together with its optimizer state."""
    head = 'params/decoder/logits_dense/kernel'
    other = {**DENSE, head: jax.ShapeDtypeStruct((128, 77), jnp.float32)}
    spec = Surgery(operator=None, optimizer_state='tile', new_head=True)
    result = plan_surgery(other, DENSE, spec, head=('decoder/logits_dense',))
    rows = {row.target: row for row in result.rows}
    assert (rows[head].action, rows[head].sources) == (Action.NEW, ())
    state = 'opt_state/param_states/decoder/logits_dense/kernel/v_row'
    assert rows[state].action is Action.ZEROS
    assert result.dropped[head] == result.dropped[state] == 'NEW_HEAD = True'
    rest = [row for row in result.rows if 'logits_dense' not in row.target and row.target != 'rng']
    assert len(rest) > 40 and all(row.action is Action.KEEP for row in rest)


def test_another_head_is_refused_with_the_way_out():
    other = {**DENSE, 'params/decoder/logits_dense/kernel': jax.ShapeDtypeStruct((128, 77), jnp.float32)}
    with pytest.raises(UserError, match='NEW_HEAD = True'):
        plan_surgery(other, DENSE, Surgery(operator=None, optimizer_state='fresh'), head=('decoder/logits_dense',))
    with pytest.raises(UserError, match='another architecture'):
        plan_surgery(other, DENSE, Surgery(operator=None, optimizer_state='fresh'))


def test_a_new_head_and_new_experts_at_once_are_refused():
    with pytest.raises(UserError, match='NEW_HEAD = True with an EXPERT_OPERATOR'):
        Surgery(new_head=True)


def test_a_routers_state_starts_at_zero_and_goes_on():
    balanced = leaves_of(with_moe(small_t5(), num_experts=4, balance_bias_rate=0.01))
    bias = 'params/decoder/layers_1/mlp/router_state/bias'
    assert not any('router_state' in name for name in balanced if name.startswith('opt_state'))
    rows = {row.target: row for row in plan_surgery(DENSE, balanced, Surgery(optimizer_state='tile')).rows}
    assert rows[bias].action is Action.ZEROS
    # A run that continues an MoE: the state is kept, added or dropped.
    go_on = Surgery(operator=None, optimizer_state='tile')
    rows = {row.target: row for row in plan_surgery(balanced, balanced, go_on).rows}
    assert rows[bias].action is Action.KEEP
    rows = {row.target: row for row in plan_surgery(SPARSE, balanced, go_on).rows}
    assert rows[bias].action is Action.ZEROS
    assert 'router state' in plan_surgery(balanced, SPARSE, go_on).dropped[bias]


def test_experts_of_another_width_are_drawn():
    sparse = leaves_of(with_moe(small_t5(), num_experts=4, expert_mlp_dim=24))
    result = plan_surgery(DENSE, sparse, Surgery('random'))
    wo = next(row for row in result.rows if row.target == 'params/decoder/layers_1/mlp/expert/wo/kernel')
    assert (wo.action, wo.sources, wo.shape[1]) == (Action.EXPERTS, (), 24)


def test_the_gate_of_shared_experts_starts_at_one_half():
    gated = leaves_of(with_moe(small_t5(), num_experts=4, num_shared_experts=1, shared_gate=True))
    kernel = 'params/decoder/layers_1/mlp/shared_gate/kernel'
    state = [name for name in gated if 'shared_gate' in name and name.startswith('opt_state')]
    rows = {row.target: row for row in plan_surgery(DENSE, gated, Surgery(optimizer_state='fresh')).rows}
    assert {rows[name].action for name in (kernel, *state)} == {Action.ZEROS}
    assert rows['params/decoder/layers_1/mlp/shared/wo/kernel'].action is Action.KEEP
    grown = leaves_of(with_moe(small_t5(), num_experts=8, num_shared_experts=1, shared_gate=True))
    rows = {row.target: row for row in plan_surgery(gated, grown, Surgery('grow', router_init='copied')).rows}
    assert (rows[kernel].action, rows[kernel].sources) == (Action.KEEP, (kernel,))
    average = Surgery(operator=None, dense_operator='average', optimizer_state='fresh')
    assert plan_surgery(gated, DENSE, average).dropped[kernel] == 'a dense model has no routers'


def without(leaves, *names):
    return {name: leaf for name, leaf in leaves.items() if name not in names}


def test_a_missing_source_is_named():
    with pytest.raises(UserError, match=f'expert/wi_0/kernel .* has no source: the checkpoint has no {WI}'):
        plan_surgery(without(DENSE, WI), SPARSE, Surgery())


def test_two_sources_are_named():
    both = {
        **DENSE,
        'params/encoder/layers_1/mlp/expert/wi_0/kernel': SPARSE['params/encoder/layers_1/mlp/expert/wi_0/kernel'],
    }
    with pytest.raises(UserError, match='has two sources'):
        plan_surgery(both, SPARSE, Surgery())


def test_an_unused_leaf_is_named():
    more = {**DENSE, 'params/encoder/layers_2/mlp/wi_0/kernel': DENSE[WI]}
    with pytest.raises(UserError, match='layers_2/mlp/wi_0/kernel .* of the checkpoint is not used by the model'):
        plan_surgery(more, SPARSE, Surgery())


def test_another_shape_is_named():
    with pytest.raises(UserError, match=r'needs a source of shape \(128, 256\), but .* is \(128, 512\)'):
        plan_surgery({**DENSE, WI: jax.ShapeDtypeStruct((128, 512), jnp.float32)}, SPARSE, Surgery())


def test_the_whole_difference_is_listed():
    with pytest.raises(UserError) as error:
        plan_surgery(DENSE, leaves_of(with_moe(small_t5(mlp_dim=512), num_experts=4)), Surgery())
    message = str(error.value)
    assert message.count('needs a source of shape') == 12
    assert 'another architecture' in message


def test_tile_without_state_names_the_binding():
    weights = {name: leaf for name, leaf in DENSE.items() if not name.startswith('opt_state/')}
    with pytest.raises(UserError, match="set OPTIMIZER_STATE = 'fresh'"):
        plan_surgery(weights, SPARSE, Surgery(optimizer_state='tile'))
    plan_surgery(weights, SPARSE, Surgery(optimizer_state='fresh'))


def test_a_sparse_checkpoint_is_not_upcycled_again():
    with pytest.raises(UserError):
        plan_surgery(leaves_of(with_moe(small_t5(), num_experts=8)), SPARSE, Surgery())


@pytest.mark.parametrize(
    ('settings', 'binding'),
    [
        ({'operator': 'clone'}, 'EXPERT_OPERATOR'),
        ({'router_init': 'zeros'}, 'ROUTER_INIT'),
        ({'optimizer_state': 'old'}, 'OPTIMIZER_STATE'),
    ],
)
def test_unknown_names(settings, binding):
    with pytest.raises(UserError, match=binding):
        Surgery(**settings)


def test_plan_is_pure():
    assert dataclasses.asdict(plan_surgery(DENSE, SPARSE, Surgery())) == dataclasses.asdict(
        plan_surgery(DENSE, SPARSE, Surgery())
    )
