"""Orbax pytree items of zarr arrays: their index, and the files that mark a finished step.

We write the index ourselves because Orbax can only write it together with all arrays, whereas we write arrays part by part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import files
from upcycle.checkpoints import arrays, json_files
from upcycle.errors import UserError

ORBAX_INDEX = '_METADATA'
_COMMITTED = 'commit_success.txt'


def is_finished(folder: epath.Path) -> bool:
    """Whether Orbax has committed this step. On a disk the name tells; in a bucket, which cannot rename, a file."""
    return not files.is_remote(folder) or (folder / _COMMITTED).exists()


def mark_finished(folder: epath.Path, items: tuple[str, ...]) -> None:
    """Writes the files by which Orbax recognises a finished step in a bucket; on a disk they have no effect."""
    for path in (*(folder / item for item in items), folder):
        (path / _COMMITTED).write_text('Checkpoint commit was successful.')


def orbax_index(keys: Mapping[tuple[str, ...], tuple[int, ...]], *, zarr3: bool) -> str:
    """Returns the index of an Orbax pytree item of zarr arrays, each in a folder named by its keys joined by dots.

    Args:
      keys: the shape of each leaf by its path of dictionary keys.
      zarr3: whether the arrays are in zarr 3 instead of zarr 2.
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
    """Returns the source of each array of an Orbax pytree item, by its path of keys.

    Raises:
      UserError: the item's index is damaged.
    """
    index = json_files.read_json(item / ORBAX_INDEX)
    try:
        leaves = [
            tuple(str(key['key']) for key in leaf['key_metadata'])
            for leaf in index['tree_metadata'].values()
            # Skipped entries are empty nodes without an array.
            if not leaf['value_metadata'].get('skip_deserialize', False)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.damaged(item / ORBAX_INDEX, repr(error)) from error
    if outside := [keys for keys in leaves if not all(map(json_files.is_plain_name, (*keys, '.'.join(keys))))]:
        raise UserError(f'{item / ORBAX_INDEX} names arrays outside its folder ({outside[0]!r}), which are never read.')
    store: dict[str, Any] = arrays.kvstore(item)
    if (item / 'manifest.ocdbt').exists():
        store = {'driver': 'ocdbt', 'base': store, 'cache_pool': 'cache_pool#index', 'path': ''}
    # Orbax writes C order; an index with another order would be read as a transposed array.
    spec = {'driver': 'zarr3'} if index.get('use_zarr3') else {'driver': 'zarr', 'metadata': {'order': 'C'}}
    # If zeros are stored, a missing chunk is an error; otherwise it stands for zeros.
    spec['fill_missing_data_reads'] = not index.get('store_array_data_equal_to_fill_value', False)
    return {keys: {**spec, 'kvstore': store | {'path': f'{store["path"]}{".".join(keys)}/'}} for keys in leaves}
