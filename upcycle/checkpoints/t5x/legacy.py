"""T5X's own layout, that of its published models: a msgpack index and folders of zarr arrays."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import msgpack
import numpy as np
from etils import epath

from upcycle.checkpoints import arrays, folder_writer, json_files, writing
from upcycle.checkpoints.t5x.layout import T5XLayout
from upcycle.checkpoints.t5x.reader import INDEX_HASH, T5XReader
from upcycle.checkpoints.t5x.tree import METADATA
from upcycle.errors import UserError

# flax.serialization's codes for an array and a numpy scalar. Its third, for complex numbers, never occurs here.
_FLAX_ARRAY_CODES = (1, 3)


class LegacyReader(T5XReader):
    """A step in T5X's own format, that of its published models; see `upcycle.checkpoints.Reader`."""

    format = 't5x_legacy'

    def __init__(self, path: epath.Path):
        super().__init__(path, _legacy_arrays(path))
        # Arrays within the index have no checksum.
        expected = self.notes.get(INDEX_HASH)
        if expected is not None and hashlib.sha256((path / 'checkpoint').read_bytes()).hexdigest() != expected:
            raise UserError(f'{path / "checkpoint"} is damaged: it is not the file that was written. Copy it again.')


def _legacy_arrays(folder: epath.Path) -> dict[tuple[str, ...], arrays.Source]:
    """What a legacy checkpoint's msgpack index holds, specs made absolute. Nothing in it is ever unpickled."""
    index = folder / 'checkpoint'
    try:
        encoded = index.read_bytes()
        if encoded.startswith(b'model_checkpoint_path'):
            raise UserError(
                f'{index} is of a TensorFlow checkpoint, which is not read: take the model in the format of T5X or of '
                'Hugging Face.'
            )
        tree = msgpack.unpackb(encoded, raw=False, strict_map_key=True, ext_hook=_flax_array)
        # The first version of the format had neither the number nor the wrapper around the optimizer.
        version = tree.pop('version', 0)
        tree = tree['optimizer'] if version else tree
        sources: dict[tuple[str, ...], arrays.Source] = {}
        _collect(folder, tree, (), sources)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
        msgpack.UnpackException,
    ) as error:
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
    elif node is not None:  # None is the state of a parameter that no optimizer touches.
        raise ValueError(f'{"/".join(keys)} is a {type(node).__name__}, neither an array nor a description of one')


def _zarr(folder: epath.Path, spec: dict[str, Any]) -> arrays.Source:
    """The spec of an array in the index's folder, wherever it was written. Chunks and compressor are in the array's folder."""
    # TensorStore before 0.1.14 wrote the path at the top.
    name = (spec['kvstore'].get('path') or spec['path']).rstrip('/')
    if not json_files.is_plain_name(name):
        raise ValueError(f'it names the folder {name!r}, which is not one beside it')
    return {
        'driver': 'zarr',
        'kvstore': arrays.kvstore(folder / name),
        'dtype': jax.numpy.dtype(spec['dtype']).name,
        # The order is C in whatever T5X writes; another one would be read as a transposed array.
        'metadata': {'shape': [int(size) for size in spec['metadata']['shape']], 'order': 'C'},
        # T5X stores every chunk (its fill value is null), so that a missing one is a lost one.
        'fill_missing_data_reads': False,
    }


def _flax_array(code: int, data: bytes) -> Any:
    if code not in _FLAX_ARRAY_CODES:
        raise ValueError(f'it has an extension of type {code}, which T5X does not write')
    return flax.serialization.msgpack_restore(msgpack.packb(msgpack.ExtType(code, data)))


class LegacyLayout(T5XLayout):
    """The format of T5X's published models."""

    format = 't5x_legacy'

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """T5X reads factored statistics, which it does not split, from the index."""
        return keys[-1] in ('step', 'v_row', 'v_col') and keys[0] == 'state'

    def commit(self, writer: folder_writer.FolderWriter, metadata: Mapping[str, Any]) -> None:
        """The index, last."""
        tree: dict[str, Any] = {}

        def put(keys: tuple[str, ...], value: Any) -> None:
            node = tree
            for key in keys[:-1]:
                node = node.setdefault(key, {})
            node[keys[-1]] = value

        for name, keys in writer.keys.items():
            leaf = writer.leaves[name]
            if name in writer.inline:
                put(keys, writer.inline[name])
                continue
            # Relative to the index, so that the checkpoint can be moved.
            store = {'driver': 'file', 'path': '.'.join(keys) + '/'}
            array = self.zarr(leaf, writing.chunk_shape(name, leaf))
            put(keys, {**array, 'dtype': leaf.dtype.name, 'kvstore': store})
        for keys, value in self.placeholders(writer).items():
            put(keys, value)
        index = flax.serialization.msgpack_serialize({'version': 3, 'optimizer': tree})
        notes = {**metadata, INDEX_HASH: hashlib.sha256(index).hexdigest()}
        (writer.folder / METADATA).write_text(json.dumps(notes))
        (writer.folder / 'checkpoint').write_bytes(index)

    def reader(self, folder: epath.Path) -> LegacyReader:
        """See `folder_writer.Layout`."""
        return LegacyReader(folder)
