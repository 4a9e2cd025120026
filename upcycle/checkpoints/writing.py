"""What the writers share: a checkpoint is written part by part into a staging folder and renamed when it is whole.

A part is a leaf, one expert of a leaf, or some rows of a large one. Each is a chunk of its own on disk, so that any
expert-parallel layout reads only its own experts. What is finished is noted in a journal, and the same command goes on from
there after a cut. In a bucket, which cannot rename and append, parts are written under their final names and a commit file last;
what cannot be finished is removed. Formats of whole files are put together in a `Staging` place.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import json
import math
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import tensorstore as ts
from etils import epath

from upcycle import files, outputs, warning
from upcycle.checkpoints import arrays
from upcycle.errors import UserError

Leaves = Mapping[str, jax.ShapeDtypeStruct]
Region = arrays.Region
Check = Callable[[arrays.ArrayReader], None]
WHOLE: arrays.Region = ()

EXPERT = 'expert'  # the segment below which a leaf has experts in front
JOURNAL = 'journal.jsonl'
# Of a checkpoint that is being written; `open_checkpoint` knows both endings.
STAGING = {'upcycle': '.orbax-checkpoint-tmp', 't5x_orbax': '.orbax-checkpoint-tmp', 't5x_legacy': '.tmp-upcycle'}

_PART_BYTES = 64 << 20  # T5X's size of a chunk
_SMALL_BYTES = 1 << 20  # not worth a file for each expert
_BYTES_IN_FLIGHT = 256 << 20
_ARRAYS_AHEAD = 16
_SECONDS_BETWEEN_SYNCS = 5.0


@functools.lru_cache(maxsize=64)
def parts(name: str, leaf: jax.ShapeDtypeStruct) -> Sequence[arrays.Region]:
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

    def todo(self) -> dict[str, list[arrays.Region]]:
        """The parts of each leaf that are still to be written, leaves in an order that suits the format."""
        ...

    def write(self, name: str, region: arrays.Region, value: np.ndarray) -> None:
        """Begins to write one part, and waits while too much is on its way."""
        ...

    def finish(self, metadata: Mapping[str, Any], check: Check = lambda reader: None) -> None:
        """Waits for everything, lets `check` read it back and object, and gives the checkpoint its name."""
        ...

    def close(self) -> None:
        """Waits for what is on its way and lets go. What is not finished stays for the same command to go on from, or is removed
        where none could."""
        ...

    def discard(self) -> None:
        """Removes what was written."""
        ...


class Layout(Protocol):
    """One format of zarr arrays in a folder.

    Attributes:
        format: its name.
        state: folder of the arrays, below the step's.
    """

    format: str
    state: str

    def final(self, path: epath.Path, step: int | None) -> epath.Path:
        """The step's folder below the path that the user named."""
        ...

    def place(self, leaves: Leaves) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """The keys of each leaf in the format's tree, and the leaves left out with the reason.

        Raises:
            UserError: a leaf has no counterpart.
        """
        ...

    def is_inline(self, keys: tuple[str, ...]) -> bool:
        """Whether the array lies in the index."""
        ...

    def zarr(self, leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        """TensorStore's driver of an array and its metadata, with a checksum for every chunk."""
        ...

    def commit(self, writer: FolderWriter, metadata: Mapping[str, Any]) -> None:
        """Writes what stands beside the arrays."""
        ...

    def reader(self, folder: epath.Path) -> arrays.ArrayReader:
        """Reads a committed folder, whatever its name."""
        ...


class FolderWriter:
    """A `Writer` of zarr arrays.

    Args:
        layout: the format.
        path: what the user named.
        leaves: everything that will be written.
        step: of the checkpoint, None where it is unknown.
        identity: what is being written from what, as JSON; a cut write is gone on with only where it is the same.
        alike: leaves whose rows are all the same. On a disk, the files of their parts are one file with several names.

    Raises:
        UserError: the target exists, a leaf has no counterpart, there is too little space, or what lies there is the beginning of
            another write.
    """

    def __init__(
        self,
        layout: Layout,
        path: epath.Path,
        leaves: Leaves,
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
        self._in_flight: collections.deque[tuple[str, arrays.Region, int, Any]] = collections.deque()
        self._bytes_in_flight = 0
        # Not file by file, which is slow for small ones: `os.sync` makes many of them safe at once.
        self._context = ts.Context({'file_io_concurrency': {'limit': 16}, 'file_io_sync': False})
        self._done: set[tuple[str, int]] = set()
        self._written: list[tuple[str, int]] = []  # and not yet known to be safe from a crash of the machine
        self._syncing: tuple[concurrent.futures.Future, list[tuple[str, int]]] | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._copies = concurrent.futures.ThreadPoolExecutor(4)
        self._synced = time.monotonic()
        self._made: list[epath.Path] = []
        self._claim: Claim | None = None
        self._journal = None if remote else self._begin(dict(identity))

    def todo(self) -> dict[str, list[arrays.Region]]:
        """See `Writer`."""
        left = {
            name: [region for region in parts(name, leaf) if (name, _start(region)) not in self._done]
            for name, leaf in self.leaves.items()
        }
        return {name: regions for name, regions in left.items() if regions}

    def write(self, name: str, region: arrays.Region, value: np.ndarray) -> None:
        """See `Writer`."""
        leaf = self.leaves[name]
        shape = leaf.shape if region == WHOLE else (region[0].stop - region[0].start, *leaf.shape[1:])
        if value.shape != shape or value.dtype != leaf.dtype:
            raise ValueError(f'{name} is {value.dtype}{value.shape}, and {leaf.dtype}{shape} was announced')
        if self._layout.is_inline(self.keys[name]):
            self.inline[name] = np.array(value)
            return
        while self._in_flight and self._bytes_in_flight + value.nbytes > _BYTES_IN_FLIGHT:
            self._settle_one()
        if self._journal is not None and self._is_like_first(name, region):
            first = parts(name, leaf)[0]
            while (name, _start(first)) not in self._done:
                self._settle_one()
            future: Any = self._copies.submit(_link_or_copy, self._chunk(name, first), self._chunk(name, region))
        else:
            array = self._open(name)
            future = (array if region == WHOLE else array[region]).write(value)
        self._in_flight.append((name, region, value.nbytes, future))
        self._bytes_in_flight += value.nbytes

    def put(self, keys: tuple[str, ...], value: np.ndarray) -> ts.Future:
        """Begins to write an array that is no leaf of ours, such as a placeholder."""
        leaf = jax.ShapeDtypeStruct(value.shape, value.dtype)
        spec = self._spec(keys, leaf, list(value.shape))
        return ts.open(spec, create=True, open=True, context=self._context).result().write(value)

    def finish(self, metadata: Mapping[str, Any], check: Check = lambda reader: None) -> None:
        """See `Writer`."""
        self._settle()
        missing = [name for name in self.todo() if name not in self.inline]
        if missing:
            raise ValueError(f'not written: {missing[:3]}')
        with not_refused(self.folder), files.patient():
            self._layout.commit(self, metadata)
        check(self._layout.reader(self.folder))
        self._let_go()
        if self._journal is not None:
            (self.folder / JOURNAL).unlink()
            os.sync()
            give_name(self.folder, self._final, outputs.Kind.NEW_FOLDER)
        self._finished = True

    def close(self) -> None:
        """See `Writer`."""
        if self._journal is None and not self._finished:
            self.discard()
        self._let_go()

    def _let_go(self) -> None:
        self._settle()
        if self._journal is not None and not self._journal.closed:
            self._note(wait=True)
            self._journal.close()
        self._pool.shutdown()
        self._copies.shutdown()
        if self._claim is not None:
            self._claim.release()

    def discard(self) -> None:
        """See `Writer`."""
        # Arrays that were made ahead too: they would put files into folders that are being removed.
        for future in [*self._opened.values(), *(future for _, _, _, future in self._in_flight)]:
            future.exception()
        self._in_flight.clear()
        self._written.clear()
        self._finished = True
        remove(self.folder)
        for parent in self._made:
            parent.rmdir()

    def _begin(self, identity: dict[str, Any]):
        """Opens the journal, after reading what an earlier attempt at the same has done."""
        identity = json.loads(json.dumps(identity))
        journal = self.folder / JOURNAL
        if self.folder.exists():
            lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
            # A torn last line is a part that is written again.
            read = [json.loads(line) for line in lines if line.endswith('\n')]
            if read and read[0] != identity:
                raise UserError(
                    f'{self.folder} is the beginning of another write ({_differences(read[0], identity)}): delete it, or name '
                    'another --to.'
                )
            self._done = {(name, start) for name, start in read[1:]}
        else:
            read = []
        linked = _has_links(self._final.parent)
        needed = sum(
            math.prod(chunk_shape(name, self.leaves[name])) * self.leaves[name].dtype.itemsize
            for name, regions in self.todo().items()
            for region in regions
            if not (linked and self._is_like_first(name, region))
        )
        outputs.check_space(self._final.parent, needed)
        self._made = make_folders(self._final.parent)
        self._claim = Claim(self.folder, self._final, outputs.Kind.NEW_FOLDER)
        with journal.open('w') as file:
            file.write(''.join(json.dumps(line) + '\n' for line in [identity, *sorted(self._done)]))
        return journal.open('a')

    def _is_like_first(self, name: str, region: arrays.Region) -> bool:
        return name in self._alike and _start(region) > 0

    def _open(self, name: str) -> ts.TensorStore:
        # The arrays that come next are made behind: a file's creation waits for what else the disk has to do.
        first = self._order.index(name)
        for other in self._order[first : first + _ARRAYS_AHEAD]:
            if other not in self._opened and not self._layout.is_inline(self.keys[other]):
                leaf = self.leaves[other]
                spec = self._spec(self.keys[other], leaf, chunk_shape(other, leaf))
                # Never `delete_existing`: parts of it may be there from before.
                self._opened[other] = ts.open(spec, create=True, open=True, context=self._context)
        return self._opened[name].result()

    def _spec(self, keys: tuple[str, ...], leaf: jax.ShapeDtypeStruct, chunks: list[int]) -> dict[str, Any]:
        store = arrays.kvstore(self._array(keys))
        # Zeros are stored too, so that a missing chunk is a lost one.
        spec = {'kvstore': store, 'dtype': leaf.dtype.name, 'store_data_equal_to_fill_value': True}
        return spec | self._layout.zarr(leaf, chunks)

    def _chunk(self, name: str, region: arrays.Region) -> str:
        """The file of a part on a local disk."""
        leaf = self.leaves[name]
        index = [_start(region) // chunk_shape(name, leaf)[0]] + [0] * (len(leaf.shape) - 1)
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
            raise WriteError(f'{name} cannot be written to {self.folder} ({reason}).') from error
        self._done.add((name, _start(region)))
        self._written.append((name, _start(region)))
        if self._journal is not None and time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._note()

    def _note(self, *, wait: bool = False) -> None:
        """Makes what is written safe, behind, and then notes it in the journal: never something that a crash can take away."""
        while self._syncing is not None or (wait and self._written):
            if self._syncing is None:
                self._begin_sync()
            future, safe = self._syncing
            if not (wait or future.done()):
                return
            future.result()
            self._journal.write(''.join(json.dumps(part) + '\n' for part in safe))
            self._journal.flush()
            self._syncing = None
        if self._written:
            self._begin_sync()

    def _begin_sync(self) -> None:
        self._syncing, self._written = (self._pool.submit(os.sync), self._written), []
        self._synced = time.monotonic()


def _link_or_copy(source: str, target: str) -> None:
    """Nobody writes into a chunk's file (TensorStore and we replace it), so that several may share one."""
    # Of a write that was cut off: a link does not replace what is there.
    pathlib.Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # this disk has no links, or no more for this file
        shutil.copyfile(source, target + '.tmp')
        os.replace(target + '.tmp', target)


def _has_links(folder: epath.Path) -> bool:
    """Whether the disk that holds, or will hold, a local folder lets a file have several names."""
    try:
        with tempfile.TemporaryDirectory(dir=outputs.nearest(os.fspath(folder))) as place:
            file = pathlib.Path(place, 'one')
            file.touch()
            os.link(file, file.with_name('two'))
    except OSError:
        return False
    return True


class Claim:
    """Keeps other processes from writing to a place on a disk, until it is released or this process ends.

    Args:
        place: the file or folder that a writer fills; it is made where it is not there.
        final: the name that it will be given, for the message.
        kind: what it is to be.

    Raises:
        UserError: another process writes there.
    """

    def __init__(self, place: epath.Path, final: epath.Path, kind: outputs.Kind):
        self._descriptor: int | None = None
        while True:
            if kind is outputs.Kind.NEW_FOLDER:
                place.mkdir(exist_ok=True)
            else:
                pathlib.Path(place).touch()
            try:
                self._descriptor = os.open(place, os.O_RDONLY)
            except FileNotFoundError:
                continue  # the process before has just given it its name
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise UserError(
                    f'{final} is being written by another process: wait for its end, or name another --to.'
                ) from error
            except OSError:  # this disk has no locks
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(place)):
                    return
            self.release()  # the process before has finished, or removed it

    def release(self) -> None:
        """Lets other processes write there."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Staging:
    """Where the file or folder of a format that is not written part by part is put together: on a disk next to its final name,
    for a bucket in the folder for temporary files.

    Args:
        final: what the user named.
        kind: what that is to be.
        needed: bytes.

    Attributes:
        path: of the file or folder to write; what a cut write has left there is removed.

    Raises:
        UserError: something has the final name, or there is too little space.
    """

    def __init__(self, final: epath.Path, kind: outputs.Kind, needed: int):
        outputs.refuse_existing(final, kind)
        self._final, self._kind = final, kind
        self._temporary: str | None = None
        self._claim: Claim | None = None
        self._made: list[epath.Path] = []
        if files.is_remote(final):
            outputs.check_space(tempfile.gettempdir(), needed, 'set TMPDIR to a folder on a larger disk')
            self._temporary = tempfile.mkdtemp(prefix='upcycle_')
            self.path = epath.Path(self._temporary) / final.name
            if kind is outputs.Kind.NEW_FOLDER:
                self.path.mkdir()
        else:
            outputs.check_space(final.parent, needed)
            self._made = make_folders(final.parent)
            self.path = final.parent / f'{final.name}{outputs.STAGING[1]}'
            self._claim = Claim(self.path, final, kind)
            for left in self.path.iterdir() if self.path.is_dir() else ():
                left.rmtree()

    def publish(self, last: str = '') -> None:
        """Gives what was put together its final name.

        Args:
            last: the file by which readers know the folder, which is sent to a bucket last.

        Raises:
            UserError: something has that name now, or the bucket does not take it; nothing of it stays there.
        """
        if self._temporary is None:
            give_name(self.path, self._final, self._kind)
            self._claim.release()
            return
        outputs.refuse_existing(self._final, self._kind)
        place = pathlib.Path(self.path)
        names = sorted((file.name for file in place.iterdir()), key=last.__eq__) if place.is_dir() else ['']
        sent: list[epath.Path] = []
        try:
            with files.patient():
                for name in names:
                    sent.append(self._final / name if name else self._final)
                    files.send(place / name, sent[-1])
        except BaseException as error:
            for target in sent:
                remove(target)
            if refusal := files.refused_by_bucket(error, [os.fspath(self._final)]):
                raise refusal from error
            raise
        shutil.rmtree(self._temporary)

    def discard(self) -> None:
        """Removes what was written, and the folders that were made for it."""
        self.path.rmtree(missing_ok=True)
        if self._claim is not None:
            self._claim.release()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        for parent in self._made:
            parent.rmdir()
        self._made = []


@contextlib.contextmanager
def not_refused(place: epath.Path, what: str = '') -> Iterator[None]:
    """Around writing to a local disk.

    Args:
        place: the file or folder.
        what: the leaf that is written; '': anything else.

    Raises:
        WriteError: the disk takes no more.
    """
    try:
        yield
    except OSError as error:
        if files.is_remote(place):
            raise
        sentence = f'{what} cannot be written to {place}' if what else f'{place} cannot be written'
        raise WriteError(f'{sentence} ({error}).') from error


def remove(path: epath.Path) -> None:
    """Removes a file or folder that was not finished; where a bucket does not let us, says that it stays."""
    try:
        path.rmtree(missing_ok=True)
    except Exception as error:
        if files.refused_by_bucket(error, [os.fspath(path)]) is None:
            raise
        warning.once(f'{path} was not finished and cannot be removed: delete it.')


def make_folders(folder: epath.Path) -> list[epath.Path]:
    """Makes a folder and those above it; those that were not there before, innermost first."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for path in reversed(made):
        path.mkdir()
    return made


def give_name(written: epath.Path, final: epath.Path, kind: outputs.Kind) -> None:
    """Makes what a writer has finished on a disk visible; an empty folder may be there already."""
    outputs.refuse_existing(final, kind)
    if final.is_dir():
        final.rmdir()
    written.rename(final)


def _start(region: arrays.Region) -> int:
    return region[0].start if region else 0


def _differences(old: Any, new: Any) -> str:
    names = sorted({*old, *new}) if isinstance(old, dict) else []
    changed = [
        f'{name} is {old.get(name)} there and {new.get(name)} here' for name in names if old.get(name) != new.get(name)
    ]
    return '; '.join(changed) or 'its journal is of another version'
