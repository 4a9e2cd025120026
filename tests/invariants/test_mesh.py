"""Law 2: the layout never changes the maths. One training step on every mesh equals the step on one device."""

import functools

import numpy as np
import pytest

from tests.invariants import optimizers_on_eight_devices as optimizers
from tests.invariants.devices import run
from tests.invariants.on_eight_devices import CASES, meshes_of


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


@pytest.mark.parametrize(
    ('case', 'mesh'), [(case, mesh) for case in CASES for mesh in meshes_of(case) if mesh != 'one device']
)
def test_a_mesh_equals_one_device(case, mesh, folder):
    arrays = steps(case, folder)
    expected, actual = (of(arrays, case, name, 'gradient') for name in ('one device', mesh))
    assert expected.keys() == actual.keys() and len(expected) > 40
    for path, gradient in expected.items():
        # A key's bias moves all of a query's logits alike: its gradient is rounding.
        if path.endswith('key/bias'):
            continue
        scale = np.abs(gradient).max()
        assert scale > 0, path
        assert np.abs(actual[path] - gradient).max() <= 1e-5 * scale, path
    expected, actual = (of(arrays, case, name, 'metric') for name in ('one device', mesh))
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
