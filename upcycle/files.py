"""Access to files in local folders and buckets."""

import contextlib
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from etils import epath
from etils.epath import gpath

from upcycle.buckets import refused_by_bucket as refused_by_bucket
from upcycle.buckets import shortened
from upcycle.errors import Unavailable, UserError, without_password

STORES = {'gs': 'gcs', 's3': 's3'}  # TensorStore's drivers by the scheme of an address
# An address without its two slashes, as pathlib and os.path.normpath leave it.
_DAMAGED_ADDRESS = re.compile(f'({"|".join(STORES)}):/?(?!/)(.*)')
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts; the last is repeated until `PATIENCE` is over
PATIENCE = 120.0
_BLOCK_BYTES = 16 << 20

Answer = TypeVar('Answer')


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """Returns the absolute path with `~` expanded. Addresses such as `gs://bucket/run` are unchanged.

    Raises:
      UserError: the kind of address is not supported, or `~USER` is unknown.
    """
    name = os.fspath(path)
    if not is_remote(name):
        if damaged := _DAMAGED_ADDRESS.match(name):
            raise UserError(
                f'{name} is not an address of a bucket: write {damaged[1]}://{damaged[2]}, with two slashes, or ./{name} for a '
                'local path.'
            )
        expanded = os.path.expanduser(name)
        if expanded.startswith('~'):
            user = name.partition('/')[0].removeprefix('~')
            raise UserError(f'{name} is in the home of {user}, an unknown user: write ./{name} for a local path.')
        return epath.Path(os.path.abspath(expanded))
    scheme = name.partition('://')[0]
    if scheme not in STORES or without_password(name) != name:
        raise UserError(
            f'{without_password(name)} cannot be used: a path must be local or in a bucket (gs:// or s3://), with credentials '
            'from the environment, not in the address.'
        )
    if not re.match(r'\w+://[\w.-]', name):
        raise UserError(f'{name} names no bucket: addresses look like {scheme}://BUCKET/FOLDER.')
    _load_client()
    return epath.Path(name)


def damaged(file: str | os.PathLike[str], reason: str | Exception) -> UserError:
    """Returns the error for a file of a checkpoint, or a leaf in it, that cannot be trusted."""
    return UserError(f'{file} is damaged ({reason}): copy the checkpoint again.')


def require_file(path: str | os.PathLike[str]) -> None:
    """Raises UserError if something else than a file, or a link to one, is at a path: reading a pipe or device may never end."""
    if is_remote(path) or not os.path.exists(path) or os.path.isfile(path):
        return
    kinds = {stat.S_IFDIR: 'a folder', stat.S_IFIFO: 'a named pipe', stat.S_IFSOCK: 'a socket'}
    kind = kinds.get(stat.S_IFMT(os.stat(path).st_mode), 'a device')
    raise UserError(f'{os.fspath(path)} is not a file, but {kind}: copy the file again, or remove it.')


@functools.cache
def _load_client() -> None:
    """Loads TensorFlow silently and without accelerators, if etils uses it for buckets."""
    off = os.environ.get('EPATH_USE_TF', '').lower() in ('false', 'no', 'f', '0')
    if not off and importlib.util.find_spec('tensorflow') is not None:
        from upcycle.data import tensorflow_quiet

        tensorflow_quiet.tensorflow()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket, which cannot rename objects or append to them."""
    return '://' in os.fspath(path)


class _Patience(threading.local):
    """Seconds for which requests are repeated if a bucket does not answer: in all threads, and in this one (None: as in all)."""

    of_all: float = 0.0
    here: float | None = None


_patience = _Patience()


@contextlib.contextmanager
def patient(seconds: float = PATIENCE) -> Iterator[None]:
    """Makes all threads repeat requests that a bucket does not answer, after the retries of its client, with growing pauses.

    Args:
      seconds: time after which no attempt begins.
    """
    before = _Patience.of_all
    _Patience.of_all = seconds
    try:
        yield
    finally:
        _Patience.of_all = before


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Makes this thread send each request once."""
    before, _patience.here = _patience.here, 0.0
    try:
        yield
    finally:
        _patience.here = before


