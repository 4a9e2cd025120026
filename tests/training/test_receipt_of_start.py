"""Receipts of checkpoints that other runs start from."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.invariants.devices import processes
from tests.surgery.in_memory import leaves_of, plan_for
from tests.surgery.test_function import dense_params, model_of
from upcycle import hosts, partitioning
from upcycle.errors import UserError
from upcycle.surgery.plan import Action, Surgery
from upcycle.surgery.planning import plan_surgery
from upcycle.surgery.receipt import carried_on, make_receipt, mismatches
from upcycle.training import receipt_of_start


def shaped(shapes):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


MOE = {'params/m/expert/wi/kernel': (2, 4, 8), 'params/m/router/w/kernel': (4, 2), 'params/head/kernel': (4, 10)}


def first_receipt():
    dense = shaped({'params/m/wi/kernel': (4, 8), 'params/head/kernel': (4, 10)})
    return make_receipt(
        plan_surgery(dense, shaped(MOE), Surgery()), source={}, hashes={'params/m/wi/kernel': 'x'}, lineages={}
    )


def test_a_run_that_changes_leaves_changes_their_rows():
    """With a new head, and with state that a recipe adds, the run's receipt matches its checkpoints."""
    leaves = shaped({**MOE, 'params/head/kernel': (4, 3), 'params/m/router_state/bias': (2,)})
    paper = first_receipt()
    assert mismatches(paper, shaped(MOE)) == [] and len(mismatches(paper, leaves)) == 2
    what = plan_surgery(
        shaped(MOE), leaves, Surgery(operator=None, new_head=True, optimizer_state='tile'), head=('head',)
    )
    later = carried_on(paper, what)
    assert mismatches(later, leaves) == []
    actions = {row['target'].removeprefix('params/'): row['action'] for row in later['plan']}
    assert actions == {
        'm/expert/wi/kernel': Action.EXPERTS,
        'm/router/w/kernel': Action.ROUTER,
        'head/kernel': Action.NEW,
        'm/router_state/bias': Action.ZEROS,
    }
    assert later['sha256'] == paper['sha256']


@dataclasses.dataclass
class Checkpoint:
    """A reader of leaves in memory."""

    leaves_: dict
    metadata: dict
    path: str = 'here'

    def leaves(self):
        return self.leaves_

    def read(self, name, sharding=None, dtype=None):
        return self.leaves_[name]


def moe_checkpoint(described):
    model, batch = model_of('t5', num_experts=4)
    shapes = {
        row.target: jax.ShapeDtypeStruct(row.shape, row.dtype)
        for row in plan_for(model, dense_params('t5'), Surgery(), batch).rows
    }
    zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
    return model, Checkpoint(zeros, {'model': model.describe()} if described else {})


@pytest.mark.parametrize('operator', ['copy', 'grow', 'grow, undescribed'])
def test_the_first_load_compares_with_what_it_was_made_of(operator, monkeypatch, capsys):
    model, batch = model_of('t5', num_experts=8)
    four, source = moe_checkpoint('undescribed' not in operator)
    if operator == 'copy':
        source = Checkpoint(leaves_of(dense_params('t5')), {})
    seen = []
    monkeypatch.setattr(receipt_of_start, 'open_checkpoints', lambda path: source)
    monkeypatch.setattr(
        receipt_of_start, 'check_function', lambda *arguments: seen.append(arguments) or {'whole_model': {}}
    )
    paper = {
        'operator': operator.split(',')[0],
        'source': {'path': 'here'},
        'plan': [],
        'function_check': {'whole_model': 'pending'},
    }
    whole = partitioning.replicated(partitioning.make_mesh((1, 1, 1), None, jax.devices()[:1]))
    leaves = {'params/x': jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)}
    complete = receipt_of_start.ReceiptOfStart('there', paper).complete(model, {}, batch, leaves)
    if 'undescribed' in operator:
        assert complete['function_check']['whole_model'].startswith('not compared: the metadata of here')
        assert 'does not describe its model' in capsys.readouterr().err
        # From here on the leaves are trained, so later runs must not compare them with the surgery's.
        assert not receipt_of_start.ReceiptOfStart('there', complete).untouched
        return
    ((of, source_params, _, _, compared),) = seen
    assert of is model and complete['function_check'] == {'whole_model': {}}
    assert compared == (model.dense() if operator == 'copy' else four)
    assert leaves_of(source_params).keys() == source.leaves().keys()


def complete_without_source():
    """Returns the check of the whole model in this process's receipt. Process 1 does not find the source, as on its own disk."""
    model, batch = model_of('t5', num_experts=8)

    def find(path):
        if jax.process_index() == 1:
            raise UserError('the dense checkpoint is not on this machine.')
        return Checkpoint(leaves_of(dense_params('t5')), {})

    def compare(*arguments):
        return {'whole_model': hosts.gathered(np.zeros(1, np.float32)).tolist()}

    paper = {
        'operator': 'copy',
        'source': {'path': 'here'},
        'plan': [],
        'function_check': {'whole_model': 'pending'},
    }
    leaves = {
        'params/x': jax.ShapeDtypeStruct(
            (), jnp.float32, sharding=partitioning.replicated(partitioning.make_mesh('auto', None))
        )
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receipt_of_start, 'open_checkpoints', find)
        patch.setattr(receipt_of_start, 'check_function', compare)
        return receipt_of_start.ReceiptOfStart('there', paper).complete(model, {}, batch, leaves)['function_check'][
            'whole_model'
        ]


def test_a_source_that_one_process_does_not_find_is_compared_by_none():
    found = processes(2, 4).call(complete_without_source)
    assert found == ['not compared: the dense checkpoint is not on this machine.'] * 2


def test_a_new_head_is_not_compared(capsys):
    model, _ = model_of('t5', num_experts=4)
    paper = {**first_receipt(), 'function_check': {'whole_model': 'pending', 'layers': {'m': {}}}}
    complete = receipt_of_start.ReceiptOfStart('there', paper).complete(model, {}, {}, None, new_head=True)
    assert complete['function_check'] == {
        'whole_model': 'not compared: NEW_HEAD = True gives the model another task.',
        'layers': {'m': {}},
    }
    assert 'not compared' in capsys.readouterr().err
