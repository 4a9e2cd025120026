"""Files of a run, in a local folder or in a bucket."""

import os
import pathlib
import tempfile

from etils import epath

from upcycle.errors import UserError, without_password

# TensorStore's drivers by the scheme of an address.
STORES = {'gs': 'gcs', 's3': 's3'}


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` in full, `~` expanded; addresses such as `gs://bucket/run` stay as they are.

    Raises:
      UserError: an address of a kind that we do not read.
    """
    name = os.fspath(path)
    if not is_remote(name):
        return epath.Path(os.path.abspath(os.path.expanduser(name)))
    scheme = name.partition('://')[0]
    if scheme not in STORES or without_password(name) != name:
        raise UserError(
            f'{without_password(name)} cannot be used: paths are local, or in buckets (gs:// or s3://), whose keys come from the '
            'environment and never from the address.'
        )
    return epath.Path(name)


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket, where objects appear whole and are neither renamed nor appended to."""
    return '://' in os.fspath(path)


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file at once: whoever reads sees the old text or the new one."""
    if is_remote(path):
        path.write_text(text)
        return
    new = path.with_name(path.name + '.new')
    new.write_text(text)
    new.replace(path)


class Mirror:
    """A folder to which files are appended: the folder itself, or, of a bucket, a local one that is copied there.

    Args:
      folder: where the files are to be.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = absolute(folder)
        self._local = tempfile.TemporaryDirectory() if is_remote(folder) else None
        self._copied: dict[pathlib.Path, int] = {}

    @property
    def path(self) -> epath.Path:
        """Where to write."""
        return self._folder if self._local is None else epath.Path(self._local.name)

    def copy(self) -> None:
        """Sends what has grown since the last time; nothing where the folder is local."""
        if self._local is None:
            return
        local = pathlib.Path(self._local.name)
        for file in local.rglob('*'):
            if file.is_file() and self._copied.get(file) != (size := file.stat().st_size):
                target = self._folder / file.relative_to(local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
                self._copied[file] = size

    def close(self) -> None:
        """Sends the rest."""
        self.copy()
        if self._local is not None:
            self._local.cleanup()
