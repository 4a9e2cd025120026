"""The container `.npz`: a zip of `.npy` files, read lazily, one array or some of its rows at a time.

Unlike `numpy.load`, this module never unpickles, and can read parts of arrays.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import threading
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from upcycle import files
from upcycle.checkpoints import arrays, json_files, views
from upcycle.errors import UserError

METADATA = 'metadata.json'  # our member of the archive, ignored by programs that read parameters only

_MOST_COMPRESSION = 1032  # the largest ratio of deflate


class Archive(threading.local):
    """A zip file, opened once per thread.

    Threads must not share a `ZipFile`: in Python 3.12.1, `_SharedFile.seek` starts from another thread's position.
    """

    def __init__(self, file: epath.Path):
        self.zip = zipfile.ZipFile(file.open('rb'))


@dataclasses.dataclass(frozen=True)
class Member:
    """One `.npy` file of the archive, a `Lazy` array."""

    archive: Archive
    info: zipfile.ZipInfo
    shape: tuple[int, ...]
    stored_dtype: np.dtype
    fortran_order: bool
    header_bytes: int

    @property
    def dtype(self) -> np.dtype:
        # NumPy stores bfloat16 as two bytes of type void.
        return np.dtype(ml_dtypes.bfloat16) if self.stored_dtype == np.dtype('V2') else self.stored_dtype

    def read(self, region: views.Region) -> np.ndarray:
        """See `views.Lazy`."""
        if self.fortran_order or not self.shape:
            whole = self._bytes(0, self._size)
            shaped = whole.reshape(self.shape[::-1]).T if self.fortran_order else whole.reshape(self.shape)
            return shaped[region]
        # Leading rows, such as a layer of a stack, are contiguous.
        rows, *inside = views.bounds(region, self.shape)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = rows.stop - rows.start
        read = self._bytes(rows.start * row_bytes, count * row_bytes).reshape(count, *self.shape[1:])
        return read[(slice(None), *inside)]

    def _bytes(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        if count < self._size:
            _ = self._is_whole
        with self.archive.zip.open(self.info) as file:
            # Read the header instead of seeking, because zipfile only checks members that are read from start to end.
            file.read(self.header_bytes)
            if start:
                file.seek(self.header_bytes + start)
            views.read_into(file, out)
        return out.view(self.dtype)

    @property
    def _size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def _is_whole(self) -> bool:
        """Checks the checksum of the whole member, once before its first partial read.

        Raises:
          zipfile.BadZipFile: the checksum differs.
        """
        with self.archive.zip.open(self.info) as file:
            while file.read(1 << 20):
                pass
        return True


def read_members(file: epath.Path) -> tuple[dict[str, Member], dict[str, Any] | None]:
    """Returns the arrays of the archive by name, from their headers alone, and our metadata or None."""
    members: dict[str, Member] = {}
    metadata = None
    try:
        archive = Archive(file)
        size = file.stat().length
        for info in archive.zip.infolist():
            if info.compress_size > size or info.file_size > _MOST_COMPRESSION * (info.compress_size + 1):
                reason = f'it claims {info.file_size} bytes, but the file has {size}'
                raise files.damaged(f'{info.filename} of {file}', reason)
            name = info.filename.removesuffix('.npy')
            if name in members:
                raise UserError(f'{file} holds two arrays named {name}.')
            if name == METADATA:
                metadata = json_files.checked_metadata(str(file), json.loads(archive.zip.read(info)))
            else:
                members[name] = _header(file, archive, info)
    except (*arrays.DAMAGE, RecursionError) as error:
        raise UserError(
            f'{file} is not a zip archive of arrays (.npz), or is damaged ({error}); nothing in it was unpickled.'
        ) from error
    return members, metadata


def _header(file: epath.Path, archive: Archive, info: zipfile.ZipInfo) -> Member:
    name = info.filename.removesuffix('.npy')
    try:
        with archive.zip.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran_order, dtype = parse(stream)
            header_bytes = stream.tell()
    except arrays.DAMAGE as error:
        raise UserError(f'{name} of {file} is not an array, or is damaged ({error}): copy the file again.') from error
    if dtype.hasobject:
        raise UserError(f'{name} of {file} holds pickled Python objects, which are never opened.')
    if header_bytes + math.prod(shape) * dtype.itemsize != info.file_size:
        reason = f'{dtype}{list(shape)} does not fit into its {info.file_size - header_bytes} bytes'
        raise files.damaged(f'{name} of {file}', reason)
    return Member(archive, info, shape, dtype, fortran_order, header_bytes)
