"""Writes of large local files past the page cache.

The system needs 0.5 to 2 s of CPU time for the pages of each GB that is written through the cache, and 0.1 s past it.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
from typing import Any

import numpy as np
from etils import epath

BLOCK = 4096  # bytes; direct writes are whole blocks, from memory that is aligned to blocks
BUFFER = 8 << 20  # bytes at a time, because an interruption waits for a write


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Returns uninitialised memory that is written without a copy, and that XLA uses without one."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + BLOCK, np.uint8)
    start = -memory.ctypes.data % BLOCK
    return memory[start : start + size].view(dtype).reshape(shape)


class DirectFile:
    """A local file that is written in any order. What an earlier writer has left in it stays.

    Whole blocks are written past the cache if the file system allows it, and the rest through the cache.

    Args:
      path: of the file, which is made if it does not exist.
      buffer: aligned memory of `BUFFER` bytes, which files that are not written at the same time can share.
    """

    def __init__(self, path: epath.Path, buffer: np.ndarray):
        self._buffer = buffer
        self._cached = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._direct: int | None = None
        if hasattr(os, 'O_DIRECT'):
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT)

    def write(self, data: memoryview | bytes, offset: int) -> None:
        """Writes bytes at an offset. Raises OSError if the disk refuses them."""
        left = np.frombuffer(data, np.uint8)
        while left.size:
            to_block = -offset % BLOCK
            piece = left[: to_block or BUFFER]
            blocks = piece[: 0 if to_block else piece.size // BLOCK * BLOCK]
            written = self._write_blocks(blocks, offset) or os.pwrite(self._cached, piece, offset)
            left, offset = left[written:], offset + written

    def _write_blocks(self, blocks: np.ndarray, offset: int) -> int:
        """Writes whole blocks past the cache; returns the bytes written, 0 if the file system does not allow it."""
        if self._direct is None or not blocks.size:
            return 0
        if blocks.ctypes.data % BLOCK:
            np.copyto(self._buffer[: blocks.size], blocks)
            blocks = self._buffer[: blocks.size]
        try:
            return os.pwrite(self._direct, blocks, offset)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            os.close(self._direct)
            self._direct = None
            return 0

    def finish(self, size: int) -> None:
        """Cuts the file to a size, since an earlier one may have been longer, waits until it is on the disk, and closes it."""
        try:
            os.ftruncate(self._cached, size)
            os.fsync(self._cached)
        finally:
            self.close()

    def close(self) -> None:
        """Closes the file, even if the disk is full."""
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
