"""The writer of checkpoints that are folders of zarr arrays: ours and T5X's.

On a disk, parts are written to a staging folder, which is renamed at the end. A journal records finished parts, and the same
command continues from there after an interruption. In a bucket, which cannot rename and append, parts are written under their
final names and a commit file last; an unfinished checkpoint is removed.
"""

from __future__ import annotations

import collections
import concurrent.futures
import os
import pathlib
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from upcycle import files, outputs
from upcycle.checkpoints import arrays, staging, writing
from upcycle.checkpoints.journal import Journal, Part

# Suffixes of unfinished checkpoints, which `open_checkpoint` recognises.
STAGING = {'upcycle': '.orbax-checkpoint-tmp', 't5x_orbax': '.orbax-checkpoint-tmp', 't5x_legacy': '.tmp-upcycle'}

_BYTES_IN_FLIGHT = 256 << 20
_ARRAYS_AHEAD = 16


class Layout:
    """One format of zarr arrays in a folder.

    Attributes:
      format: name of the format.
      state: folder of the arrays, below the step's.
      reader: opens a committed folder, which may still have its temporary name.
    """

    format: str
    state: str
    reader: type[arrays.ArrayReader]

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """Returns the step's folder below the path that the user named."""
        raise NotImplementedError

    def place(self, leaves: writing.Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Returns the keys of each leaf in the format's tree, and the leaves left out with the reason.

        Raises:
          UserError: the format has no place for a leaf.
        """
        raise NotImplementedError

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """Whether the array is stored in the index."""
        return False

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """Returns TensorStore's driver of an array and its metadata, with a checksum for every chunk."""
        raise NotImplementedError

    def commit(self, writer: FolderWriter, metadata: Mapping[str, Any]) -> None:
        """Writes the index and the metadata."""
        raise NotImplementedError


class FolderWriter:
    """A `writing.Writer` of zarr arrays.

    Args:
      layout: the format.
      path: the path that the user named.
      leaves: all leaves to write.
      step: of the checkpoint; None if unknown.
      identity: JSON that identifies source and result; an interrupted write continues only if it is equal.
      alike: leaves whose rows are all equal. On a disk, their parts are hard links to one file.

    Raises:
      UserError: the path exists or holds another interrupted write, the format has no place for a leaf, or the disk is full.
    """

    def __init__(
        self,
        layout: Layout,
        path: epath.Path,
        leaves: writing.Leaves,
        step: int | None,
        identity: Mapping[str, Any],
        alike: Collection[str] = (),
    ):
        self._layout = layout
        self.keys, self.left_out = layout.place(leaves)
        self.leaves = {name: leaves[name] for name in self.keys}
        self._alike = frozenset(alike)
        self._final = layout.final(path, step)
        arrays.kvstore(self._final)  # refuses a name that cannot be opened, before anything is made
        self.path = os.fspath(self._final)
        outputs.refuse_existing(self._final)
        remote = files.is_remote(self._final)
        self._finished = False
        self.folder = self._final if remote else self._final.parent / (self._final.name + STAGING[layout.format])
        self.inline: dict[str, np.ndarray] = {}
        self._opened: dict[str, ts.Future] = {}
        self._order = list(self.leaves)
        self._in_flight: collections.deque[tuple[str, writing.Region, int, Any]] = collections.deque()
        self._bytes_in_flight = 0
        # No sync per file, which is slow for small ones: the journal calls `os.sync` for many files at once.
        self._context = ts.Context({'file_io_concurrency': {'limit': 16}, 'file_io_sync': False})
        self._done: set[Part] = set()
        self._copies = concurrent.futures.ThreadPoolExecutor(4)
        self._made: list[epath.Path] = []
        self._claim: staging.Claim | None = None
        self._journal = None if remote else self._begin(identity)

    def parts(self, name: str) -> Sequence[writing.Region]:
        """See `writing.Writer`."""
        return writing.parts(name, self.leaves[name])

    def todo(self) -> dict[str, list[writing.Region]]:
        """See `writing.Writer`."""
        left = {
            name: [region for region in self.parts(name) if (name, writing.start_of(region)) not in self._done]
            for name in self.leaves
        }
        return {name: regions for name, regions in left.items() if regions}

    def write(self, name: str, region: writing.Region, value: np.ndarray) -> None:
        """See `writing.Writer`."""
        leaf = self.leaves[name]
        shape = leaf.shape if region == writing.WHOLE else (region[0].stop - region[0].start, *leaf.shape[1:])
        if value.shape != shape or value.dtype != leaf.dtype:
            raise ValueError(f'{name} is {value.dtype}{value.shape} instead of {leaf.dtype}{shape}')
        if self._layout.is_inline(self.keys[name]):
            self.inline[name] = np.array(value)
            return
        while self._in_flight and self._bytes_in_flight + value.nbytes > _BYTES_IN_FLIGHT:
            self._settle_one()
        if self._journal is not None and self._is_like_first(name, region):
            first = writing.parts(name, leaf)[0]
            while (name, writing.start_of(first)) not in self._done:
                self._settle_one()
            future: Any = self._copies.submit(_link_or_copy, self._chunk(name, first), self._chunk(name, region))
        else:
            array = self._open(name)
            future = (array if region == writing.WHOLE else array[region]).write(value)
        self._in_flight.append((name, region, value.nbytes, future))
        self._bytes_in_flight += value.nbytes

    def put(self, keys: tuple[str, ...], value: np.ndarray) -> ts.Future:
        """Begins to write an array that is not one of our leaves, such as a placeholder."""
        leaf = jax.ShapeDtypeStruct(value.shape, value.dtype)
        spec = self._spec(keys, leaf, list(value.shape))
        return ts.open(spec, create=True, open=True, context=self._context).result().write(value)

    def finish(self, metadata: Mapping[str, Any], check: writing.Check = lambda reader: None) -> None:
        """See `writing.Writer`."""
        self._settle()
        missing = [name for name in self.todo() if name not in self.inline]
        if missing:
            raise ValueError(f'not written: {missing[:3]}')
        with writing.not_refused(self.folder), files.patient():
            self._layout.commit(self, metadata)
        check(self._layout.reader(self.folder))
        self._let_go()
        if self._journal is not None:
            self._journal.remove()
            os.sync()
            staging.give_name(self.folder, self._final, outputs.Kind.NEW_FOLDER)
        self._finished = True

    def close(self) -> None:
        """See `writing.Writer`."""
        if self._journal is None and not self._finished:
            self.discard()
        self._let_go()

    def _let_go(self) -> None:
        self._settle()
        if self._journal is not None:
            self._journal.close()
        self._copies.shutdown()
        if self._claim is not None:
            self._claim.release()

    def discard(self) -> None:
        """See `writing.Writer`."""
        # Wait for arrays made ahead, too, which would create files in a removed folder.
        for future in [*self._opened.values(), *(future for _, _, _, future in self._in_flight)]:
            future.exception()
        self._in_flight.clear()
        if self._journal is not None:
            self._journal.forget()
        self._finished = True
        staging.remove(self.folder)
        for parent in self._made:
            parent.rmdir()

    def _begin(self, identity: Mapping[str, Any]) -> Journal:
        """Claims the folder, and continues an interrupted write of the same checkpoint."""
        journal = Journal(self.folder, identity)
        self._done = set(journal.done)
        linked = _has_links(self._final.parent)
        needed = sum(
            self.leaves[name].size * self.leaves[name].dtype.itemsize // len(writing.parts(name, self.leaves[name]))
            for name, regions in self.todo().items()
            for region in regions
            if not (linked and self._is_like_first(name, region))
        )
        outputs.check_space(self._final.parent, needed)
        self._made = staging.make_folders(self._final.parent)
        self._claim = staging.Claim(self.folder, self._final, outputs.Kind.NEW_FOLDER)
        journal.open()
        return journal

    def _is_like_first(self, name: str, region: writing.Region) -> bool:
        return name in self._alike and writing.start_of(region) > 0

    def _open(self, name: str) -> ts.TensorStore:
        # The next arrays are created in the background, because creating a file waits for other work of the disk.
        first = self._order.index(name)
        for other in self._order[first : first + _ARRAYS_AHEAD]:
            if other not in self._opened and not self._layout.is_inline(self.keys[other]):
                leaf = self.leaves[other]
                spec = self._spec(self.keys[other], leaf, writing.chunk_shape(other, leaf))
                # Never `delete_existing`: an interrupted write may have left parts.
                self._opened[other] = ts.open(spec, create=True, open=True, context=self._context)
        return self._opened[name].result()

    def _spec(self, keys: tuple[str, ...], leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        store = arrays.kvstore(self._array(keys))
        # Zeros are stored, too, so that a missing chunk is an error.
        spec = {'kvstore': store, 'dtype': leaf.dtype.name, 'store_data_equal_to_fill_value': True}
        return spec | self._layout.zarr(leaf, chunks)

    def _chunk(self, name: str, region: writing.Region) -> str:
        """Returns the file of a part on a local disk."""
        leaf = self.leaves[name]
        index = [writing.start_of(region) // writing.chunk_shape(name, leaf)[0]] + [0] * (len(leaf.shape) - 1)
        return os.fspath(self._array(self.keys[name]) / '.'.join(map(str, index)))

    def _array(self, keys: tuple[str, ...]) -> epath.Path:
        return (self.folder / self._layout.state if self._layout.state else self.folder) / '.'.join(keys)

    def _settle(self) -> None:
        while self._in_flight:
            self._settle_one()

    def _settle_one(self) -> None:
        name, region, size, future = self._in_flight.popleft()
        self._bytes_in_flight -= size
        try:
            future.result()
        except (ValueError, OSError) as error:
            if refusal := files.refused_by_bucket(error, [self.path]):
                raise refusal from error
            reason = ' '.join(str(error).partition(' [')[0].split())
            raise writing.WriteError(f'{name} cannot be written to {self.folder} ({reason}).') from error
        self._done.add((name, writing.start_of(region)))
        if self._journal is not None:
            self._journal.add((name, writing.start_of(region)))


def _link_or_copy(source: str, target: str) -> None:
    """Makes a hard link, or a copy. Links are safe because TensorStore replaces chunk files and never writes into them."""
    # A link cannot replace a file left by an interrupted write.
    pathlib.Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the disk does not support links, or the file has too many
        shutil.copyfile(source, target + '.tmp')
        os.replace(target + '.tmp', target)


def _has_links(folder: epath.Path) -> bool:
    """Whether the disk of a local folder, which may not exist yet, supports hard links."""
    try:
        with tempfile.TemporaryDirectory(dir=outputs.nearest(os.fspath(folder))) as place:
            file = pathlib.Path(place, 'one')
            file.touch()
            os.link(file, file.with_name('two'))
    except OSError:
        return False
    return True
