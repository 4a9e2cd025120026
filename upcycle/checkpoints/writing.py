"""What the writers share: the contract of a writer, and how a leaf is cut into parts.

A part is a leaf, one expert of a leaf, or some rows of a large one. Formats of zarr arrays make it a chunk on disk
(`folder_writer`), so that any expert-parallel layout reads only its own experts.
"""

from __future__ import annotations

import contextlib
import functools
import math
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

EXPERT = 'expert'  # the segment below which a leaf has experts in front

_PART_BYTES = 64 << 20  # T5X's size of a chunk
_SMALL_BYTES = 1 << 20  # not worth a file for each expert


@functools.lru_cache(maxsize=64)
def parts(name: str, leaf: jax.ShapeDtypeStruct) -> Sequence[Region]:
    """How a leaf is cut for writing: by experts, or by rows where it is large. All parts have the same size."""
    size = math.prod(leaf.shape) * leaf.dtype.itemsize
    if size <= _SMALL_BYTES or not leaf.shape:
        return [WHOLE]
    rows = leaf.shape[0]
    count = rows if EXPERT in name.split('/') else -(-size // _PART_BYTES)
    # A chunk at the edge is stored in full, so rows divide evenly.
    count = next(n for n in range(count, rows + 1) if rows % n == 0) if count <= rows else rows
    each = rows // count
    return [WHOLE] if count == 1 else [(slice(i * each, (i + 1) * each),) for i in range(count)]


def chunk_shape(name: str, leaf: jax.ShapeDtypeStruct) -> list[int]:
    """Shape of a part."""
    region = parts(name, leaf)[0]
    return list(leaf.shape) if region == WHOLE else [region[0].stop, *leaf.shape[1:]]


class WriteError(UserError):
    """The target cannot be written: the disk is full, a permission is missing."""


class Writer(Protocol):
    """A checkpoint in the making; it is invisible until `finish`.

    Attributes:
        path: where it will be.
        left_out: leaves that the format has no place for and no need of, and why.
    """

    path: str
    left_out: Mapping[str, str]

    def todo(self) -> dict[str, list[Region]]:
        """The parts of each leaf that are still to be written, leaves in an order that suits the format.

        Each is one of `parts`, in their order.
        """
        ...

    def write(self, name: str, region: Region, value: np.ndarray) -> None:
        """Begins to write one part, and waits while too much is on its way."""
        ...

    def finish(self, metadata: Mapping[str, Any], check: Check = lambda reader: None) -> None:
        """Waits for everything, lets `check` read it back and object, and gives the checkpoint its name."""
        ...

    def close(self) -> None:
        """Waits for writes in flight and releases everything. An unfinished checkpoint stays for the same command to continue, or
        is removed where none could."""
        ...

    def discard(self) -> None:
        """Removes what was written."""
        ...


@contextlib.contextmanager
def not_refused(place: epath.Path, name: str = '') -> Iterator[None]:
    """Around writing to a local disk.

    Args:
        place: the file or folder.
        name: of the leaf that is written; '': anything else.

    Raises:
        WriteError: the disk takes no more.
    """
    try:
        yield
    except OSError as error:
        if files.is_remote(place):
            raise
        sentence = f'{name} cannot be written to {place}' if name else f'{place} cannot be written'
        raise WriteError(f'{sentence} ({error}).') from error
