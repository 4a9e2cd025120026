"""The base of all readers: named arrays, opened lazily and read whole, in part, or directly onto devices.

An array is a zarr array, read by TensorStore, or a `views.Lazy` array of another format. Leaves are read with TensorStore
directly because Orbax re-reads its whole index for each partial restore: 20 to 40 ms a leaf instead of 0.3 ms
(300 leaves, two CPU cores). The tests compare with Orbax's restore.
"""

from __future__ import annotations

import functools
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from upcycle import casts, files, schema
from upcycle.checkpoints import views
from upcycle.errors import Unavailable, UserError

WEIGHT_DTYPES = ('float32', 'bfloat16', 'float16')  # of weights and moments
# Raised by TensorStore, NumPy and zipfile for damaged files; RuntimeError: an encrypted zip.
DAMAGE = (ValueError, OSError, EOFError, NotImplementedError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
# A damaged header may ask for any size. The largest known leaves have tens of gigabytes.
_LARGEST_LEAF = 1 << 40
_COUNTED = 1 << 18  # numbers at a time

# A TensorStore spec, an array stored inline in an index, or a lazy array.
Source = dict[str, Any] | np.ndarray | views.Lazy


def require_finite(path: str, name: str, value: np.ndarray) -> None:
    """Raises UserError if a leaf holds NaN or infinity."""
    refuse_not_finite(path, name, count_not_finite(value))


def count_not_finite(value: np.ndarray) -> int:
    """Counts NaN and infinity: numbers whose exponent has all bits set."""
    if value.dtype.kind in 'biu':
        return 0
    kind = np.dtype(f'u{value.dtype.itemsize}')
    exponent = np.asarray(np.inf, value.dtype).reshape(1).view(kind)[0]
    bits = value.reshape(-1, order='A').view(kind)  # in the order of the memory
    blocks = (bits[start : start + _COUNTED] for start in range(0, bits.size, _COUNTED))
    return sum(int(np.count_nonzero((block & exponent) == exponent)) for block in blocks)


def refuse_not_finite(path: str, name: str, count: int) -> None:
    """Raises UserError if `count`, the number of NaN and infinite values of a leaf, is not 0."""
    if count:
        raise UserError(
            f'{name} of {path} holds {count} numbers that are NaN or infinite: the model was broken when it was saved, so use '
            'an earlier step.'
        )


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """Returns TensorStore's spec of a folder, local or in a bucket.

    Raises:
      UserError: TensorStore cannot open the name, or would open another one.
    """
    name = os.fspath(folder)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f'{name.encode(errors="backslashreplace").decode()} is not UTF-8: use another name.') from None
    if '\\' in name:
        raise UserError(f'{name} holds a backslash, which TensorStore reads as a slash: use another name.')
    scheme, separator, rest = name.partition('://')
    if not separator:
        return {'driver': 'file', 'path': scheme + '/'}
    bucket, _, key = rest.partition('/')
    return {'driver': files.STORES[scheme], 'bucket': bucket, 'path': key + '/'}


