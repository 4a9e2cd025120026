"""Dropless layers whose experts are on other devices: each exchange gives what one device gives, except for what overflows."""

import functools

import numpy as np
import pytest

from tests.invariants.devices import on_devices
from tests.moe.exchanges_on_eight_devices import B, E, L, layer
from upcycle.errors import UserError
from upcycle.moe.config import MoEConfig

EXCHANGES = ['ring', 'all_to_all', 'ragged_all_to_all']


@functools.cache
def on_eight(exchange, mesh, factor=8.0, **options):
    return on_devices(8, layer, exchange, mesh, factor, **options)


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert np.abs(actual[path] - leaf).max() <= 1e-5 * max(np.abs(leaf).max(), 1e-3), path


# Of the ring: `tests/invariants/test_mesh.py`, too.
@pytest.mark.parametrize('exchange', [pytest.param('ring', marks=pytest.mark.exhaustive), *EXCHANGES[1:]])
def test_an_exchange_equals_one_device(exchange):
    """Also with a skewed load, and parameters that are split over `data`."""
    whole = on_eight('ring', (1, 1, 1), skewed=True)
    assert 0.4 < whole['load'][0] < 0.6
    assert_same(on_eight(exchange, (2, 2, 2), skewed=True, over_data=True), whole)


@pytest.mark.exhaustive
@pytest.mark.parametrize('over_data', [False, True])
@pytest.mark.parametrize('mesh', [(1, 8, 1), (2, 4, 1), (8, 1, 1)])
@pytest.mark.parametrize('exchange', EXCHANGES)
def test_an_exchange_equals_one_device_on_other_meshes(exchange, mesh, over_data):
    assert_same(on_eight(exchange, mesh, over_data=over_data), on_eight('ring', (1, 1, 1)))


@pytest.mark.exhaustive
@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 2, 2), (1, 1, 8), (2, 4, 1)])
@pytest.mark.parametrize('exchange', ['ring', 'all_to_all'])
def test_kernels_of_tpus_equal_those_of_cpus_on_a_mesh(exchange, mesh):
    assert_same(on_eight(exchange, mesh, kernel=True), on_eight('ring', (1, 1, 1)))


@pytest.mark.parametrize('exchange', EXCHANGES[1:])
def test_what_overflows_is_dropped_and_counted(exchange):
    """With half of the choices on one of eight devices, and room for an even share each."""
    mesh = (1, 8, 1)
    whole, cut = on_eight('ring', mesh, skewed=True), on_eight(exchange, mesh, 1.0, skewed=True)
    changed_BxL = np.abs(cut['output'] - whole['output']).max(axis=-1) > 1e-5
    choices = 2 * (B * L - 3)
    dropped = cut['dropped'] * choices
    assert whole['dropped'] == 0 and abs(dropped - round(float(dropped))) < 1e-3
    # Each token that changed lost one of its two choices, or both.
    assert changed_BxL.sum() <= round(float(dropped)) <= 2 * changed_BxL.sum()
    # A device has 32 choices, or the 26 of its real tokens, and room for 4 from each device.
    counts_E = whole['load'] * choices
    assert round(float(dropped)) >= counts_E.max() - 32 > 0
    assert not cut['output'][3, L - 3 :].any()


def test_one_buffer_overflows_later_than_one_for_each_pair():
    mesh = (1, 8, 1)
    of_pairs, one = (on_eight(exchange, mesh, 1.0, skewed=True)['dropped'] for exchange in EXCHANGES[1:])
    assert 0 < one < of_pairs


@pytest.mark.exhaustive
@pytest.mark.parametrize('exchange', EXCHANGES[1:])
def test_what_overflows_does_not_depend_on_later_tokens(exchange):
    mesh, position = (1, 8, 1), 3
    cut = on_eight(exchange, mesh, 1.0, skewed=True)
    other = on_eight(exchange, mesh, 1.0, skewed=True, changed_from=position)
    np.testing.assert_array_equal(other['output'][-1, :position], cut['output'][-1, :position])
    assert (other['output'][-1, position:] != cut['output'][-1, position:]).any()


def test_slots_have_no_exchange():
    with pytest.raises(UserError, match="EXPERT_EXCHANGE = 'all_to_all' is for DISPATCH = 'ragged'"):
        MoEConfig(E, router='top_k', exchange='all_to_all')
