"""Staging of a checkpoint before it gets its final name: claim, write, publish or remove."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from upcycle import files, outputs, warning
from upcycle.checkpoints import arrays, writing
from upcycle.checkpoints.journal import Journal, Part
from upcycle.errors import UserError


class Claim:
    """An exclusive lock on a local path, held until it is released or this process ends.

    Args:
      place: the file or folder to write to; created if it does not exist.
      final: its final name, for the message.
      kind: whether it is a file or a folder.

    Raises:
      UserError: another process holds the lock.
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
                continue  # the previous holder has just renamed it
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self.release()
                raise UserError(
                    f'{final} is being written by another process: wait for it to end, or name another --to.'
                ) from error
            except OSError:  # the file system has no locks
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(place)):
                    return
            self.release()  # the previous holder has renamed or removed it

    def release(self) -> None:
        """Releases the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Staging:
    """The temporary file or folder of a writer.

    It lies next to the final path on a disk, and in the folder for temporary files if the final path is in a bucket.

    Args:
      final: the path that the user named.
      kind: whether it is a file or a folder.
      identity: of a write to a folder on a disk that the same command continues after an interruption; see `Journal`. None: the
        write cannot continue, and remains of an interrupted one are removed.

    Attributes:
      path: the file or folder to write, after `begin`.
      done: the parts that an interrupted write has left.

    Raises:
      UserError: the final path exists, or another interrupted write has left a folder.
    """

    def __init__(self, final: epath.Path, kind: outputs.Kind, identity: Mapping[str, Any] | None = None):
        outputs.refuse_existing(final, kind)
        self._final, self._kind = final, kind
        self._temporary: str | None = None
        self._claim: Claim | None = None
        self._made: list[epath.Path] = []
        self._journal: Journal | None = None
        self.path = final.parent / f'{final.name}{outputs.STAGING[1]}'
        if identity is not None and not files.is_remote(final):
            self._journal = Journal(self.path, identity)
        self.done: set[Part] = set() if self._journal is None else set(self._journal.done)

    def begin(self, needed: int) -> None:
        """Claims the file or folder for `needed` more bytes; raises UserError if the disk is too full."""
        if files.is_remote(self._final):
            outputs.check_space(tempfile.gettempdir(), needed, 'set TMPDIR to a folder on a larger disk')
            self._temporary = tempfile.mkdtemp(prefix='upcycle_')
            self.path = epath.Path(self._temporary) / self._final.name
            if self._kind is outputs.Kind.NEW_FOLDER:
                self.path.mkdir()
            return
        outputs.check_space(self._final.parent, needed)
        self._made = make_folders(self._final.parent)
        self._claim = Claim(self.path, self._final, self._kind)
        for left in self.path.iterdir() if self.path.is_dir() and not self.done else ():
            left.rmtree()
        if self._journal is not None:
            self._journal.open()

    def add(self, part: Part) -> None:
        """Records a written part, from which the write can continue."""
        if self._journal is not None:
            self._journal.add(part)

    def leave(self) -> None:
        """Ends the write; what is recorded stays if the same command can continue, and everything is removed otherwise."""
        if self._journal is None:
            self.discard()
            return
        self._journal.close()
        self._claim.release()

    def publish(self, last: str = '') -> None:
        """Renames or uploads the result to its final path.

        Args:
          last: the file by which readers recognise the folder; uploaded last.

        Raises:
          UserError: the final path exists by now, or the bucket refuses the upload, of which nothing remains.
        """
        if self._temporary is None:
            if self._journal is not None:
                self._journal.close()
                self._journal.remove()
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
        """Removes everything written, and the folders made for it."""
        if self._journal is not None:
            self._journal.forget()
            self._journal.close()
        self.path.rmtree(missing_ok=True)
        if self._claim is not None:
            self._claim.release()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
        for parent in self._made:
            parent.rmdir()
        self._made = []


def remove(path: epath.Path) -> None:
    """Removes an unfinished file or folder; warns if a bucket refuses."""
    try:
        path.rmtree(missing_ok=True)
    except Exception as error:
        if files.refused_by_bucket(error, [os.fspath(path)]) is None:
            raise
        warning.once(f'{path} was not finished and cannot be removed: delete it.')


def make_folders(folder: epath.Path) -> list[epath.Path]:
    """Makes a folder and its parents; returns the new ones, innermost first."""
    made = []
    while not folder.exists():
        made.append(folder)
        folder = folder.parent
    for path in reversed(made):
        path.mkdir()
    return made


def give_name(written: epath.Path, final: epath.Path, kind: outputs.Kind) -> None:
    """Renames a finished local file or folder to its final name, which may be an empty folder."""
    outputs.refuse_existing(final, kind)
    if final.is_dir():
        final.rmdir()
    written.rename(final)


class StagedWriter:
    """Base of the writers that use `Staging`; see `writing.Writer`.

    Args:
      path: of the checkpoint.
      leaves: everything to write; `rng` is left out.
    """

    def __init__(self, path: epath.Path, leaves: writing.Leaves):
        self.path = os.fspath(path)
        self.left_out = {'rng': 'the format has no random key'} if 'rng' in leaves else {}
        self._leaves = {name: leaf for name, leaf in leaves.items() if name != 'rng'}
        self._finished = False

    def _stage(self, kind: outputs.Kind, identity: Mapping[str, Any] | None = None) -> epath.Path:
        """Begins the staging; returns the file or folder to write. For the arguments see `Staging`."""
        self._staging = Staging(epath.Path(self.path), kind, identity)
        sizes = {name: self.size_of(name) for name in self._leaves}
        self._staging.begin(sum(len(left) * sizes[name] // len(self.parts(name)) for name, left in self.todo().items()))
        return self._staging.path

    def size_of(self, name: str) -> int:
        """Returns the bytes of a leaf in the checkpoint."""
        return self._leaves[name].size * self._leaves[name].dtype.itemsize

    def parts(self, name: str) -> Sequence[writing.Region]:
        """See `writing.Writer`."""
        return writing.parts(name, self._leaves[name])

    def todo(self) -> dict[str, Sequence[writing.Region]]:
        """See `writing.Writer`; parts must be written in this order."""
        done = self._staging.done
        left = {
            name: [region for region in self.parts(name) if (name, writing.start_of(region)) not in done]
            for name in self._leaves
        }
        return {name: regions for name, regions in left.items() if regions}

    def _publish(self, check: writing.Check, reader: arrays.ArrayReader, last: str = '') -> None:
        check(reader)
        self._staging.publish(last)
        self._finished = True

    def _close_files(self) -> None:
        """Closes all open files, even if the disk is full."""
        raise NotImplementedError

    def close(self) -> None:
        """See `writing.Writer`."""
        if not self._finished:
            self._close_files()
            self._staging.leave()
            self._finished = True

    def discard(self) -> None:
        """See `writing.Writer`."""
        self._close_files()
        self._staging.discard()
        self._finished = True
