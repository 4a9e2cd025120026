"""The interface of all writers, and the parts that leaves are written in.

A part is a whole leaf, one expert of a leaf, or some rows of a large leaf. Zarr formats store each part as a chunk
(`folder_writer`), so that any expert-parallel layout reads only its local experts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from upcycle import files
from upcycle.checkpoints import arrays, views
from upcycle.errors import UserError

Leaves = Mapping[str, jax.ShapeDtypeStruct]
Region = views.Region
Check = Callable[[arrays.ArrayReader], None]
WHOLE: Region = ()

EXPERT = 'expert'  # path segment of leaves whose first axis is the expert axis

_PART_BYTES = 64 << 20  # T5X's chunk size
_SMALL_BYTES = 1 << 20  # leaves up to this size are written whole, not expert by expert


@functools.lru_cache(maxsize=64)
def parts(name: str, leaf: jax.ShapeDtypeStruct) -> Sequence[Region]:
    """Cuts a leaf into parts of equal size: by experts, or by rows if it is large."""
    size = leaf.size * leaf.dtype.itemsize
    if size <= _SMALL_BYTES or not leaf.shape:
        return [WHOLE]
    rows = leaf.shape[0]
    count = rows if EXPERT in name.split('/') else -(-size // _PART_BYTES)
    # The last chunk is stored in full, so rows must divide evenly.
    count = next(n for n in range(count, rows + 1) if rows % n == 0) if count <= rows else rows
    each = rows // count
    return [WHOLE] if count == 1 else [(slice(i * each, (i + 1) * each),) for i in range(count)]


def chunk_shape(name: str, leaf: jax.ShapeDtypeStruct) -> list[int]:
    """Returns the shape of a part."""
    region = parts(name, leaf)[0]
    return list(leaf.shape) if region == WHOLE else [region[0].stop, *leaf.shape[1:]]


def start_of(region: Region) -> int:
    """Returns the first row of a part."""
    return region[0].start if region else 0


class WriteError(UserError):
    """The target cannot be written, for example because the disk is full or a permission is missing."""


def no_counterpart(name: str, format: str, content: str) -> UserError:
    """Returns the error for a leaf that a format, which only holds `content`, has no place for."""
    way_out = ': leave the optimizer state out with --optimizer_state=none' if name.startswith('opt_state/') else ''
    return UserError(f'{name} cannot be stored as {format}, which only holds {content}{way_out}.')


class Writer(Protocol):
    """Writes one checkpoint, which is invisible until `finish`.

    Attributes:
      path: of the finished checkpoint.
      left_out: leaves that the format does not need, and why.
    """

    path: str
    left_out: Mapping[str, str]

    def parts(self, name: str) -> Sequence[Region]:
        """Returns the parts that a leaf is written in."""

    def todo(self) -> dict[str, Sequence[Region]]:
        """Returns the missing parts of each leaf, in the order of `parts`; leaves are in the order preferred by the format."""

    def write(self, name: str, region: Region, value: np.ndarray) -> None:
        """Begins to write one part; blocks while too many bytes are in flight."""

    def finish(self, metadata: Mapping[str, Any], check: Check = lambda reader: None) -> None:
        """Waits for all writes, calls `check` on the result, which may raise, and gives the checkpoint its final name."""

    def close(self) -> None:
        """Waits for writes in flight and releases all resources.

        An unfinished checkpoint stays if the same command can continue it, and is removed otherwise.
        """

    def discard(self) -> None:
        """Removes everything written."""


@contextlib.contextmanager
def not_refused(place: epath.Path, name: str = '') -> Iterator[None]:
    """Converts errors of a local disk.

    Args:
      place: the file or folder.
      name: the leaf that is written; '' for anything else.

    Raises:
      WriteError: the disk refuses the write.
    """
    try:
        yield
    except OSError as error:
        if files.is_remote(place):
            raise
        sentence = f'{name} cannot be written to {place}' if name else f'{place} cannot be written'
        reason = error.strerror or error
        raise WriteError(
            f'{sentence} ({reason}): make room or change its permissions, and repeat the command.'
        ) from error