def patiently(
    ask: Callable[[], Answer], address: str | os.PathLike[str], done: type[Exception] | None = None
) -> Answer | None:
    """Calls a function, repeatedly if the bucket does not answer (see `patient`), and returns its result.

    Args:
      ask: sends a request to a bucket.
      address: of the object.
      done: the error that means that an earlier attempt succeeded and its answer was lost.
    """
    end = time.monotonic() + (_patience.of_all if _patience.here is None else _patience.here)
    for tries, pause in enumerate(itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1]))):
        try:
            return ask()
        except Exception as error:
            if done is not None and tries and isinstance(error, done):
                return None
            refusal = refused_by_bucket(error, [os.fspath(address)])
            if not isinstance(refusal, Unavailable) or time.monotonic() + pause > end:
                raise
            if not tries:
                reason = shortened(' '.join(str(error).split())) or type(error).__name__
                print(f'warning: {address} does not answer ({reason}): trying again.', file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError


@contextlib.contextmanager
def unanswered(path: str | os.PathLike[str]) -> Iterator[None]:
    """Suppresses errors of a disk or a bucket, for writes that are repeated later."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and refused_by_bucket(error, [os.fspath(path)]) is None:
            raise


@functools.cache
def _remember_no_listings() -> None:
    """Disables fsspec's caches of listings, because other processes write to buckets, too. TensorFlow has no such cache."""
    if importlib.util.find_spec('fsspec') is not None:
        import fsspec

        for scheme in (*STORES, *STORES.values()):
            fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False


class _BucketPath(gpath.PosixGPath):
    """A path in a bucket, registered with `epath.Path` for all libraries. Repeats requests (see `patient`) and caches nothing."""

    @property
    def _backend(self) -> Any:
        _remember_no_listings()
        return super()._backend

    def iterdir(self) -> Iterator[epath.Path]:
        return iter(patiently(lambda: list(super(_BucketPath, self).iterdir()), self))

    def glob(self, pattern: str) -> Iterator[epath.Path]:
        return iter(patiently(lambda: list(super(_BucketPath, self).glob(pattern)), self))


def _request(name: str, done: type[Exception] | None) -> Callable[..., Any]:
    def request(self: _BucketPath, *arguments: Any, **named: Any) -> Any:
        return patiently(lambda: getattr(super(_BucketPath, self), name)(*arguments, **named), self, done)

    return request


for _name, _done in {
    **dict.fromkeys(('exists', 'is_dir', 'stat', 'read_bytes', 'read_text', 'write_bytes', 'write_text')),
    'mkdir': FileExistsError,
    'unlink': FileNotFoundError,
    'rmtree': FileNotFoundError,
}.items():
    setattr(_BucketPath, _name, _request(_name, _done))
epath.register_path_cls([f'{scheme}://' for scheme in STORES])(_BucketPath)


def replace_text(path: epath.Path, text: str) -> None:
    """Writes a file atomically: readers see the old text or the new one."""
    if is_remote(path):
        path.write_text(text)
        return
    new = path.with_name(path.name + '.new')
    new.write_text(text)
    try:
        os.replace(new, path)
    except OSError:
        new.unlink()
        raise


def send(source: pathlib.Path, target: epath.Path) -> None:
    """Copies a local file to a bucket, in blocks.

    Raises:
      OSError: the bucket has fewer bytes.
    """

    def copy() -> None:
        with source.open('rb') as read, target.open('wb') as write:
            shutil.copyfileobj(read, write, _BLOCK_BYTES)
        sent, arrived = source.stat().st_size, target.stat().length
        if arrived != sent:
            raise OSError(f'{target} has {arrived} bytes after {sent} were sent')

    patiently(copy, target)


class Mirror:
    """A folder for files that grow. For a folder in a bucket, they are written to a local folder and copied.

    Args:
      folder: local or in a bucket.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.target = absolute(folder)
        self._local = pathlib.Path(tempfile.mkdtemp(prefix='upcycle_')) if is_remote(folder) else None
        self._copied: dict[pathlib.Path, int] = {}

    @property
    def path(self) -> epath.Path:
        """The folder to write to."""
        return self.target if self._local is None else epath.Path(self._local)

    def copy(self) -> None:
        """Copies files that have grown since the last call to the bucket. Does nothing for a local folder."""
        for file in sorted(self._local.rglob('*')) if self._local is not None else ():
            if file.is_file() and self._copied.get(file) != (size := file.stat().st_size):
                (self.target / file.relative_to(self._local).as_posix()).write_bytes(file.read_bytes())
                self._copied[file] = size

    def close(self) -> None:
        """Copies the rest and removes the local folder.

        Raises:
          Unavailable, UserError: the bucket refuses the copy. The local folder stays, and the message names it.
        """
        try:
            self.copy()
        except Exception as error:
            if (refusal := refused_by_bucket(error, [os.fspath(self.target)])) is None:
                raise
            raise type(refusal)(f'{refusal} The unsent files are in {self._local}.') from error
        if self._local is not None:
            shutil.rmtree(self._local)
