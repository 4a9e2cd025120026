"""Orbax pytree items of zarr arrays: their index, and the files that mark a finished step.

Orbax writes its index together with the arrays of a whole tree, and we write arrays part by part; so the index is ours too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle.checkpoints import arrays, json_files
from upcycle.errors import UserError
from upcycle.files import is_remote

ORBAX_INDEX = '_METADATA'
_COMMITTED = 'commit_success.txt'


def is_finished(folder: epath.Path) -> bool:
    """Whether Orbax has committed this step: by its name, or in an object store, which cannot rename, by a file."""
    return not is_remote(folder) or (folder / _COMMITTED).exists()


def mark_finished(folder: epath.Path, items: tuple[str, ...]) -> None:
    """Leaves the files by which Orbax knows a finished step in an object store; on a disk they do no harm."""
    for path in (*(folder / item for item in items), folder):
        (path / _COMMITTED).write_text('Checkpoint commit was successful.')


def orbax_index(keys: Mapping[tuple[str, ...], tuple[int, ...]], *, zarr3: bool) -> str:
    """The index of an Orbax pytree item of zarr arrays, each in a folder named by its keys with dots between.

    Args:
        keys: the path of dictionary keys to each leaf, and its shape.
        zarr3: they are of version 3 of zarr, not 2.
    """
    entries = {
        str(path): {
            'key_metadata': [{'key': key, 'key_type': 2} for key in path],
            'value_metadata': {'value_type': 'np.ndarray', 'skip_deserialize': False, 'write_shape': list(shape)},
        }
        for path, shape in keys.items()
    }
    index = {'tree_metadata': entries, 'use_ocdbt': False, 'use_zarr3': zarr3}
    return json.dumps({**index, 'store_array_data_equal_to_fill_value': True, 'custom_metadata': None})


def orbax_arrays(item: epath.Path) -> dict[tuple[str, ...], arrays.Source]:
    """The arrays of an Orbax pytree item: the path of keys to each leaf, and how to open it.

    Raises:
        UserError: the item's index is damaged.
    """
    index = json_files.read_json(item / ORBAX_INDEX)
    try:
        leaves = [
            tuple(str(key['key']) for key in leaf['key_metadata'])
            for leaf in index['tree_metadata'].values()
            # What is skipped is an empty node; it has no array.
            if not leaf['value_metadata'].get('skip_deserialize', False)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{item / ORBAX_INDEX} is damaged ({error!r}): copy the checkpoint again.') from error
    if strange := [keys for keys in leaves if not all(map(json_files.is_plain_name, (*keys, '.'.join(keys))))]:
        raise UserError(
            f'{item / ORBAX_INDEX} names arrays that do not lie beside it ({strange[0]!r}): it is not read.'
        )
    store = arrays.kvstore(item)
    if (item / 'manifest.ocdbt').exists():
        store = {'driver': 'ocdbt', 'base': store, 'cache_pool': 'cache_pool#index'}
    # The order is C in whatever Orbax writes; another one would be read as a transposed array.
    spec = {'driver': 'zarr3'} if index.get('use_zarr3') else {'driver': 'zarr', 'metadata': {'order': 'C'}}
    # Where even zeros are stored, a missing chunk is a lost one; otherwise it may stand for zeros.
    spec['fill_missing_data_reads'] = not index.get('store_array_data_equal_to_fill_value', False)
    return {keys: {**spec, 'kvstore': _below(store, '.'.join(keys))} for keys in leaves}


def _below(store: dict[str, Any], name: str) -> dict[str, Any]:
    return {**store, 'path': store.get('path', '') + name + '/'}
