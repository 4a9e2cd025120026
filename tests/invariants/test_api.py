"""The Python API on eight devices: the same numbers as on one, each device with its part."""

import numpy as np
import pytest

from tests.checkpoints import trees
from tests.invariants import api_on_devices
from tests.invariants.devices import processes

SHAPES = [(2, 4, 1), pytest.param((2, 2, 2), marks=pytest.mark.exhaustive)]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    tree = trees.t5(False, state=False)
    return trees.write(tmp_path_factory.mktemp('api') / 'dense', 't5x_legacy', tree)


@pytest.mark.parametrize('shape', SHAPES)
def test_load_and_upcycle(shape, checkpoint):
    one = api_on_devices.ours(checkpoint, None)
    (many,) = processes(1, 8).call(api_on_devices.ours, checkpoint, shape)
    for kind in ('dense', 'sparse'):
        assert many[kind].keys() == one[kind].keys()
        for name, leaf in one[kind].items():
            np.testing.assert_array_equal(many[kind][name], leaf, name)
    # Rounding: another order of the hidden units of MLPs, on one device, moves logits by up to 5.3e-6 of the largest; the
    # 'model' axis also reorders heads and the vocabulary, and moves one of 1280 by 1.1e-5.
    np.testing.assert_allclose(many['logits'], one['logits'], atol=2e-5 * np.abs(one['logits']).max())
    assert many['parts'] == 1 / (shape[1] * shape[2])


@pytest.mark.parametrize('axes', ['EDF', 'DEF'])
def test_a_model_that_is_not_ours(axes):
    one = api_on_devices.foreign(None, axes)
    (many,) = processes(1, 8).call(api_on_devices.foreign, (2, 4), axes)
    for name, leaf in one['made'].items():
        np.testing.assert_array_equal(many['made'][name], leaf, name)
    assert many['specs']['mlp/experts/wo'] == ('expert', None, 'data')
    assert many['specs']['mlp/experts/wi'] == tuple({'E': 'expert', 'D': None, 'F': 'data'}[axis] for axis in axes)
    assert set(many['specs']['norm/scale']) <= {None}
