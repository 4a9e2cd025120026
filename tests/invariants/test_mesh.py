"""Law 2: the layout never changes the maths. One training step on every mesh equals the step on one device."""

import functools
import re

import numpy as np
import pytest

from tests.invariants import optimizers_on_eight_devices as optimizers
from tests.invariants import types_on_eight_devices as types
from tests.invariants.devices import on_devices, processes
from tests.invariants.generation_on_eight_devices import generate
from tests.invariants.on_eight_devices import ALL_AXES, CASES, loss_in_chunks, meshes_of, step
from upcycle.hlo import Program

# All on the mesh that splits everything, except those that repeat what others show.
WIDELY = dict.fromkeys(('scanned and rematerialised', 'scanned, all computed again', 'vit, top 2'), ())
# Of two processes: experts over both, and all that splits.
OF_PROCESSES = [(case, mesh) for case in ('gather', 'einsum', 'ragged') for mesh in ('1x8x1', ALL_AXES)]
OFTEN_OF_PROCESSES = [('ragged', ALL_AXES)]  # others: `test_many_hosts.py`


def often_and_exhaustive(cases, often):
    """Parameters of a test, of which those outside `often` are left to `make test-all`."""
    return [pytest.param(*case, marks=[] if case in often else pytest.mark.exhaustive) for case in cases]


@functools.cache
def on_eight(case, mesh):
    """Gradients and metrics of a case's step, by a process with eight devices."""
    return on_devices(8, step, case, mesh)


def of(arrays, kind):
    return {name.removeprefix(f'{kind}|'): value for name, value in arrays.items() if name.startswith(f'{kind}|')}


@pytest.mark.parametrize(
    ('case', 'mesh'),
    often_and_exhaustive(
        [(case, mesh) for case in CASES for mesh in meshes_of(case)],
        [(case, mesh) for case in CASES for mesh in WIDELY.get(case, (ALL_AXES,))],
    ),
)
def test_a_mesh_equals_one_device(case, mesh):
    assert_same(on_eight(case, 'one device'), on_eight(case, mesh))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    'case', ['gather', 'vit', 'llm', 'scanned, all computed again', 'llm, scanned over split parameters']
)
def test_attention_kernels_are_the_reference_on_a_mesh(case):
    assert_same(on_eight(case, 'one device'), on_devices(8, step, case, ALL_AXES, kernels=True))


@pytest.mark.exhaustive
@pytest.mark.parametrize('case', ['gather', 'einsum', 'ragged', 'llm'])
def test_widths_alone_are_split(case):
    assert_same(on_eight(case, 'one device'), on_eight(case, (1, 1, 8)))


@pytest.mark.parametrize(('case', 'mesh'), often_and_exhaustive(OF_PROCESSES, OFTEN_OF_PROCESSES))
def test_two_processes_equal_one_device(case, mesh):
    assert_same(on_eight(case, 'one device'), processes(2, 4).call(step, case, mesh)[0])


def test_a_loss_in_chunks_keeps_the_vocabulary_split():
    """A device has 65 of the 130 entries, 13 at a time in five parts."""
    text = on_devices(8, loss_in_chunks, 20)
    assert ' while(' in text and not re.search(r'\[[\d,]*\b130\b', text)
    (summed,) = Program(text).collectives().values()
    # Both gradients, float32: of the kernel 12 numbers an entry, and of the inputs 8 x 12 numbers in each part.
    gradients = 4 * (65 * 12 + 5 * 8 * 12)
    assert gradients <= summed.operand_bytes < 1.5 * gradients


# Rows that divide among the devices, and rows that do not, as `upcycle generate` has them.
@pytest.mark.parametrize(('shape', 'rows'), [((2, 2, 2), 4), ((1, 1, 8), 3)])
def test_a_mesh_generates_what_one_device_does(shape, rows):
    (tokens, scores), (expected, expected_scores) = (on_devices(8, generate, s, rows) for s in (shape, (1, 1, 1)))
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-4)


def assert_same(whole, split):
    """Loss, every leaf of the gradient, and metrics: of one device in `whole`, of a mesh in `split`."""
    expected, actual = of(whole, 'gradient'), of(split, 'gradient')
    assert expected.keys() == actual.keys() and len(expected) > 20
    for path, gradient in expected.items():
        # A key's bias moves all of a query's logits alike: its gradient is rounding.
        if path.endswith('key/bias'):
            continue
        scale = np.abs(gradient).max()
        assert scale > 0, path
        assert np.abs(actual[path] - gradient).max() <= 1e-5 * scale, path
    expected, actual = of(whole, 'metric'), of(split, 'metric')
    assert {'loss', 'gradient_norm', 'experts/auxiliary_loss', 'experts/fraction_dropped'} <= expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


def test_einsum_equals_gather():
    gather, einsum = (of(on_eight(case, 'one device'), 'gradient') for case in ('gather', 'einsum'))
    for path, gradient in gather.items():
        assert np.abs(einsum[path] - gradient).max() <= 1e-5 * np.abs(gradient).max(), path


LAYOUTS = [(mesh, over_data) for mesh in optimizers.MESHES for over_data in (False, True)][1:]


@functools.cache
def updated(name, mesh, over_data):
    return on_devices(8, optimizers.update, name, mesh, over_data)


@pytest.mark.parametrize('name', optimizers.OPTIMIZERS)
@pytest.mark.parametrize(('mesh', 'over_data'), often_and_exhaustive(LAYOUTS, [(ALL_AXES, True)]))
def test_an_update_on_a_mesh_equals_that_on_one_device(name, mesh, over_data):
    """Of one gradient, at sizes that Adafactor factors: means over split axes, clipping, norms over all leaves."""
    expected, actual = updated(name, 'one device', False), updated(name, mesh, over_data)
    assert ('state/param_states/expert/wi/kernel/v_row' in expected) == name.startswith('adafactor')
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=1e-5, atol=1e-7, err_msg=path)


@functools.cache
def low_precision(kind, router, mesh):
    """Of one layer: its output, gradients and metrics, by types, router and mesh."""
    return on_devices(8, types.layer, kind, router, mesh)


@pytest.mark.parametrize('router', types.ROUTERS)
@pytest.mark.parametrize('kind', types.TYPES)
@pytest.mark.parametrize('mesh', often_and_exhaustive([(mesh,) for mesh in list(types.MESHES)[1:]], [(ALL_AXES,)]))
def test_bfloat16_on_a_mesh_is_that_of_one_device_to_its_rounding(kind, router, mesh):
    """Routing is of float32: the same choices everywhere. What is rounded is rounded elsewhere, by at most some 2 ** -8."""
    expected, actual = low_precision(kind, router, 'one device'), low_precision(kind, router, mesh)
    assert actual.keys() == expected.keys() and len(expected) > 8
    crosses = types.MESHES[mesh][1] > 1
    gaps = {
        path: np.abs(actual[path] - leaf).max() / np.abs(leaf).max() for path, leaf in expected.items() if leaf.any()
    }
    for path, gap in gaps.items():
        exact = path.startswith('metric') or (kind == 'over the network' and not crosses)
        assert gap <= (1e-5 if exact else 2**-6), (path, gap)
    if kind == 'over the network' and crosses:
        assert gaps['output'] > 1e-4
