"""A function in pieces has the results of the whole, and frees its parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from upcycle import streamed as module
from upcycle.streamed import Unread, streamed

LAYERS, WIDTH = 4, 8


def numbers():
    rng = np.random.default_rng(0)
    layers = {f'layer_{i}': {'w': rng.normal(size=(WIDTH, WIDTH)), 'b': rng.normal(size=WIDTH)} for i in range(LAYERS)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), layers | {'unused': {'w': np.zeros(999)}})


def network(params, x):
    seen = {}
    for i in range(LAYERS):
        layer = params[f'layer_{i}']
        seen[f'{i}'] = (x, i)
        x = jax.nn.gelu(x @ layer['w'] + layer['b'])
    # One parameter is needed again at the end.
    return {**seen, 'sum': jnp.sum(x @ params['layer_0']['w'])}


class Disk:
    """Parameters that are read on demand."""

    def __init__(self, params):
        self.read, self.most = [], 0
        self.tree = jax.tree_util.tree_map_with_path(self._unread, params)
        self._here = []

    def _unread(self, path, leaf):
        numbers = np.asarray(leaf)

        def read():
            self.read.append(f'{path[0].key}/{path[1].key}')
            array = jnp.array(numbers)
            self._here = [(ref, size) for ref, size in self._here if ref() is not None]
            self._here.append((_Reference(array), numbers.nbytes))
            self.most = max(self.most, sum(size for _, size in self._here))
            return array

        return Unread(leaf.shape, leaf.dtype, read)


class _Reference:
    """Whether the memory of an array is still allocated."""

    def __init__(self, array):
        self._pointer = array.unsafe_buffer_pointer()

    def __call__(self):
        live = {array.unsafe_buffer_pointer() for array in jax.live_arrays()}
        return self if self._pointer in live else None


def test_the_results_of_the_whole_function_as_soon_as_they_are_known():
    x, disk = jnp.ones((2, WIDTH)), Disk(numbers())
    expected = jax.jit(network)(numbers(), x)
    found, read = {}, {}
    for name, value in streamed(network, disk.tree, x):
        found[name], read[name] = value, len(disk.read)
    assert list(found) == ['0', '1', '2', '3', 'sum']
    for name in expected:
        for one, other in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
    # The input of the second layer needs no parameter beyond the first layer.
    assert disk.read[: read['1']] == ['layer_0/w', 'layer_0/b']
    assert 'unused/w' not in disk.read and disk.read.count('layer_0/w') == 2


def test_one_parameter_at_a_time():
    disk = Disk({name: layer for name, layer in numbers().items() if name != 'unused'})
    for _ in streamed(network, disk.tree, jnp.ones((2, WIDTH))):
        pass
    assert disk.most <= 4 * WIDTH * WIDTH


def test_equal_pieces_are_compiled_once(monkeypatch):
    compiled = []
    compile_ = jax.stages.Lowered.compile
    monkeypatch.setattr(jax.stages.Lowered, 'compile', lambda self: compiled.append(self.as_text()) or compile_(self))
    dict(streamed(network, Disk(numbers()).tree, jnp.ones((2, WIDTH))))
    assert len(compiled) == len(set(compiled)) <= 5


@pytest.mark.parametrize('unread', [False, True])
def test_what_is_known_is_not_cut(unread, monkeypatch):
    pieces = []
    run = module._run
    monkeypatch.setattr(module, '_run', lambda piece, *rest: pieces.append(piece) or run(piece, *rest))
    params = numbers()
    if unread:
        params['layer_2']['w'] = Disk({'layer_2': {'w': params['layer_2']['w']}}).tree['layer_2']['w']
    found = dict(streamed(network, params, jnp.ones((2, WIDTH))))
    assert len(pieces) == 1 and found.keys() == {'0', '1', '2', '3', 'sum'}


def test_a_failure_to_read_is_the_callers():
    def read():
        raise OSError('gone')

    params = numbers()
    params['layer_1']['w'] = Unread((WIDTH, WIDTH), jnp.float32, read)
    with pytest.raises(OSError, match='gone'):
        dict(streamed(network, params, jnp.ones((2, WIDTH))))
