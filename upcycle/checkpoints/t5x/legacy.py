"""T5X's own layout, used by its published models: a msgpack index and folders of zarr arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import msgpack
import numpy as np
from etils import epath

from upcycle import files
from upcycle.checkpoints import arrays, folder_writer, json_files, writing
from upcycle.checkpoints.t5x.layout import T5XLayout
from upcycle.checkpoints.t5x.reader import INDEX_HASH, T5XReader
from upcycle.checkpoints.t5x.tree import METADATA
from upcycle.errors import UserError

# flax.serialization's codes for an array and a NumPy scalar. Code 2, a complex number, never occurs here.
_FLAX_ARRAY_CODES = (1, 3)
# Raised while parsing a damaged index.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError)
_DAMAGE += (msgpack.UnpackException,)


class LegacyReader(T5XReader):
    """A step in T5X's own format; see `upcycle.checkpoints.Reader`."""

    format = 't5x_legacy'

    def __init__(self, path: epath.Path):
        super().__init__(path, _legacy_arrays(path))
        # Arrays inside the index have no checksums.
        expected = self.notes.get(INDEX_HASH)
        if expected is not None and hashlib.sha256((path / 'checkpoint').read_bytes()).hexdigest() != expected:
            raise files.damaged(path / 'checkpoint', 'its checksum differs')


def _legacy_arrays(folder: epath.Path) -> dict[tuple[str, ...], arrays.Source]:
    """Returns the arrays of a legacy msgpack index, with absolute specs. Never unpickles."""
    index = folder / 'checkpoint'
    files.require_file(index)
    try:
        encoded = index.read_bytes()
        if encoded.startswith(b'model_checkpoint_path'):
            raise UserError(
                f'{index} belongs to a TensorFlow checkpoint, which cannot be read: use the model in the format of T5X or '
                'Hugging Face.'
            )
        tree = msgpack.unpackb(encoded, raw=False, strict_map_key=True, ext_hook=_flax_array)
        # The first version of the format had neither a version number nor the key `optimizer`.
        version = tree.pop('version', 0)
        tree = tree['optimizer'] if version else tree
        sources: dict[tuple[str, ...], arrays.Source] = {}
        _collect(folder, tree, (), sources)
    except _DAMAGE as error:
        raise UserError(
            f'{index} is not a T5X checkpoint index, or is damaged ({error}): copy the checkpoint again.'
        ) from error
    return sources


def _collect(folder: epath.Path, node: Any, keys: tuple[str, ...], out: dict[tuple[str, ...], arrays.Source]) -> None:
    if isinstance(node, dict) and node.keys() >= {'driver', 'kvstore', 'metadata'}:
        out[keys] = _zarr(folder, node)
    elif isinstance(node, dict):
        for key, child in node.items():
            _collect(folder, child, (*keys, key), out)
    elif isinstance(node, np.ndarray | np.generic | int) and np.asarray(node).dtype.kind not in 'OSUMm':
        out[keys] = np.asarray(node)
    elif node is not None:  # None is the state of a parameter without optimizer
        raise ValueError(f'{"/".join(keys)} is a {type(node).__name__} instead of an array')


def _zarr(folder: epath.Path, spec: dict[str, Any]) -> arrays.Source:
    """Returns the spec of an array in the folder of the index. The array's own folder tells chunks and compressor."""
    # TensorStore before 0.1.14 wrote the path at the top level.
    name = (spec['kvstore'].get('path') or spec['path']).rstrip('/')
    if not json_files.is_plain_name(name):
        raise ValueError(f'it names {name!r}, which is outside its folder')
    return {
        'driver': 'zarr',
        'kvstore': arrays.kvstore(folder / name),
        'dtype': jax.numpy.dtype(spec['dtype']).name,
        # T5X writes C order; an array with another order would be read transposed.
        'metadata': {'shape': [int(size) for size in spec['metadata']['shape']], 'order': 'C'},
        # T5X stores all chunks (its fill value is null), so that a missing chunk is an error.
        'fill_missing_data_reads': False,
    }


def _flax_array(code: int, data: bytes) -> Any:
    if code not in _FLAX_ARRAY_CODES:
        raise ValueError(f'it has an unknown extension of type {code}')
    return flax.serialization.msgpack_restore(msgpack.packb(msgpack.ExtType(code, data)))


class LegacyLayout(T5XLayout):
    """The format of T5X's published models."""

    format = 't5x_legacy'
    reader = LegacyReader

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """T5X stores factored statistics, which it does not shard, in the index."""
        return keys[-1] in ('step', 'v_row', 'v_col') and keys[0] == 'state'

    def commit(self, writer: folder_writer.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """Writes the metadata, then the index."""
        nodes: dict[tuple[str, ...], Any] = {}
        for name, keys in writer.keys.items():
            leaf = writer.leaves[name]
            if name in writer.inline:
                nodes[keys] = writer.inline[name]
                continue
            # Relative to the index, so that the checkpoint can be moved.
            store = {'driver': 'file', 'path': '.'.join(keys) + '/'}
            array = self.zarr(leaf, writing.chunk_shape(name, leaf))
            nodes[keys] = {**array, 'dtype': leaf.dtype.name, 'kvstore': store}
        tree = flax.traverse_util.unflatten_dict(nodes | self.placeholders(writer))
        index = flax.serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
        notes = {**metadata, INDEX_HASH: hashlib.sha256(index).hexdigest()}
        (writer.folder / METADATA).write_text(json.dumps(notes))
        (writer.folder / 'checkpoint').write_bytes(index)
