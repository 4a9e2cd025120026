"""The first load of a checkpoint, by one process or several: one state, one receipt, and the memory of the state and a leaf."""

import jax
import numpy as np
import pytest

from tests import runs
from tests.checkpoints import trees
from tests.invariants import first_load
from tests.invariants.devices import processes
from upcycle import conversion, transfer
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.arrays import ArrayReader
from upcycle.errors import UserError
from upcycle.training import first_state, receipt_of_start

# Layers enough that all their MLPs are larger than one leaf of experts, and sequences so short that activations are small.
SIZES = {'EMBED_DIM': 64, 'MLP_DIM': 256, 'NUM_ENCODER_LAYERS': 2, 'NUM_DECODER_LAYERS': 2}
RUN = {
    **SIZES,
    'NUM_EXPERTS': 4,
    'BATCH_SIZE': 8,
    'GROUPS_MULTIPLE_OF': 8,
    'TASK_FEATURE_LENGTHS': "{'inputs': 8, 'targets': 5}",
}
CONTINUE = (runs.TINY, 'moe/t5.gin', runs.TASK, 'runs/continue_dense.gin')
ONE, EIGHT, FOUR = (1, 1), (1, 8), (4, 2)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Paths of checkpoints by what they are; they are made when they are asked for."""
    return Checkpoints(tmp_path_factory.mktemp('checkpoints'))


class Checkpoints:
    def __init__(self, folder):
        self._folder = folder

    def __getitem__(self, kind):
        path = self._folder / kind
        if not path.exists():
            self._make(kind, str(path))
        return str(path)

    def _make(self, kind, path):
        if kind in ('dense', 'other'):
            first_load.save_dense(path, seed=len(kind), **SIZES)
        elif kind == 'converted':
            more = {name: value for name, value in RUN.items() if name != 'GROUPS_MULTIPLE_OF'}
            run = runs.build('upcycle', 'unused', 10, **more, INITIAL_CHECKPOINT_PATH=self['dense'])
            conversion.convert(run, path, 'upcycle')
        elif kind == 'imported':
            transfer.transfer(self['dense'], f'{path}_t5x', 't5x_legacy', optimizer_state='none')
            transfer.transfer(f'{path}_t5x', path, 'upcycle')


def settings(case, checkpoints, mesh):
    """Gin files and bindings of a case."""
    files, start, more = runs.FILES['upcycle'], 'dense', {}
    if case in ('converted', 'imported'):
        start = case
        files = CONTINUE if case == 'converted' else files
    elif case == 'hidden':
        more = {'ROUTER_INIT': 'hidden'}
    elif case != 'copy':
        more = {'EXPERT_OPERATOR': case}
    path = checkpoints[start]
    if case == 'branches':
        path = f'({path!r}, {checkpoints["other"]!r})'
    elif case == 'drop':
        more['OPTIMIZER_STATE'] = 'tile'
    bindings = runs.bindings('upcycle', 'unused', 10, **RUN, **more, MESH_SHAPE=mesh, INITIAL_CHECKPOINT_PATH=path)
    return files, bindings


_FOUND = {}


def loaded(case, checkpoints, layout, mesh):
    """What `first_load.load` returns in each process."""
    key = case, layout, mesh
    if key not in _FOUND:
        arguments = settings(case, checkpoints, mesh)
        _FOUND[key] = (
            [first_load.load(*arguments)] if layout == ONE else processes(*layout).call(first_load.load, *arguments)
        )
    return _FOUND[key]


OFTEN = [('converted', FOUR, (2, 2, 2))]
SELDOM = [
    (case, layout, mesh)
    for case in ('copy', 'drop', 'noise', 'random', 'branches', 'hidden', 'converted', 'imported')
    for layout, mesh in [
        (EIGHT, (1, 1, 8)),
        (EIGHT, (2, 4, 1)),
        (FOUR, (2, 2, 2)),
        (FOUR, (1, 2, 4)),
        (FOUR, (1, 1, 8)),
    ]
    if (case, layout, mesh) not in OFTEN
]
CASES = [*OFTEN, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in SELDOM)]


@pytest.mark.parametrize(('case', 'layout', 'mesh'), CASES)
def test_the_same_state_and_receipt(case, layout, mesh, checkpoints):
    (expected,) = loaded(case, checkpoints, ONE, (1, 1, 1))
    assert isinstance(expected['receipt']['function_check']['whole_model'], dict)
    for found in loaded(case, checkpoints, layout, mesh):
        for name, shards in found['shards'].items():
            ((_, whole),) = expected['shards'][name]
            dtype, shape = expected['types'][name]
            leaf = np.frombuffer(whole, np.dtype(dtype)).reshape(shape)
            for where, part in shards:
                own = leaf[tuple(slice(*axis) for axis in where)]
                if case == 'hidden' and '/router/' in name:  # activations are sums in another order
                    np.testing.assert_allclose(np.frombuffer(part, own.dtype).reshape(own.shape), own, atol=1e-5)
                else:
                    assert part == own.tobytes(), (name, where)
        receipt, check = dict(found['receipt']), dict(found['receipt']['function_check'])
        assert check.keys() == expected['receipt']['function_check'].keys()
        for part in ('whole_model', 'layers'):
            _assert_close(check[part], expected['receipt']['function_check'][part])
        assert receipt | {'function_check': None} == expected['receipt'] | {'function_check': None}
        assert receipt['sha256'] and all(len(digest) == 64 for digest in receipt['sha256'].values())


def _assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            _assert_close(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(('case', 'layout', 'mesh'), CASES)
def test_memory(case, layout, mesh, checkpoints):
    """At no leaf, and not in the function check, does a device hold more than its part and one leaf."""
    for found in loaded(case, checkpoints, layout, mesh):
        assert len(found['extra']) == layout[1]
        for device, extra in found['extra'].items():
            assert extra <= found['leaf'], (device, extra, found['leaf'])


def test_one_device_holds_one_layer_of_the_source(checkpoints):
    """Where nothing is split, the dense MLPs that were upcycled would be more than a leaf together."""
    (found,) = loaded('drop', checkpoints, ONE, (1, 1, 1))
    assert found['extra'][0] <= found['leaf']


def refusal(files, bindings, unreadable=None):
    """Why a load is refused, in this process; one of them cannot read a leaf."""
    read = ArrayReader.read

    def broken(reader, name, *arguments, **named):
        if name == unreadable and jax.process_index() == 1:
            raise UserError(f'{name} cannot be read here')
        return read(reader, name, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArrayReader, 'read', broken)
        try:
            first_load.load(files, bindings)
        except UserError as error:
            return str(error)
    return None


@pytest.mark.parametrize('case', ['upcycle', 'continue'])
def test_every_process_refuses_numbers_that_one_of_them_holds(case, checkpoints, tmp_path):
    """NaN in one shard: the same sentence in all, with the same count, as by one process."""
    reader = open_checkpoint(checkpoints['dense'])
    tree = {name: reader.read(name) for name in reader.leaves()}
    kernel = tree['params/encoder/layers_1/mlp/wo/kernel']
    kernel[-1, :3] = np.nan
    path = trees.write(tmp_path / 'broken', 'upcycle', tree, dict(reader.metadata))
    files, bindings = settings('copy', checkpoints, (1, 1, 8))
    if case == 'continue':
        files = runs.FILES['continue']
        bindings = {
            name: value for name, value in bindings.items() if name not in ('NUM_EXPERTS', 'GROUPS_MULTIPLE_OF')
        }
    bindings |= {'INITIAL_CHECKPOINT_PATH': path}
    found = processes(*FOUR).call(refusal, files, bindings)
    assert set(found) == {refusal(files, bindings | {'MESH_SHAPE': '(1, 1, 1)'})}
    assert 'params/encoder/layers_1/mlp/wo/kernel' in found[0] and 'holds 3 numbers that are NaN' in found[0]


@pytest.mark.parametrize('leaf', ['params/encoder/layers_0/mlp/wo/kernel', 'params/encoder/layers_1/mlp/wo/kernel'])
def test_every_process_refuses_what_one_of_them_cannot_read(leaf, checkpoints):
    found = processes(*FOUR).call(refusal, *settings('copy', checkpoints, (2, 2, 2)), unreadable=leaf)
    assert found == [f'{leaf} cannot be read here'] * 4


@pytest.mark.parametrize('error', [MemoryError('no room'), jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: no room')])
@pytest.mark.parametrize('case', ['copy', 'converted'])
def test_a_check_that_fails_ends_no_run(case, error, checkpoints, monkeypatch, capsys):

    def fail(*_):
        raise error

    for module in (first_state, receipt_of_start):
        monkeypatch.setattr(module, 'check_function', fail)
    found = first_load.load(*settings(case, checkpoints, (1, 1, 1)))
    assert found['receipt']['function_check']['whole_model'] == f'not compared: {error}'
    assert 'no room' in capsys.readouterr().err
