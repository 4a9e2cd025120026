"""What the formats share: leaves are named arrays, opened lazily and read whole, in part, or straight onto devices.

An array is a zarr array, which TensorStore reads, or a lazy one of another format (`views.Lazy`). Single leaves are read with
TensorStore directly, because Orbax re-reads its whole index for each partial restore: 20 to 40 ms a leaf against 0.3 ms here
(300 leaves, two CPU cores). Orbax's own restore is the reference in the tests.
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

from upcycle import casts, schema
from upcycle.checkpoints import views
from upcycle.errors import Unavailable, UserError
from upcycle.files import STORES, is_remote, refused_by_bucket

# What weights and moments are stored in.
WEIGHT_DTYPES = ('float32', 'bfloat16', 'float16')
# Of a damaged file, by TensorStore, NumPy and zipfile; RuntimeError is an encrypted zip.
DAMAGE = (ValueError, OSError, EOFError, NotImplementedError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)
# A damaged header may ask for any size. The largest leaves that we know of are tens of gigabytes.
_LARGEST_LEAF = 1 << 40

# A TensorStore spec that opens the array, the array itself where an index holds small ones inline, or a reader of it.
Source = dict[str, Any] | np.ndarray | views.Lazy


def require_finite(path: str, name: str, value: np.ndarray) -> None:
    """Raises UserError where weights hold NaN or infinity."""
    refuse_not_finite(path, name, count_not_finite(value))


def count_not_finite(value: np.ndarray) -> int:
    """How many numbers are NaN or infinite."""
    return 0 if value.dtype.kind in 'iu' else value.size - int(np.count_nonzero(np.isfinite(value)))


def refuse_not_finite(path: str, name: str, count: int) -> None:
    """Raises UserError where that many numbers of a leaf are NaN or infinite, and not none."""
    if count:
        raise UserError(
            f'{name} of {path} holds {count} numbers that are NaN or infinite: the model was broken when it was saved, take an '
            'earlier step.'
        )


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """TensorStore's description of a folder, local or in a bucket.

    Raises:
        UserError: TensorStore cannot open its name, or takes it for another one.
    """
    name = os.fspath(folder)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f'{name.encode(errors="backslashreplace").decode()} is not UTF-8: use another name.') from None
    if '\\' in name:
        raise UserError(f'{name} holds a backslash, which TensorStore takes for a slash: use another name.')
    scheme, separator, rest = name.partition('://')
    if not separator:
        return {'driver': 'file', 'path': scheme + '/'}
    bucket, _, key = rest.partition('/')
    return {'driver': STORES[scheme], 'bucket': bucket, 'path': key + '/'}


class ArrayReader:
    """The part of `upcycle.checkpoints.Reader` that does not depend on the format.

    Several threads may `read` at once, after the first `leaves`.

    Args:
        path: the step's folder, or the file.
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
        """See `Reader`."""
        return {}

    @functools.cached_property
    def step(self) -> int | None:
        """See `Reader`."""
        if 'step' not in self._leaves:
            return None
        step = self.read('step')
        if step.size != 1 or step.dtype.kind not in 'iu':
            raise UserError(f'step of {self.path} is {step.dtype}{list(step.shape)} and not a whole number.')
        if not schema.fits(int(step.reshape(())), schema.Whole):
            raise UserError(
                f'step of {self.path} is {schema.shown(int(step.reshape(())))}: it must be {schema.in_words(schema.Whole)}.'
            )
        return int(step.reshape(()))

    def missing(self) -> list[str]:
        """Leaves whose arrays are not there, as far as a look at this machine's folders shows: a copy that is under way."""
        return [name for name, source in self._sources.items() if _is_gone(source)]

    def leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        """See `Reader`."""
        return dict(self._leaves)

    def read(
        self,
        name: str,
        sharding: jax.sharding.Sharding | None = None,
        dtype: Any = None,
        region: views.Region = (),
    ) -> jax.Array | np.ndarray:
        """See `Reader`."""
        if name not in self._leaves:
            raise UserError(f'{self.path} has no leaf {name}: `upcycle inspect {self.path}` lists those it has.')
        leaf = self._leaves[name]
        dtype = jax.numpy.dtype(leaf.dtype if dtype is None else dtype)
        if sharding is None:
            # Never the index's own array: what is read is the caller's.
            return np.array(self._begin_read(name, region)(), dtype, copy=None if self._is_fresh(name) else True)
        # Devices that hold the same region share one read, and distinct regions are read side by side.
        regions: dict[str, Callable[[], np.ndarray]] = {}

        def begin(index: views.Region) -> Callable[[], np.ndarray]:
            key = repr(index)
            if key not in regions:
                regions[key] = self._begin_read(name, index)
            return regions[key]

        for index in sharding.addressable_devices_indices_map(leaf.shape).values():
            begin(index)
        # JAX would cut 64 bits to 32 without a word.
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        return jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: casts.cast(name, np.asarray(begin(index)()), dtype)
        )

    @functools.cached_property
    def _leaves(self) -> dict[str, jax.ShapeDtypeStruct]:
        leaves = self._abstract()
        for name, leaf in leaves.items():
            if math.prod(leaf.shape) * leaf.dtype.itemsize > _LARGEST_LEAF:
                raise UserError(
                    f'{name} of {self.path} would be {leaf.dtype}{list(leaf.shape)}, which no model has: its index is damaged, '
                    'copy the checkpoint again.'
                )
        wrong = [
            f'{name} is {leaf.dtype}'
            for name, leaf in leaves.items()
            if name.startswith(('params/', 'opt_state/param_states/')) and leaf.dtype.name not in WEIGHT_DTYPES
        ]
        if wrong:
            raise UserError(
                f'{self.path} holds weights of a type that no model has ({", ".join(wrong[:3])}'
                f'{", ..." if len(wrong) > 3 else ""}): they are {", ".join(WEIGHT_DTYPES)}.'
            )
        return leaves

    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        known = {name: _shape_dtype(source) for name, source in self._sources.items()}
        for name, leaf in known.items():
            if leaf is None:
                self._begin_open(name)
        return {name: self._stored(name) if leaf is None else leaf for name, leaf in known.items()}

    def _stored(self, name: str) -> jax.ShapeDtypeStruct:
        array = self._array(name)
        return jax.ShapeDtypeStruct(array.shape, array.dtype.numpy_dtype)

    def _array(self, name: str) -> ts.TensorStore:
        """A zarr array, after a look at its chunks, each of which TensorStore makes room for as a whole."""
        array = self._wait(name, self._begin_open(name).result)
        chunk = array.chunk_layout.read_chunk.shape or ()  # a scalar has none
        if math.prod(chunk) > max(math.prod(array.shape), 1):
            raise UserError(
                f'{name} of {self.path} has chunks of {list(chunk)}, and is itself {list(array.shape)}: its header is damaged, '
                'copy the checkpoint again.'
            )
        return array

    def _is_fresh(self, name: str) -> bool:
        return not isinstance(self._sources[name], np.ndarray)

    def _begin_read(self, name: str, region: views.Region) -> Callable[[], np.ndarray]:
        """Starts reading, in the background where the source allows it; the result gives the numbers."""
        source = self._sources[name]
        if isinstance(source, np.ndarray):
            return lambda: source[region]
        if isinstance(source, dict):
            part = self._array(name)[region]
            # Where memory does not suffice, NumPy says so, and TensorStore ends the process.
            self._wait(name, functools.partial(np.empty, part.shape, part.dtype.numpy_dtype))
            return functools.partial(self._wait, name, part.read().result)
        read = functools.partial(_in_c_order, source, region)
        return functools.cache(functools.partial(self._wait, name, read))

    def _begin_open(self, name: str) -> ts.Future:
        if name not in self._opened:
            self._opened[name] = ts.open(self._sources[name], context=self._context, open=True, read=True)
        return self._opened[name]

    def _wait(self, name: str, result: Callable[[], Any]) -> Any:
        try:
            return result()
        except DAMAGE as error:
            if is_remote(self.path) and isinstance(refusal := refused_by_bucket(error, [self.path]), Unavailable):
                raise refusal from error
            reason = ' '.join(str(error).partition(' [')[0].split())
            raise UserError(
                f'{name} of {self.path} cannot be read ({reason}): '
                'the checkpoint is incomplete or damaged, copy it again.'
            ) from error


def _in_c_order(source: views.Lazy, region: views.Region) -> np.ndarray:
    return np.asarray(source.read(region), order='C')


def _is_gone(source: Source) -> bool:
    """Whether the folder of a zarr array on this machine is missing."""
    if not isinstance(source, dict) or source['kvstore'].get('driver') != 'file':
        return False
    return not os.path.isdir(source['kvstore']['path'])


def _shape_dtype(source: Source) -> jax.ShapeDtypeStruct | None:
    """A leaf's shape and dtype, in this machine's byte order, where its source tells them, else None."""
    if not isinstance(source, dict):
        return jax.ShapeDtypeStruct(source.shape, np.dtype(source.dtype).newbyteorder('='))
    if 'shape' in source.get('metadata', {}) and 'transform' not in source:
        return jax.ShapeDtypeStruct(tuple(source['metadata']['shape']), jax.numpy.dtype(source['dtype']))
    return None
