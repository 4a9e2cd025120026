"""Files of a run, in a local folder or in a bucket."""

import contextlib
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import shutil
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

# TensorStore's drivers by the scheme of an address.
STORES = {'gs': 'gcs', 's3': 's3'}
# An address after pathlib or os.path.normpath.
_DAMAGED_ADDRESS = re.compile(f'({"|".join(STORES)}):/?(?!/)(.*)')
# Seconds between tries; the last one is repeated until `PATIENCE` is over.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
PATIENCE = 120.0
_BLOCK_BYTES = 16 << 20

Answer = TypeVar('Answer')


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` in full, `~` expanded; addresses such as `gs://bucket/run` stay as they are.

    Raises:
      UserError: an address of a kind that we do not read, or the home of an unknown user.
    """
    name = os.fspath(path)
    if not is_remote(name):
        if damaged := _DAMAGED_ADDRESS.match(name):
            scheme, bucket = damaged[1], damaged[2]
            raise UserError(
                f'{name} is no address of a bucket: write {scheme}://{bucket}, with two slashes, or ./{name} for a local path.'
            )
        expanded = os.path.expanduser(name)
        if expanded.startswith('~'):
            user = name.partition('/')[0]
            raise UserError(f'{name} is in the home of {user[1:]}, an unknown user: write ./{name} for a local path.')
        return epath.Path(os.path.abspath(expanded))
    scheme = name.partition('://')[0]
    if scheme not in STORES or without_password(name) != name:
        raise UserError(
            f'{without_password(name)} cannot be used: paths are local, or in buckets (gs:// or s3://), whose keys come from the '
            'environment and never from the address.'
        )
    if not re.match(r'\w+://[\w.-]', name):
        raise UserError(f'{name} names no bucket: addresses look like {scheme}://BUCKET/FOLDER.')
    _load_client()
    return epath.Path(name)


def damaged(file: str | os.PathLike[str], reason: str | Exception) -> UserError:
    """Returns the error for a file of a checkpoint, or a leaf in it, that cannot be trusted."""
    return UserError(f'{file} is damaged ({reason}): copy the checkpoint again.')


@functools.cache
def _load_client() -> None:
    """Loads TensorFlow, where etils reads buckets with it, silently and without accelerators."""
    off = os.environ.get('EPATH_USE_TF', '').lower() in ('false', 'no', 'f', '0')
    if not off and importlib.util.find_spec('tensorflow') is not None:
        from upcycle.data import tensorflow_quiet

        tensorflow_quiet.tensorflow()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket, where objects appear whole and are neither renamed nor appended to."""
    return '://' in os.fspath(path)


class _Patience(threading.local):
    """For how many seconds a bucket that does not answer is asked again: by all threads, and by this one (None: as all)."""

    of_all: float = 0.0
    here: float | None = None


_patience = _Patience()


@contextlib.contextmanager
def patient(seconds: float = PATIENCE) -> Iterator[None]:
    """Inside, every thread repeats requests that a bucket does not answer, with growing pauses; after the retries of its client.

    Args:
      seconds: after which no new try begins.
    """
    before = _Patience.of_all
    _Patience.of_all = seconds
    try:
        yield
    finally:
        _Patience.of_all = before


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Inside, this thread repeats no request."""
    before, _patience.here = _patience.here, 0.0
    try:
        yield
    finally:
        _patience.here = before


def patiently(
    ask: Callable[[], Answer], address: str | os.PathLike[str], done: type[Exception] | None = None
) -> Answer | None:
    """The result of a function, which may be called several times; see `patient`.

    Args:
      ask: asks a bucket.
      address: of something in it.
      done: raised where an earlier try has succeeded and its answer was lost.
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
                said = shortened(' '.join(str(error).split())) or type(error).__name__
                print(f'warning: {address} does not answer ({said}): trying again.', file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError


@contextlib.contextmanager
def unanswered(path: str | os.PathLike[str]) -> Iterator[None]:
    """Suppresses errors of a disk, and a bucket's refusal or silence: for writes that are repeated later."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and refused_by_bucket(error, [os.fspath(path)]) is None:
            raise


@functools.cache
def _remember_no_listings() -> None:
    """Tells the clients of fsspec that other processes write to buckets too; TensorFlow's client remembers no listings."""
    if importlib.util.find_spec('fsspec') is not None:
        import fsspec

        for scheme in (*STORES, *STORES.values()):
            fsspec.config.conf.setdefault(scheme, {})['use_listings_cache'] = False


class _BucketPath(gpath.PosixGPath):
    """A path in a bucket, for every library that asks `epath.Path`: each request is made patiently, and none is answered from
    memory.
    """

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
    """Writes a file atomically: a reader sees the old text or the new one."""
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
    """A folder of growing files: the folder itself, or, in a bucket, a local one that is copied there.

    Args:
      folder: of the files.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.target = absolute(folder)
        self._local = pathlib.Path(tempfile.mkdtemp(prefix='upcycle_')) if is_remote(folder) else None
        self._copied: dict[pathlib.Path, int] = {}

    @property
    def path(self) -> epath.Path:
        """Where to write."""
        return self.target if self._local is None else epath.Path(self._local)

    def copy(self) -> None:
        """Sends what has grown since the last time; nothing where the folder is local."""
        for file in sorted(self._local.rglob('*')) if self._local is not None else ():
            if file.is_file() and self._copied.get(file) != (size := file.stat().st_size):
                (self.target / file.relative_to(self._local).as_posix()).write_bytes(file.read_bytes())
                self._copied[file] = size

    def close(self) -> None:
        """Sends the rest.

        Raises:
          Unavailable, UserError: the bucket does not accept it. The local folder stays, and the message names it.
        """
        try:
            self.copy()
        except Exception as error:
            if (refusal := refused_by_bucket(error, [os.fspath(self.target)])) is None:
                raise
            raise type(refusal)(f'{refusal} What was to be sent there is in {self._local}.') from error
        if self._local is not None:
            shutil.rmtree(self._local)