class ArrayReader:
    """The format-independent part of `upcycle.checkpoints.Reader`.

    Threads may call `read` concurrently after the first call of `leaves`.

    Args:
      path: the step's folder, or the file.
      sources: the source of each leaf, by name. A spec with `dtype` and `metadata.shape` is only opened when it is read.
    """

    format = ''

    def __init__(self, path: epath.Path, sources: Mapping[str, Source]):
        self.path = os.fspath(path)
        self._sources = dict(sources)
        self._opened: dict[str, ts.Future] = {}
        # Caches Orbax's index, which every leaf needs, but no data, so that memory stays at one leaf.
        self._context = ts.Context({'cache_pool#index': {'total_bytes_limit': 64 << 20}})

    @functools.cached_property
    def metadata(self) -> Mapping[str, Any]:
        """See `Reader`."""
        return {}

    @functools.cached_property
    def step(self) -> int | None:
        """See `Reader`."""
        if 'step' not in self._leaves:
            return None
        step = self.read('step')
        if step.size != 1 or step.dtype.kind not in 'iu':
            raise UserError(f'step of {self.path} is {step.dtype}{list(step.shape)} instead of a whole number.')
        if not schema.fits(number := step.item(), schema.Whole):
            raise UserError(
                f'step of {self.path} is {schema.shown(number)}: it must be {schema.in_words(schema.Whole)}.'
            )
        return number

    def missing(self) -> list[str]:
        """Lists leaves whose local zarr folder is missing, for example because a copy is under way."""
        stores = {name: source['kvstore'] for name, source in self._sources.items() if isinstance(source, dict)}
        return [name for name, at in stores.items() if at.get('driver') == 'file' and not os.path.isdir(at['path'])]

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Reader`."""
        return dict(self._leaves)

    def read(
        self, name: str, sharding: jax.sharding.Sharding | None = None, dtype: Any = None, region: views.Region = ()
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        if name not in self._leaves:
            raise UserError(f'{self.path} has no leaf {name}: `upcycle inspect {self.path}` lists those it has.')
        leaf = self._leaves[name]
        dtype = jax.numpy.dtype(leaf.dtype if dtype is None else dtype)
        if sharding is None:
            # The caller owns the result, so an inline array is copied.
            return np.array(self._begin_read(name, region)(), dtype, copy=None if self._is_fresh(name) else True)
        # Devices that hold the same region share one read; distinct regions are read concurrently.
        regions = {repr(index): index for index in sharding.addressable_devices_indices_map(leaf.shape).values()}
        reads = {key: self._begin_read(name, index) for key, index in regions.items()}
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # JAX would silently cut 64 bits to 32
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: casts.cast(name, np.asarray(reads[repr(index)]()), dtype)
        )

    @functools.cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        leaves = self._abstract()
        for name, leaf in leaves.items():
            if leaf.size * leaf.dtype.itemsize > _LARGEST_LEAF:
                raise files.damaged(f'{name} of {self.path}', f'{leaf.dtype}{list(leaf.shape)} is too large for a leaf')
        wrong = [
            f'{name} is {leaf.dtype}'
            for name, leaf in leaves.items()
            if name.startswith(('params/', 'opt_state/param_states/')) and leaf.dtype.name not in WEIGHT_DTYPES
        ]
        if wrong:
            listing = ', '.join([*wrong[:3], '...'] if len(wrong) > 3 else wrong)
            raise UserError(
                f'{self.path} holds weights of unknown types ({listing}): they must be {", ".join(WEIGHT_DTYPES)}.'
            )
        return leaves

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        known = {name: _shape_dtype(source) for name, source in self._sources.items()}
        for name, leaf in known.items():
            if leaf is None:
                self._begin_open(name)
        return {name: _shape_dtype(self._array(name)) if leaf is None else leaf for name, leaf in known.items()}

    def _array(self, name: str) -> ts.TensorStore:
        """Opens a zarr array and checks its chunk size, since TensorStore allocates whole chunks."""
        array = self._wait(name, self._begin_open(name).result)
        chunk = array.chunk_layout.read_chunk.shape or ()  # None for a scalar
        if math.prod(chunk) > max(math.prod(array.shape), 1):
            reason = f'its chunks of {list(chunk)} are larger than its shape {list(array.shape)}'
            raise files.damaged(f'{name} of {self.path}', reason)
        return array

    def _is_fresh(self, name: str) -> bool:
        return not isinstance(self._sources[name], np.ndarray)

    def _begin_read(self, name: str, region: views.Region) -> Callable[[], np.ndarray]:
        """Starts to read, in the background if the source can; the result is called for the numbers."""
        source = self._sources[name]
        if isinstance(source, np.ndarray):
            return lambda: source[region]
        if isinstance(source, dict):
            part = self._array(name)[region]
            # If memory is too small, NumPy raises an error, whereas TensorStore ends the process.
            self._wait(name, lambda: np.empty(part.shape, part.dtype.numpy_dtype))
            return functools.partial(self._wait, name, part.read().result)
        return functools.cache(lambda: self._wait(name, lambda: source.read(region)))

    def _begin_open(self, name: str) -> ts.Future:
        if name not in self._opened:
            self._opened[name] = ts.open(self._sources[name], context=self._context, open=True, read=True)
        return self._opened[name]

    def _wait(self, name: str, result: Callable[[], Any]) -> Any:
        try:
            return result()
        except DAMAGE as error:
            refusal = files.refused_by_bucket(error, [self.path]) if files.is_remote(self.path) else None
            if isinstance(refusal, Unavailable):
                raise refusal from error
            reason = ' '.join(str(error).partition(' [')[0].split())
            raise UserError(
                f'{name} of {self.path} cannot be read ({reason}): '
                'the checkpoint is incomplete or damaged, copy it again.'
            ) from error


def _shape_dtype(source: Source | ts.TensorStore) -> jax.ShapeDtypeStruct | None:
    """Returns a leaf's shape and dtype in native byte order; None if the source must be opened first."""
    if isinstance(source, ts.TensorStore):
        return jax.ShapeDtypeStruct(source.shape, source.dtype.numpy_dtype)
    if not isinstance(source, dict):
        return jax.ShapeDtypeStruct(source.shape, np.dtype(source.dtype).newbyteorder('='))
    if 'shape' in source.get('metadata', {}) and 'transform' not in source:
        return jax.ShapeDtypeStruct(tuple(source['metadata']['shape']), jax.numpy.dtype(source['dtype']))
    return None
