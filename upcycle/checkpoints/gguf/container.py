"""The container of llama.cpp's models: metadata, and tensors that are dequantised when they are read.

The header is parsed here because the library `gguf` (0.19) makes several NumPy views of each string, and follows the lengths in a
damaged file without a limit. Sizes of blocks and dequantisation are the library's. The tests compare the two.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from upcycle import files
from upcycle.checkpoints import views
from upcycle.errors import UserError
from upcycle.extras import require

_MAGIC = b'GGUF'
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# The types of single values by their codes.
_VALUES = {0: 'u1', 1: 'i1', 2: '<u2', 3: '<i2', 4: '<u4', 5: '<i4', 6: '<f4', 7: '?', 10: '<u8', 11: '<i8', 12: '<f8'}
# Types of tensors that are stored as NumPy arrays, by the library's names; others are blocks, which become float32.
_PLAIN = {
    'BF16': np.dtype(ml_dtypes.bfloat16),
    **{f'F{bits}': np.dtype(f'float{bits}') for bits in (16, 32, 64)},
    **{f'I{bits}': np.dtype(f'int{bits}') for bits in (8, 16, 32, 64)},
}
_MOST_AXES = 4
_READ_BYTES = 16 << 20  # of blocks at a time
_SPLIT = re.compile(r'(.+)-(\d{5})-of-(\d{5})\.gguf')


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file; see `views.Lazy`.

    Attributes:
      file: its path.
      shape: of the numbers, rows first; the format stores it reversed.
      kind: the library's name of the stored type, such as 'Q4_K'.
      offset: in the file.
    """

    file: epath.Path
    shape: tuple[int, ...]
    kind: str
    offset: int

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers that `read` returns."""
        return _PLAIN.get(self.kind, np.dtype('float32'))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape[:-1]) * _row_bytes(self.kind, self.shape[-1])

    def read(self, region: views.Region) -> np.ndarray:
        """See `views.Lazy`. Reads and dequantises some rows at a time."""
        if len(self.shape) == 1:
            return dataclasses.replace(self, shape=(1, *self.shape)).read((slice(None), *region))[0]
        first, *inside = views.bounds(region, self.shape)
        out = np.empty((first.stop - first.start, *(part.stop - part.start for part in inside)), self.dtype)
        step = max(1, _READ_BYTES * self.shape[0] // max(self.nbytes, 1))
        for start in range(0, len(out), step):
            part = out[start : start + step]
            part[...] = self._stored(first.start + start, len(part))[(slice(None), *inside)]
        return out

    def _stored(self, start: int, count: int) -> np.ndarray:
        """Returns `count` indices of the first axis of a tensor with several axes."""
        raw = np.empty((count, *self.shape[1:-1], _row_bytes(self.kind, self.shape[-1])), np.uint8)
        with self.file.open('rb') as file:
            file.seek(self.offset + start * raw[:1].nbytes)
            views.read_into(file, raw)
        if self.kind in _PLAIN:
            return raw.view(self.dtype)
        library = _library(self.file)
        return library.quants.dequantize(raw, library.GGMLQuantizationType[self.kind])


def read_file(file: epath.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads the header of a model in one file or, if it is the first of a split model, of all its files.

    Returns:
      The metadata: numbers, strings, lists of strings and NumPy arrays; and the tensors, by their names.

    Raises:
      UserError: a file is missing, damaged, or of another version; the library is not installed.
    """
    metadata, tensors = _read_header(file)
    count = metadata.get('split.count', 1)
    if not isinstance(count, int) or count <= 1:
        return metadata, tensors
    match = _SPLIT.fullmatch(file.name)
    if match is None or int(match[2]) != 1 or int(match[3]) != count:
        raise UserError(f'{file} is one of {count} files of a model: name the first, NAME-00001-of-{count:05d}.gguf.')
    for number in range(2, count + 1):
        other = file.parent / f'{match[1]}-{number:05d}-of-{match[3]}.gguf'
        if not other.exists():
            raise UserError(f'{other} is missing: copy all {count} files of the model.')
        more = _read_header(other)[1]
        if twice := sorted(tensors.keys() & more.keys()):
            raise files.damaged(other, f'{twice[0]} is in another file, too')
        tensors |= more
    expected = metadata.get('split.tensors.count', len(tensors))
    if expected != len(tensors):
        raise files.damaged(file, f'its files hold {len(tensors)} tensors instead of {expected}')
    return metadata, tensors


def _library(file: epath.Path) -> Any:
    return require('gguf', str(file), 'gguf')


def _row_bytes(kind: str, size: int) -> int:
    import gguf

    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return size // block * block_bytes


