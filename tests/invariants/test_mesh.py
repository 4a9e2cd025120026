"""Law 2: the layout never changes the maths. One training step on every mesh equals the step on one device."""

import functools

import numpy as np
import pytest

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
