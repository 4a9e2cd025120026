"""Several of our leaves in one tensor, as joined projections and fused experts, are written and read back by their regions."""

import jax
import numpy as np
import pytest
from etils import epath

from tests.checkpoints import trees
from upcycle.checkpoints import arrays, hf, safetensors, views, writing
from upcycle.checkpoints.hf import architecture, sources, writer
from upcycle.errors import UserError

E, D, F = 3, 6, 10
Q, KV = 8, 4
GATE, UP = (f'decoder/layers_0/mlp/expert/{matrix}/kernel' for matrix in ('wi_0', 'wi_1'))
QUERY, KEY, VALUE = (f'decoder/layers_0/self_attention/{part}/kernel' for part in ('query', 'key', 'value'))
FUSED, JOINED = 'input_linear.weight', 'qkv_proj.weight'


class Joined(architecture.Architecture):
    """One tensor of query, key and value, and one of gate and up of all experts."""

    title, family, model_types = 'toy', 'toy', ('toy',)

    def holds(self, shapes):
        return GATE in shapes

    def config_sizes(self, shapes):
        return {}

    def table(self, sizes, shapes):
        def entry(name, shape, rows, experts=(None,)):
            parts = tuple(architecture.Part(shape, rows, e) for e in experts)
            return architecture.Entry((name,) * E if len(parts) > 1 else name, architecture.LINEAR, parts)

        attention = {QUERY: (0, Q), KEY: (Q, Q + KV), VALUE: (Q + KV, Q + 2 * KV)}
        experts = {GATE: (0, F), UP: (F, 2 * F)}
        return {
            **{name: entry(JOINED, (Q + 2 * KV, D), rows) for name, rows in attention.items()},
            **{name: entry(FUSED, (E, 2 * F, D), rows, range(E)) for name, rows in experts.items()},
        }

    def config(self, sizes, metadata):
        return {'model_type': 'toy'}


def _mapped(path):
    stored, _ = safetensors.read_files(path / safetensors.SINGLE)
    return sources.by_table(path, stored, Joined().table({}, {}))


class Reader(arrays.ArrayReader):
    """Maps a folder's tensors by the table."""

    def __init__(self, path):
        super().__init__(path, {f'params/{name}': source for name, source in _mapped(path).items()})


@pytest.fixture
def tree():
    rng = np.random.default_rng(0)
    shapes = {GATE: (E, D, F), UP: (E, D, F), QUERY: (D, Q), KEY: (D, KV), VALUE: (D, KV)}
    return {f'params/{name}': rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setattr(hf, 'ARCHITECTURES', (Joined(), *hf.ARCHITECTURES))
    monkeypatch.setattr(writer, 'HuggingFaceReader', Reader)


@pytest.mark.parametrize('by_expert', [True, False])
def test_there_and_back(tree, toy, tmp_path, monkeypatch, by_expert):
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0 if by_expert else 1 << 20)
    largest, write = [0], safetensors.FilesWriter.write
    monkeypatch.setattr(safetensors.FilesWriter, 'write', lambda self, *a: largest.append(a[1].size) or write(self, *a))
    writing.parts.cache_clear()
    trees.write(tmp_path / 'model', 'huggingface', tree)
    writing.parts.cache_clear()
    assert max(largest) == D * F  # expert by expert: the tensor is never in memory
    path = epath.Path(tmp_path / 'model')
    trees.assert_same(Reader(path), tree)
    ours = {name.removeprefix('params/'): value for name, value in tree.items()}
    stored, _ = safetensors.read_files(path / safetensors.SINGLE)
    assert stored.keys() == {FUSED, JOINED}
    np.testing.assert_array_equal(
        stored[FUSED].read(()), np.concatenate([ours[GATE].swapaxes(1, 2), ours[UP].swapaxes(1, 2)], axis=1)
    )
    np.testing.assert_array_equal(
        stored[JOINED].read(()), np.concatenate([ours[part].T for part in (QUERY, KEY, VALUE)])
    )


def test_one_expert_reads_its_rows(tree, toy, tmp_path, monkeypatch):
    trees.write(tmp_path / 'model', 'huggingface', tree)
    reader, numbers, read_into = Reader(epath.Path(tmp_path / 'model')), [], views.read_into
    monkeypatch.setattr(views, 'read_into', lambda file, x: numbers.append(x.size) or read_into(file, x))
    for name in (f'params/{GATE}', f'params/{UP}'):
        np.testing.assert_array_equal(reader.read(name, region=(slice(1, 2),)), tree[name][1:2])
    assert numbers == [D * F, D * F]


@pytest.mark.parametrize('shape', [(E, 2 * F + 1, D), (2 * F, D), (0, 2 * F, D), ()])
def test_a_tensor_of_another_shape(tmp_path, shape):
    folder = epath.Path(tmp_path)
    files = safetensors.FilesWriter(folder, {FUSED: jax.ShapeDtypeStruct(shape, np.float32)})
    files.write(FUSED, np.zeros(shape, np.float32))
    files.finish({})
    with pytest.raises(UserError, match=rf'{FUSED} of .* has the wrong shape'):
        _mapped(folder)


def test_leaves_of_one_tensor_have_one_type(tree, toy, tmp_path):
    tree[f'params/{KEY}'] = tree[f'params/{KEY}'].astype(np.float16)
    with pytest.raises(UserError, match=f'{KEY} is float16.* {JOINED} are float32: give them one type with --dtype'):
        trees.write(tmp_path / 'model', 'huggingface', tree)
    assert not (tmp_path / 'model').exists()


def test_a_region_that_is_not_written_is_noticed(tmp_path):
    files = safetensors.FilesWriter(epath.Path(tmp_path), {'a': jax.ShapeDtypeStruct((2, 3, 4), np.float32)})
    files.write('a', np.zeros((1, 2, 4), np.float32), (slice(1, 2), slice(0, 2)))
    with pytest.raises(ValueError, match="not written: .'a'."):
        files.finish({})
    files.close()
