"""The container `.npz`: a zip of `.npy` files, read lazily, one array or some of its rows at a time.

Not NumPy's own `load`, which reads and unpickles whole arrays: here nothing is ever unpickled, and no array's bytes are touched
before it is read.
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

from upcycle.checkpoints import arrays, json_files, views
from upcycle.errors import UserError

METADATA = 'metadata.json'  # our member of the archive; programs that read parameters only never look at it

# No deflated byte stands for more.
_MOST_COMPRESSION = 1032


class Archive:
    """A zip file, opened once in each thread: members of one `ZipFile` disturb each other where threads open or seek them (in
    Python 3.12.1, whose `_SharedFile.seek` goes on from wherever another left the file)."""

    def __init__(self, file: epath.Path):
        self._file = file
        self._local = threading.local()

    @property
    def zip(self) -> zipfile.ZipFile:
        """This thread's."""
        if not hasattr(self._local, 'zip'):
            self._local.zip = zipfile.ZipFile(self._file.open('rb'))
        return self._local.zip


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
        # NumPy has no name for bfloat16 and stores two bytes of nothing in particular.
        return np.dtype(ml_dtypes.bfloat16) if self.stored_dtype == np.dtype('V2') else self.stored_dtype

    def read(self, region: views.Region) -> np.ndarray:
        """See `views.Lazy`."""
        if self.fortran_order or not self.shape:
            whole = self._bytes(0, self._size)
            shaped = whole.reshape(self.shape[::-1]).T if self.fortran_order else whole.reshape(self.shape)
            return shaped[region]
        # Leading rows, such as a layer of a stack, lie in one piece.
        rows, *inside = views.bounds(region, self.shape)
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        count = rows.stop - rows.start
        read = self._bytes(rows.start * row_bytes, count * row_bytes).reshape(count, *self.shape[1:])
        return read[(slice(None), *inside)]

    def _bytes(self, start: int, count: int) -> np.ndarray:
        out = np.empty(count, np.uint8)
        view, done = memoryview(out), 0
        if count < self._size:
            _ = self._is_whole
        with self.archive.zip.open(self.info) as file:
            # Read and not sought, because zipfile compares a checksum only for a member that is read from end to end.
            file.read(self.header_bytes)
            if start:
                file.seek(self.header_bytes + start)
            while done < count:
                got = file.readinto(view[done:])
                if not got:
                    raise ValueError(f'{count - done} bytes are missing')
                done += got
        return out.view(self.dtype)

    @property
    def _size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @functools.cached_property
    def _is_whole(self) -> bool:
        """Reads the whole member once, for its checksum, before parts of it are believed.

        Raises:
            zipfile.BadZipFile: the checksum differs.
        """
        with self.archive.zip.open(self.info) as file:
            while file.read(1 << 20):
                pass
        return True


def read_members(file: epath.Path) -> tuple[dict[str, Member], dict[str, Any] | None]:
    """The arrays of the archive by name, from their headers alone, and our metadata if it has any."""
    members: dict[str, Member] = {}
    metadata = None
    try:
        archive = Archive(file)
        size = file.stat().length
        for info in archive.zip.infolist():
            if info.compress_size > size or info.file_size > _MOST_COMPRESSION * (info.compress_size + 1):
                raise UserError(
                    f'{info.filename} of {file} claims {info.file_size} bytes, and the file has {size}: copy the file again.'
                )
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
        raise UserError(
            f'{name} of {file} should be {dtype}{list(shape)} and has {info.file_size - header_bytes} bytes: '
            'copy the file again.'
        )
    return Member(archive, info, shape, dtype, fortran_order, header_bytes)
