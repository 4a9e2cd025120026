"""Experts stored as one tensor each, as in Mixtral, are written and read back exactly, one by one."""

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tests.checkpoints import trees
from upcycle.checkpoints import arrays, hf, safetensors, views, writing
from upcycle.checkpoints.hf import architecture, sources, writer
from upcycle.errors import UserError

E, D, F = 4, 6, 10
KERNEL = 'decoder/layers_0/mlp/expert/wi_0/kernel'
NAMES = tuple(f'layers.0.experts.{expert}.w1.weight' for expert in range(E))
ROUTER = 'decoder/layers_0/mlp/router/router_weights/w/kernel'


class Experts(architecture.Architecture):
    """A single MoE layer."""

    title, family, model_types = 'toy', 'toy', ('toy',)

    def holds(self, shapes):
        return KERNEL in shapes

    def config_sizes(self, shapes):
        return {'num_experts': shapes[KERNEL][0]}

    def table(self, sizes, shapes):
        return {
            KERNEL: architecture.Entry(NAMES[: sizes['num_experts']], architecture.LINEAR),
            ROUTER: architecture.Entry('layers.0.gate.weight', architecture.LINEAR),
        }

    def config(self, sizes, metadata):
        return {'model_type': 'toy', **sizes}


class Reader(arrays.ArrayReader):
    """Maps a folder's tensors by the table."""

    def __init__(self, path):
        stored, _ = safetensors.read_files(path / safetensors.SINGLE)
        table = Experts().table({'num_experts': E}, {})
        super().__init__(path, {f'params/{n}': s for n, s in sources.by_table(path, stored, table).items()})


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16])
def tree(request):
    rng = np.random.default_rng(0)
    shapes = {f'params/{KERNEL}': (E, D, F), f'params/{ROUTER}': (D, E)}
    return {name: rng.normal(size=shape).astype(request.param) for name, shape in shapes.items()}


@pytest.fixture
def written(tree, tmp_path, monkeypatch):
    """Writes a tree; returns the folder, and the shapes written to the file, one per expert."""
    monkeypatch.setattr(writing, '_SMALL_BYTES', 0)
    monkeypatch.setattr(hf, 'ARCHITECTURES', (Experts(), *hf.ARCHITECTURES))
    monkeypatch.setattr(writer, 'HuggingFaceReader', Reader)
    given = []
    write = safetensors.FilesWriter.write
    monkeypatch.setattr(
        safetensors.FilesWriter,
        'write',
        lambda self, name, x, region: given.append((name, x.shape)) or write(self, name, x, region),
    )
    writing.parts.cache_clear()
    trees.write(tmp_path / 'model', 'huggingface', tree)
    writing.parts.cache_clear()
    return epath.Path(tmp_path / 'model'), given


def test_there_and_back(tree, written):
    path, given = written
    trees.assert_same(Reader(path), tree)
    # Expert by expert: the stack is never transposed or written as a whole.
    assert given == [*((name, (F, D)) for name in NAMES), ('layers.0.gate.weight', (E, D))]
    stored, _ = safetensors.read_files(path / safetensors.SINGLE)
    for expert, name in enumerate(NAMES):
        np.testing.assert_array_equal(stored[name].read(()), tree[f'params/{KERNEL}'][expert].T)


def test_a_region_reads_its_experts_and_their_rows(tree, written, monkeypatch):
    path, _ = written
    reader, numbers = Reader(path), []
    read_into = views.read_into
    monkeypatch.setattr(views, 'read_into', lambda file, x: numbers.append(x.size) or read_into(file, x))
    name = f'params/{KERNEL}'
    assert reader.leaves()[name].shape == (E, D, F) and numbers == []
    for region, read in (
        ((slice(1, 2),), [D * F]),
        ((slice(2, 4), slice(None), slice(3, 5)), [2 * D, 2 * D]),  # rows there
        ((slice(0, 1), slice(0, 2)), [D * F]),  # a part of each row there
    ):
        numbers.clear()
        np.testing.assert_array_equal(reader.read(name, region=region), tree[name][region])
        assert numbers == read, region


def test_part_of_each_row_is_read_in_blocks(tree, written, monkeypatch):
    path, _ = written
    monkeypatch.setattr(views, 'READ_BYTES', 3 * D * tree[f'params/{KERNEL}'].itemsize)
    sizes = []
    read_into = views.read_into
    monkeypatch.setattr(views, 'read_into', lambda file, x: sizes.append(x.size) or read_into(file, x))
    part = Reader(path).read(f'params/{KERNEL}', region=(slice(3, 4), slice(2, 3)))
    np.testing.assert_array_equal(part, tree[f'params/{KERNEL}'][3:4, 2:3])
    assert sizes == [3 * D, 3 * D, 3 * D, D]


def test_an_expert_that_is_missing_or_of_another_size(tmp_path):
    folder = epath.Path(tmp_path)
    table = Experts().table({'num_experts': E}, {})
    tensors = {name: np.ones((F, D), np.float32) for name in NAMES}

    def read(tensors):
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
        files = safetensors.FilesWriter(folder, shapes)
        for name, value in tensors.items():
            files.write(name, value)
        files.finish({})
        return sources.by_table(folder, safetensors.read_files(folder / safetensors.SINGLE)[0], table)

    assert read(tensors)[KERNEL].shape == (E, D, F)
    with pytest.raises(UserError, match=f'has no {NAMES[2]}, one of 4 arrays of'):
        read({name: value for name, value in tensors.items() if name != NAMES[2]})
    with pytest.raises(UserError, match='cannot be stacked .*one shape and dtype'):
        read(tensors | {NAMES[1]: np.ones((F, D + 1), np.float32)})


def test_what_is_not_written_is_noticed(tmp_path):
    shapes = {'a': jax.ShapeDtypeStruct((2,), np.float32), 'b': jax.ShapeDtypeStruct((2,), np.float32)}
    files = safetensors.FilesWriter(epath.Path(tmp_path), shapes)
    files.write('a', np.ones(2, np.float32))
    with pytest.raises(ValueError, match="not written: .'b'."):
        files.finish({})
    files.close()
