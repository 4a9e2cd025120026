"""Where a checkpoint is put together before it gets its name: claimed, staged, published, removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile

from etils import epath

from upcycle import files, outputs, warning
from upcycle.errors import UserError


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