class _Header:
    """Reads the values of a header, none beyond the end of the file."""

    def __init__(self, stream: BinaryIO, size: int):
        self._stream, self._size = stream, size
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > self._size - self.at:
            raise ValueError(f'it ends within its header, of which {count} bytes follow byte {self.at}')
        data = self._stream.read(count)
        if len(data) != count:
            raise ValueError(f'it ends within its header, at byte {self.at + len(data)}')
        self.at += count
        return data

    def number(self, code: str) -> int:
        return struct.unpack(f'<{code}', self.take(struct.calcsize(f'<{code}')))[0]

    def text(self) -> str:
        return self.take(self.number('Q')).decode('utf-8')

    def value(self, code: int) -> Any:
        if code == _STRING:
            return self.text()
        if code == _ARRAY:
            code, count = self.number('I'), self.number('Q')
            if code == _STRING:
                if 8 * count > self._size - self.at:
                    raise ValueError(f'a list of {count} strings at byte {self.at} is longer than the file')
                return [self.text() for _ in range(count)]
            return np.frombuffer(self.take(count * self._kind(code).itemsize), self._kind(code))
        value = np.frombuffer(self.take(self._kind(code).itemsize), self._kind(code))[0]
        return float(str(value)) if value.dtype == np.float32 else value.item()  # 1e-5, not 9.99999974e-06

    def _kind(self, code: int) -> np.dtype:
        if code not in _VALUES:
            raise ValueError(f'there is no type {code}, before byte {self.at}')
        return np.dtype(_VALUES[code])


def _read_header(file: epath.Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    library = _library(file)
    try:
        size = file.stat().length
        with file.open('rb') as stream:
            return _parse(file, _Header(stream, size), size, library)
    except UserError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise UserError(f'{file} is not a GGUF file, or is damaged ({error}): copy it again.') from error


def _parse(file: epath.Path, header: _Header, size: int, library: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    magic = header.take(4)
    if magic == b'vers':
        raise UserError(f'{file} is a pointer of Git LFS instead of the file: run git lfs pull.')
    if magic != _MAGIC:
        raise ValueError(f'it begins with {magic!r}')
    version = header.number('I')
    if version not in _VERSIONS:
        raise UserError(
            f'{file} has version {version} of GGUF in little-endian order, not 2 or 3: convert the model again with llama.cpp.'
        )
    num_tensors, num_values = header.number('Q'), header.number('Q')
    metadata = _unique((header.text(), header.value(header.number('I'))) for _ in range(num_values))
    stored = _unique(_tensor(file, header, library) for _ in range(num_tensors))
    alignment = metadata.get('general.alignment', 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f'general.alignment is {alignment!r}')
    start = -(-header.at // alignment) * alignment
    tensors = {name: dataclasses.replace(each, offset=start + each.offset) for name, each in stored.items()}
    _check_places(tensors, start, size, alignment)
    return metadata, tensors


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'{name} is there twice')
        found[name] = value
    return found


def _tensor(file: epath.Path, header: _Header, library: Any) -> tuple[str, Tensor]:
    """Reads an entry; the offset is relative to the end of the header."""
    name, axes = header.text(), header.number('I')
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f'{name} has {axes} axes')
    shape = tuple(header.number('Q') for _ in range(axes))[::-1]
    code, offset = header.number('I'), header.number('Q')
    if code not in (known := {each.value: each for each in library.GGMLQuantizationType}):
        raise UserError(
            f'{name} of {file} has the type {code}, which the library gguf does not know: install a newer one.'
        )
    kind = known[code].name
    block, _ = library.GGML_QUANT_SIZES[known[code]]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(f'{name} is {kind}{list(shape)}, whose rows are not blocks of {block}')
    if kind not in _PLAIN and not _dequantises(kind):
        raise UserError(
            f'{name} of {file} has the type {kind}, which the library gguf cannot dequantise: use another file.'
        )
    return name, Tensor(file, shape, kind, offset)


@functools.cache
def _dequantises(kind: str) -> bool:
    """Whether the library can dequantise a type."""
    import gguf

    code = gguf.GGMLQuantizationType[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[code][1]), np.uint8), code)
    except NotImplementedError:
        return False
    return True


def _check_places(tensors: Mapping[str, Tensor], start: int, size: int, alignment: int) -> None:
    """Raises ValueError unless the tensors fill the file after the header, each padded to the alignment."""
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise ValueError(f'{name} begins at byte {tensor.offset} instead of {end}')
        if end + tensor.nbytes > size:
            raise ValueError(f'{name} ends at byte {end + tensor.nbytes}, but the file has {size} bytes')
        end += -(-tensor.nbytes // alignment) * alignment
    if size > end:
        raise ValueError(f'{size - end} bytes belong to no tensor')
