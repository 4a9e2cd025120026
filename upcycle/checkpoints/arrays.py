"""What the array formats share: leaves are named zarr arrays, opened lazily by TensorStore and read onto devices.

Single leaves are read with TensorStore directly, because Orbax re-reads its whole index for each partial restore:
20 to 40 ms a leaf against 0.3 ms here (300 leaves, two CPU cores). Orbax's own restore is the reference in the tests.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from upcycle.errors import UserError

ORBAX_INDEX = '_METADATA'

# A TensorStore spec that opens the array, or the array itself where an index holds small ones inline.
Source = dict[str, Any] | np.ndarray


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` in full, `~` expanded; addresses such as `gs://bucket/run` stay as they are."""
    name = os.fspath(path)
    return epath.Path(name if '://' in name else os.path.abspath(os.path.expanduser(name)))


def is_finished(folder: epath.Path) -> bool:
    """Whether Orbax has committed this step: by its name, or in an object store, which cannot rename, by a file."""
    return '://' not in os.fspath(folder) or (folder / 'commit_success.txt').exists()


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """TensorStore's description of a folder, local or in a Google Cloud Storage bucket."""
    scheme, separator, rest = os.fspath(folder).partition('://')
    if not separator:
        return {'driver': 'file', 'path': scheme + '/'}
    if scheme != 'gs':
        raise UserError(f'{folder} cannot be read: checkpoints are read from local folders and gs:// buckets.')
    bucket, _, key = rest.partition('/')
    return {'driver': 'gcs', 'bucket': bucket, 'path': key + '/'}


def orbax_arrays(item: epath.Path) -> dict[tuple[str, ...], Source]:
    """The arrays of an Orbax pytree item: the path of keys to each leaf, and how to open it.

    Raises:
        UserError: the item's index is damaged.
    """
    try:
        index = json.loads((item / ORBAX_INDEX).read_text())
        leaves = [
            tuple(str(key['key']) for key in leaf['key_metadata'])
            for leaf in index['tree_metadata'].values()
            # What is skipped is an empty node; it has no array.
            if not leaf['value_metadata'].get('skip_deserialize', False)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{item / ORBAX_INDEX} is damaged ({error!r}): copy the checkpoint again.') from error
    store = kvstore(item)
    if (item / 'manifest.ocdbt').exists():
        store = {'driver': 'ocdbt', 'base': store, 'cache_pool': 'cache_pool#index'}
    spec = {'driver': 'zarr3' if index.get('use_zarr3') else 'zarr'}
    # Where even zeros are stored, a missing chunk is a lost one; otherwise it may stand for zeros.
    spec['fill_missing_data_reads'] = not index.get('store_array_data_equal_to_fill_value', False)
    return {keys: {**spec, 'kvstore': _below(store, '.'.join(keys))} for keys in leaves}


def _below(store: dict[str, Any], name: str) -> dict[str, Any]:
    return {**store, 'path': store.get('path', '') + name + '/'}


class ArrayReader:
    """The part of `upcycle.checkpoints.Reader` that does not depend on the format.

    Several threads may `read` at once, after the first `leaves`.

    Args:
        path: the step's folder.
        sources: how to open each leaf, by name. A spec with `dtype` and `metadata.shape` is opened only to be read.
    """

    format = ''

    def __init__(self, path: epath.Path, sources: Mapping[str, Source]):
        self.path = os.fspath(path)
        self._sources = dict(sources)
        self._opened: dict[str, ts.Future] = {}
        # Decoded data is not kept, so that memory stays at one leaf; Orbax's index is, as every leaf needs it.
        self._context = ts.Context({'cache_pool#index': {'total_bytes_limit': 64 << 20}})

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """See `Reader`; only our own format has any."""
        return {}

    @functools.cached_property
    def step(self) -> int:
        """Training steps taken when it was saved."""
        return int(self.read('step'))

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Reader`."""
        return dict(self._leaves)

    def read(
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        if name not in self._leaves:
            raise UserError(f'{self.path} has no leaf {name}: `upcycle inspect {self.path}` lists those it has.')
        return _read(self._open(name), sharding, dtype, functools.partial(self._wait, name))

    @functools.cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        return self._abstract()

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        told = {name: _shape_dtype(source) for name, source in self._sources.items()}
        for name, leaf in told.items():
            if leaf is None:
                self._begin_open(name)
        return {name: self._stored(name) if leaf is None else leaf for name, leaf in told.items()}

    def _stored(self, name: str) -> jax.ShapeDtypeStruct:
        array = self._open(name)
        return jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)

    def _open(self, name: str) -> ts.TensorStore:
        source = self._sources[name]
        return ts.array(source) if isinstance(source, np.ndarray) else self._wait(name, self._begin_open(name))

    def _begin_open(self, name: str) -> ts.Future:
        if name not in self._opened:
            self._opened[name] = ts.open(self._sources[name], context=self._context, open=True, read=True)
        return self._opened[name]

    def _wait(self, name: str, future: ts.Future) -> Any:
        try:
            return future.result()
        except (ValueError, OSError) as error:
            reason = str(error).partition(' [')[0]
            raise UserError(
                f'{name} of {self.path} cannot be read ({reason}): '
                'the checkpoint is incomplete or damaged, copy it again.'
            ) from error


def _shape_dtype(source: Source) -> jax.ShapeDtypeStruct | None:
    """A leaf's shape and dtype where its source tells them, else None."""
    if isinstance(source, np.ndarray):
        return jax.ShapeDtypeStruct(source.shape, source.dtype)
    if 'metadata' in source:
        return jax.ShapeDtypeStruct(tuple(source['metadata']['shape']), jax.numpy.dtype(source['dtype']))
    return None


def _read(
    array: ts.TensorStore,
    sharding: jax.sharding.Sharding | None,
    dtype: Any,
    wait: Callable[[ts.Future], np.ndarray],
) -> jax.Array | np.ndarray:
    dtype = jax.numpy.dtype(array.dtype.numpy_dtype if dtype is None else dtype)
    if sharding is None:
        return np.asarray(wait(array.read())).astype(dtype, copy=False)
    # Devices that hold the same region share one read, and distinct regions are read side by side.
    regions: dict[str, ts.Future] = {}

    def begin(index: tuple[slice, ...]) -> ts.Future:
        key = repr(index)
        if key not in regions:
            regions[key] = array[index].read()
        return regions[key]

    for index in sharding.addressable_devices_indices_map(array.shape).values():
        begin(index)
    return jax.make_array_from_callback(
        array.shape, sharding, lambda index: np.asarray(wait(begin(index))).astype(dtype, copy=False)
    )
