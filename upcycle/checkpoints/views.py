"""Lazy views of lazy arrays: transposed, with an axis split or joined, a layer of a stack, a stack of tensors.

Reading a region of a view reads only the region of each source that it covers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

import numpy as np

READ_BYTES = 64 << 20  # of a file at a time

# A slice without step for each leading axis; the other axes are whole, so `()` is the whole array.
Region = tuple[slice, ...]


class Lazy(Protocol):
    """An array with known shape and dtype that is read on demand."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, region: Region) -> np.ndarray:
        """Reads a region, in any memory order. May raise errors of the format's library for a damaged file."""


def read_into(file: BinaryIO, out: np.ndarray) -> None:
    """Fills a contiguous array from a file. Raises ValueError if the file is too short."""
    view, done = memoryview(out.reshape(-1).view(np.uint8)), 0
    while done < len(view):
        part = view[done : done + READ_BYTES]
        if hasattr(file, 'readinto'):
            count = file.readinto(part)
        else:  # TensorFlow's files in buckets
            count = len(data := file.read(len(part)))
            part[:count] = data
        if not count:
            raise ValueError(f'{len(view) - done} bytes are missing')
        done += count


def bounds(region: Region, shape: tuple[int, ...]) -> Region:
    """Returns a region with explicit start and stop for every axis."""
    every = (*region, *[slice(None)] * (len(shape) - len(region)))
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(every, shape, strict=True))


@dataclasses.dataclass(frozen=True)
class _View:
    """Base of the views of one source."""

    source: Lazy

    @property
    def dtype(self) -> np.dtype:
        return self.source.dtype


@dataclasses.dataclass(frozen=True)
class Transposed(_View):
    """The source with permuted axes, as by `np.transpose`.

    Raises:
      ValueError: the source has another number of axes.
    """

    axes: tuple[int, ...]

    def __post_init__(self):
        if len(self.axes) != len(self.source.shape):
            raise ValueError(f'it has {len(self.source.shape)} axes instead of {len(self.axes)}')

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape[axis] for axis in self.axes)

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`."""
        ours = bounds(region, self.shape)
        theirs = tuple(ours[self.axes.index(axis)] for axis in range(len(self.axes)))
        return self.source.read(theirs).transpose(self.axes)


def reversed_axes(source: Lazy) -> Transposed:
    """Returns the transpose, `source.T`."""
    return Transposed(source, tuple(reversed(range(len(source.shape)))))


@dataclasses.dataclass(frozen=True)
class SplitAxis(_View):
    """The source with one axis split: (..., count * size, ...) becomes (..., count, size, ...).

    Raises:
      ValueError: the source has no such axis, or its size is not a multiple of `count`.
    """

    axis: int
    count: int

    def __post_init__(self):
        shape = self.source.shape
        if self.axis >= len(shape) or shape[self.axis] % self.count:
            raise ValueError(f'axis {self.axis} of {list(shape)} cannot be split into {self.count}')

    @property
    def shape(self) -> tuple[int, ...]:
        before, size, after = _around(self.source.shape, self.axis)
        return (*before, self.count, size // self.count, *after)

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`. Reads whole pieces."""
        before, pieces, (inside, *after) = _around(bounds(region, self.shape), self.axis)
        size = self.shape[self.axis + 1]
        value = self.source.read((*before, slice(pieces.start * size, pieces.stop * size), *after))
        count = pieces.stop - pieces.start
        split = value.reshape((*value.shape[: self.axis], count, size, *value.shape[self.axis + 1 :]))
        return split[(slice(None),) * (self.axis + 1) + (inside,)]


@dataclasses.dataclass(frozen=True)
class JoinedAxes(_View):
    """The source with `axis` and the next axis joined: (..., count, size, ...) becomes (..., count * size, ...)."""

    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        before, count, (size, *after) = _around(self.source.shape, self.axis)
        return (*before, count * size, *after)

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`. Reads whole indices of the first of the two axes."""
        before, joined, after = _around(bounds(region, self.shape), self.axis)
        size = self.source.shape[self.axis + 1]
        first, last = joined.start // size, -(-joined.stop // size)
        value = self.source.read((*before, slice(first, last), slice(0, size), *after))
        value = value.reshape((*value.shape[: self.axis], (last - first) * size, *value.shape[self.axis + 2 :]))
        wanted = slice(joined.start - first * size, joined.stop - first * size)
        return value[(slice(None),) * self.axis + (wanted,)]


@dataclasses.dataclass(frozen=True)
class Layer(_View):
    """One index of an axis of the source, such as a layer of a stack."""

    axis: int
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        before, _, after = _around(self.source.shape, self.axis)
        return (*before, *after)

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`."""
        ours = bounds(region, self.shape)
        theirs = (*ours[: self.axis], slice(self.index, self.index + 1), *ours[self.axis :])
        return self.source.read(theirs).squeeze(self.axis)


@dataclasses.dataclass(frozen=True)
class Scaled(_View):
    """The source times a number, in the source's type."""

    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`."""
        return self.source.read(region) * np.asarray(self.scale, self.dtype)


@dataclasses.dataclass(frozen=True)
class Window(_View):
    """A region of the source."""

    region: Region

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(part.stop - part.start for part in bounds(self.region, self.source.shape))

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`."""
        outer = bounds(self.region, self.source.shape)
        inner = bounds(region, self.shape)
        pairs = zip(outer, inner, strict=True)
        return self.source.read(tuple(slice(o.start + i.start, o.start + i.stop) for o, i in pairs))


@dataclasses.dataclass(frozen=True)
class Stacked:
    """A stack of sources of equal shape along a new leading axis, such as the experts of an MoE layer.

    Raises:
      ValueError: there is no source, or shapes or dtypes differ.
    """

    sources: tuple[Lazy, ...]

    def __post_init__(self):
        kinds = {f'{source.dtype}{list(source.shape)}' for source in self.sources}
        if len(kinds) != 1:
            raise ValueError(f'they must be of one shape and dtype, not {" and ".join(sorted(kinds))}')

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.sources), *self.sources[0].shape)

    @property
    def dtype(self) -> np.dtype:
        return self.sources[0].dtype

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`. Reads one source at a time, so that memory holds the result and one source."""
        rows, *inside = bounds(region, self.shape)
        out = np.empty((rows.stop - rows.start, *(part.stop - part.start for part in inside)), self.dtype)
        for row, source in zip(out, self.sources[rows], strict=True):
            row[...] = source.read(tuple(inside))
        return out


@dataclasses.dataclass(frozen=True)
class Computed:
    """A function of sources. For small arrays, because reading any region computes the whole.

    Attributes:
      shape, dtype: of the result.
      sources: the arguments.
      compute: the function.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sources: tuple[Lazy, ...]
    compute: Callable[..., np.ndarray]

    def read(self, region: Region) -> np.ndarray:
        """See `Lazy`."""
        return self.compute(*(source.read(()) for source in self.sources))[region]


def _around(axes: tuple, axis: int) -> tuple[tuple, Any, tuple]:
    """Splits a tuple into the entries before an axis, at it, and after it."""
    return tuple(axes[:axis]), axes[axis], tuple(axes[axis + 1 :])
