"""The container of Hugging Face models: safetensors files and their index, read lazily by region and written in any order.

A file is a JSON header (names, types, shapes, offsets) followed by the bytes of the arrays. A large model has several files and
an index. We do not use the `safetensors` library (0.8) because:

- `safe_open` only opens local files and does not tell the offset of an array; `deserialize` needs the bytes of a whole file.
- It cannot return bfloat16 to NumPy (`data type 'bfloat16' not understood`).
- It accepts a header with a name twice. Its error is the same for a truncated file and one with extra bytes (`incomplete
  metadata, file not fully covered`), and its error for a wrong shape does not name the array.
- `serialize_file` needs all arrays in memory at once.

The tests compare the two: we refuse whatever the library refuses, and the library reads what we write.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath

from upcycle import files, schema
from upcycle.checkpoints import json_files, views
from upcycle.checkpoints.direct import BLOCK, BUFFER, DirectFile, aligned_empty
from upcycle.errors import UserError

SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
SHARD_BYTES = 5 << 30

_DTYPES = {
    'F64': np.dtype('float64'),
    'F32': np.dtype('float32'),
    'F16': np.dtype('float16'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'I64': np.dtype('int64'),
    'I32': np.dtype('int32'),
    'I16': np.dtype('int16'),
    'I8': np.dtype('int8'),
    'U8': np.dtype('uint8'),
    'BOOL': np.dtype('bool'),
}
_NOTES_BYTES = 512  # room for the notes in each header
_MAX_HEADER = 100 << 20  # as in the library


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One array of a file; see `views.Lazy`."""

    file: epath.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int  # in the file

    def read(self, region: views.Region) -> np.ndarray:
        """See `views.Lazy`. Reads contiguous parts; where these are smaller than a row of a matrix, a few rows at a time."""
        shape = self.shape or (1,)
        rows, *inside = views.bounds(region, shape)
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        out = aligned_empty((rows.stop - rows.start, *(part.stop - part.start for part in inside)), self.dtype)
        with self.file.open('rb') as file:
            if len(shape) > 2 and out.shape[2:] == shape[2:] and out.shape[1] < shape[1]:
                start = inside[0].start * (row_bytes // shape[1])
                for i, row in enumerate(out, rows.start):
                    file.seek(self.offset + i * row_bytes + start)
                    views.read_into(file, row)
                return out
            file.seek(self.offset + rows.start * row_bytes)
            is_whole_rows = out.shape[1:] == shape[1:]
            step = len(out) if is_whole_rows else max(1, views.READ_BYTES // max(row_bytes, 1))
            for start in range(0, len(out), max(step, 1)):
                part = out[start : start + step]
                read = part if is_whole_rows else np.empty((len(part), *shape[1:]), self.dtype)
                views.read_into(file, read)
                if not is_whole_rows:
                    part[...] = read[(slice(None), *inside)]
        return out.reshape(()) if not self.shape else out


def read_files(file: epath.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the headers of a model in one file, or in the files of an index.

    Returns:
      The arrays by name, and the notes in the first header.

    Raises:
      UserError: a file is missing or damaged, or index and files do not match.
    """
    if not file.name.endswith('.json'):
        return _read_header(file)
    locations = _read_index(file)
    tensors: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for name in sorted(set(locations.values())):
        stored, more = _read_header(file.parent / name)
        tensors |= stored
        notes = notes or more
        for tensor in stored:
            if locations.get(tensor) != name:
                raise _index_error(file, f'{name} holds {tensor}, which the index does not place there')
    for name, location in locations.items():
        if name not in tensors:
            raise _index_error(file, f'{location} does not hold {name}')
    return tensors, notes


def _read_index(index: epath.Path) -> dict[str, str]:
    """Returns the file name of each array."""
    locations = json_files.read_json(index, _refuse_duplicates).get('weight_map')
    if not schema.fits(locations, dict[str, str]):
        raise files.damaged(index, 'it has no weight_map of names and files')
    names = sorted(set(locations.values()))
    if not all(map(json_files.is_plain_name, names)):
        raise UserError(f'{index} names files outside its folder, which are never read.')
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise _index_error(index, f'{missing[0]} is missing')
    return locations


def _index_error(index: epath.Path, reason: str) -> UserError:
    return UserError(
        f'{index} does not match its files ({reason}): copy the checkpoint again, with its index and all files.'
    )


def indexed_files(index: epath.Path) -> set[str]:
    """Returns the files that an index names; an empty set if it is damaged."""
    try:
        return set(json_files.read_json(index)['weight_map'].values())
    except (UserError, KeyError, TypeError, AttributeError):
        return set()


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    counts = collections.Counter(name for name, _ in pairs)
    if duplicates := [name for name, count in counts.items() if count > 1]:
        raise json_files.Twice(f'{min(duplicates)} is there twice')
    return dict(pairs)


def _read_header(file: epath.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    files.require_file(file)
    try:
        size = file.stat().length
        with file.open('rb') as stream:
            start = stream.read(8)
            if start == b'version ':
                raise UserError(f'{file} is a pointer of Git LFS instead of the file: run git lfs pull.')
            if len(start) < 8:
                raise ValueError(f'it has {size} bytes, too few for a header')
            length = int.from_bytes(start, 'little')
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise ValueError(f'its header would be {length} bytes long')
            header = json_files.parse(stream.read(length), 'its header', _refuse_duplicates)
        if not isinstance(header, dict):
            raise ValueError('its header is not a JSON object')
        notes = header.pop('__metadata__', {})
        if not schema.fits(notes, dict[str, str]):
            raise ValueError('its metadata is not a dictionary of strings')
        tensors = {name: _tensor(file, name, entry, 8 + length) for name, entry in header.items()}
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{file} is not a safetensors file, or is damaged ({reason}): copy it again.') from error
    _validate_offsets(file, size, 8 + length, tensors)
    return tensors, notes


def _tensor(file: epath.Path, name: str, entry: Any, start: int) -> Tensor:
    if not _describes_a_tensor(entry):
        raise ValueError(f'its header does not describe {name} by dtype, shape and data_offsets')
    dtype = _DTYPES.get(entry['dtype'])
    if dtype is None:
        raise UserError(f'{name} of {file} has the unsupported type {entry["dtype"]}.')
    shape, (begin, end) = tuple(entry['shape']), entry['data_offsets']
    if min((*shape, begin), default=0) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise files.damaged(f'{name} of {file}', f'{dtype}{list(shape)} does not fit into its {end - begin} bytes')
    return Tensor(file, shape, dtype, start + begin)


def _describes_a_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get('dtype'), str):
        return False
    shape, offsets = entry.get('shape'), entry.get('data_offsets')
    numbers = isinstance(shape, list) and isinstance(offsets, list) and len(offsets) == 2
    return numbers and all(type(number) is int for number in (*shape, *offsets))


def _validate_offsets(file: epath.Path, size: int, start: int, tensors: Mapping[str, Tensor]) -> None:
    """Raises UserError unless every byte of the file belongs to exactly one array."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, math.prod(item[1].shape))):
        if tensor.offset != end:
            raise files.damaged(f'{name} of {file}', f'it begins at byte {tensor.offset} instead of {end}')
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        if end > size:
            raise files.damaged(f'{name} of {file}', f'it ends at byte {end}, but the file has {size} bytes')
    if end != size:
        raise files.damaged(file, f'{size - end} bytes belong to no array')


class FilesWriter:
    """Writes arrays, in any order, to `model.safetensors`, or to shards and their index.

    Args:
      folder: a local folder.
      arrays: shape and dtype of each array, in the order of the files.
      shard_bytes: the most bytes of arrays in a file, unless a single array is larger.

    Attributes:
      last: the file by which readers recognise the folder.
    """

    def __init__(self, folder: epath.Path, arrays: Mapping[str, jax.ShapeDtypeStruct], shard_bytes: int = SHARD_BYTES):
        self._folder = folder
        self._headers = _shards(arrays, shard_bytes)
        self.last = SINGLE if len(self._headers) == 1 else INDEX
        longest = max(len(json.dumps(entries)) for entries in self._headers.values()) + _NOTES_BYTES
        # Arrays begin after room for the longest header.
        self._header_bytes = -(-(8 + longest) // BLOCK) * BLOCK
        self._files = {name: file for file, entries in self._headers.items() for name in entries}
        self._open: dict[str, DirectFile] = {}
        self._buffer = aligned_empty((BUFFER,), np.uint8)
        self._todo = {name: array.size * array.dtype.itemsize for name, array in arrays.items()}  # bytes

    def write(self, name: str, value: np.ndarray, region: views.Region = ()) -> None:
        """Writes one array, or its `region`, which must be contiguous in the array; no region is written twice."""
        file = self._files[name]
        entry = self._headers[file][name]
        start = self._header_bytes + entry['data_offsets'][0]
        data = np.asarray(value, order='C').reshape(-1).view(np.uint8).data
        self._pwrite(file, data, start + _offset(region, entry['shape']) * value.dtype.itemsize)
        self._todo[name] -= len(data)

    def assume_written(self, name: str, size: int) -> None:
        """Notes `size` bytes of an array that an earlier, interrupted writer has written."""
        self._todo[name] -= size

    def _pwrite(self, file: str, data: memoryview | bytes, offset: int) -> None:
        if file not in self._open:
            self._open[file] = DirectFile(self._folder / file, self._buffer)
        self._open[file].write(data, offset)

    def finish(self, notes: Mapping[str, str]) -> None:
        """Writes the headers, with `notes` in each, and the index."""
        if todo := sorted(name for name, size in self._todo.items() if size):
            raise ValueError(f'not written: {todo[:3]}')
        # The arrays of a file have no gaps, so their size is the end of the last one.
        sizes = {file: max(e['data_offsets'][1] for e in entries.values()) for file, entries in self._headers.items()}
        for file, entries in self._headers.items():
            header = json.dumps({'__metadata__': notes, **entries}).encode()
            # The format pads the header with spaces.
            start = (self._header_bytes - 8).to_bytes(8, 'little')
            self._pwrite(file, start + header.ljust(self._header_bytes - 8), 0)
            self._open.pop(file).finish(self._header_bytes + sizes[file])
        if len(self._headers) > 1:
            index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': self._files}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1))

    def close(self) -> None:
        """Closes the files, even if the disk is full."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _offset(region: views.Region, shape: Sequence[int]) -> int:
    """Returns the number of elements before the first one of a region."""
    starts = [part.start for part in views.bounds(region, tuple(shape))]
    return sum(start * math.prod(shape[axis + 1 :]) for axis, start in enumerate(starts))


def _shards(arrays: Mapping[str, jax.ShapeDtypeStruct], shard_bytes: int) -> dict[str, dict[str, Any]]:
    """Returns the header of each file: type, shape and offsets of its arrays."""
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, array in arrays.items():
        size = array.size * array.dtype.itemsize
        if shards[-1] and end + size > shard_bytes:
            shards.append({})
            end = 0
        code = next(code for code, dtype in _DTYPES.items() if dtype == array.dtype)
        shards[-1][name] = {'dtype': code, 'shape': list(array.shape), 'data_offsets': [end, end + size]}
        end += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors': shard for i, shard in enumerate(shards)}
