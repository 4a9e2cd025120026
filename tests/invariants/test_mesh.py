"""Law 2: the layout never changes the maths. One training step on every mesh equals the step on one device."""

import functools

import numpy as np
import pytest

from tests.invariants import optimizers_on_eight_devices as optimizers
from tests.invariants import types_on_eight_devices as types
from tests.invariants.devices import free_port, run, run_together
from tests.invariants.on_eight_devices import CASES, MESHES_OF_PROCESSES, meshes_of


@functools.cache
def steps(case, folder):
    """Gradients and metrics of a case on every mesh, made by a process with eight devices."""
    out = folder / f'{case}.npz'
    run(['-m', 'tests.invariants.on_eight_devices', str(out), case], devices=8)
    return dict(np.load(out))


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('steps')


def of(arrays, case, mesh, kind):
    prefix = f'{case}|{mesh}|{kind}|'
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


@functools.cache
def steps_of_processes(case, folder):
    """The same, made by two processes with four devices each."""
    out = folder / f'{case}, two processes.npz'
    where = f'localhost:{free_port()}'
    program = ['-m', 'tests.invariants.on_eight_devices', str(out)]
    run_together([[*program, f'--process={where},{i}', case] for i in range(2)], devices=4)
    return dict(np.load(out))


@pytest.mark.parametrize(
    ('case', 'mesh'), [(case, mesh) for case in CASES for mesh in meshes_of(case) if mesh != 'one device']
)
def test_a_mesh_equals_one_device(case, mesh, folder):
    assert_same(case, mesh, steps(case, folder), steps(case, folder))


@pytest.mark.parametrize('mesh', MESHES_OF_PROCESSES)
@pytest.mark.parametrize('case', ['gather', 'einsum', 'ragged'])
def test_two_processes_equal_one_device(case, mesh, folder):
    assert_same(case, mesh, steps(case, folder), steps_of_processes(case, folder))


def assert_same(case, mesh, whole, split):
    """Loss, every leaf of the gradient, and metrics: of one device in `whole`, of a mesh in `split`."""
    expected, actual = of(whole, case, 'one device', 'gradient'), of(split, case, mesh, 'gradient')
    assert expected.keys() == actual.keys() and len(expected) > 40
    for path, gradient in expected.items():
        # A key's bias moves all of a query's logits alike: its gradient is rounding.
        if path.endswith('key/bias'):
            continue
        scale = np.abs(gradient).max()
        assert scale > 0, path
        assert np.abs(actual[path] - gradient).max() <= 1e-5 * scale, path
    expected, actual = of(whole, case, 'one device', 'metric'), of(split, case, mesh, 'metric')
    assert {'loss', 'gradient_norm', 'experts/auxiliary_loss', 'experts/fraction_dropped'} <= expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_einsum_equals_gather(folder):
    gather, einsum = (of(steps(case, folder), case, 'one device', 'gradient') for case in ('gather', 'einsum'))
    for path, gradient in gather.items():
        assert np.abs(einsum[path] - gradient).max() <= 1e-5 * np.abs(gradient).max(), path


@pytest.fixture(scope='module')
def updates(folder):
    """Parameters and state after updates by every optimizer, by optimizer, mesh, and whether parameters are split over data."""
    out = folder / 'optimizers.npz'
    run(['-m', 'tests.invariants.optimizers_on_eight_devices', str(out)], devices=8)
    found = {}
    for name, array in np.load(out).items():
        *which, path = name.split('|')
        found.setdefault(tuple(which), {})[path] = array
    return found


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
def test_an_update_on_a_mesh_equals_that_on_one_device(name, updates):
    """Of one gradient, at sizes that Adafactor factors: means over split axes, clipping, norms over all leaves."""
    expected = updates[name, 'one device', 'False']
    assert ('state/param_states/expert/wi/kernel/v_row' in expected) == name.startswith('adafactor')
    others = [key for key in updates if key[0] == name and key[1:] != ('one device', 'False')]
    assert len(others) == 7
    for key in others:
        assert updates[key].keys() == expected.keys()
        for path, leaf in expected.items():
            np.testing.assert_allclose(updates[key][path], leaf, rtol=1e-5, atol=1e-7, err_msg=f'{key} {path}')


@pytest.fixture(scope='module')
def low_precision(folder):
    """Of one layer: its output, gradients and metrics, by types, router and mesh."""
    out = folder / 'types.npz'
    run(['-m', 'tests.invariants.types_on_eight_devices', str(out)], devices=8)
    found = {}
    for name, array in np.load(out).items():
        *which, path = name.split('|')
        found.setdefault(tuple(which), {})[path] = array
    return found


@pytest.mark.parametrize('router', types.ROUTERS)
@pytest.mark.parametrize('kind', types.TYPES)
def test_bfloat16_on_a_mesh_is_that_of_one_device_to_its_rounding(kind, router, low_precision):
    """Routing is of float32: the same choices everywhere. What is rounded is rounded elsewhere, by at most some 2 ** -8."""
    expected = low_precision[kind, router, 'one device']
    for mesh in types.MESHES:
        actual = low_precision[kind, router, mesh]
        assert actual.keys() == expected.keys() and len(expected) > 8
        crosses = types.MESHES[mesh][1] > 1
        gaps = {
            path: np.abs(actual[path] - leaf).max() / np.abs(leaf).max()
            for path, leaf in expected.items()
            if leaf.any()
        }
        for path, gap in gaps.items():
            exact = path.startswith('metric') or (kind == 'over the network' and not crosses)
            assert gap <= (1e-5 if exact else 2**-6), (mesh, path, gap)
        if kind == 'over the network' and crosses:
            assert gaps['output'] > 1e-4, mesh
