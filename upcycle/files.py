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
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from etils import epath
from etils.epath import gpath

from upcycle.errors import Unavailable, UserError, without_password

# TensorStore's drivers by the scheme of an address.
STORES = {'gs': 'gcs', 's3': 's3'}
# What pathlib and os.path.normpath leave of an address.
_DAMAGED_ADDRESS = re.compile(f'({"|".join(STORES)}):/?(?!/)(.*)')
# Seconds between tries; the last pause is repeated until `PATIENCE` is over.
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)
PATIENCE = 120.0
_BLOCK_BYTES = 16 << 20

Answer = TypeVar('Answer')


def absolute(path: str | os.PathLike[str]) -> epath.Path:
    """`path` in full, `~` expanded; addresses such as `gs://bucket/run` stay as they are.

    Raises:
      UserError: an address of a kind that we do not read, or the home of nobody.
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


@functools.cache
def _load_client() -> None:
    """Where TensorFlow is what etils will read buckets with, loads it as all of us do: silently, and without accelerators."""
    off = os.environ.get('EPATH_USE_TF', '').lower() in ('false', 'no', 'f', '0')
    if not off and importlib.util.find_spec('tensorflow') is not None:
        from upcycle.data import tensorflow_quiet

        tensorflow_quiet.tensorflow()


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path lies in a bucket, where objects appear whole and are neither renamed nor appended to."""
    return '://' in os.fspath(path)


# What the clients of buckets raise (TensorFlow's, fsspec's with gcsfs or s3fs, TensorStore), by the beginning of the module
# that defines it. Their own retries are over by then.
_CLIENTS = (
    *('tensorflow.', 'gcsfs.', 's3fs.', 'fsspec.', 'aiohttp.', 'aiobotocore.', 'botocore.'),
    *('google.', 'requests.', 'urllib3.'),
)
# Without an answer: nothing is said about the address. Status words are those of gRPC, as TensorFlow and TensorStore use them.
_SILENCE = re.compile(
    r'libcurl code|\bUNAVAILABLE\b|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|\bABORTED\b|resolve|timed? ?out|Cannot connect|'
    r'Could not connect|Connection (?:reset|refused|aborted)|Max retries|HTTP (?:response )?(?:code )?(?:429|5\d\d)\b|'
    r'Name or service not known|Temporary failure|unreachable',
    re.IGNORECASE,
)
_SILENT = (
    *('Unavailable', 'DeadlineExceeded', 'ResourceExhausted', 'Aborted'),
    *('Timeout', 'Connect', 'Transport', 'gaierror'),
)
_ADDRESS = re.compile(r'(?:gs|s3)://[^\s\'",;)\]]*')


def refused_by_bucket(error: BaseException, arguments: Sequence[str] = ()) -> UserError | None:
    """What the client of a bucket says, as a sentence.

    Args:
      error: whatever ended a command.
      arguments: of the command; the addresses in them.

    Returns:
      `Unavailable` where nothing answered, another `UserError` where the answer was no; None: the error has nothing to do with a
      bucket.
    """
    asked = [address for argument in arguments for address in _ADDRESS.findall(argument)]
    for cause in _causes(error):
        kind, text = type(cause), ' '.join(str(cause).split())
        named = _ADDRESS.findall(text)
        by_client = kind.__module__.startswith(_CLIENTS)
        # Their clients also raise Python's own, and of those only some can be anything else.
        by_python = isinstance(cause, OSError | ImportError | ValueError | KeyError) and (
            bool(named)
            or ('bucket' in text.lower())
            or text.startswith(('http://', 'https://'))  # gcsfs, where the bucket does not exist
            or kind.__name__ in ('gaierror', 'TimeoutError', 'PermissionError')
            or (isinstance(cause, ImportError) and re.search('gcsfs|s3fs', text) is not None)
        )
        if not ((by_client and (asked or named)) or (by_python and asked)):
            continue
        where = without_password((named or asked)[0])
        status = _http_status(cause)
        if (
            status in (408, 429)
            or status >= 500
            or (not status and (any(word in kind.__name__ for word in _SILENT) or _SILENCE.search(text)))
        ):
            return Unavailable(
                f'{where} does not answer ({_short(text) or kind.__name__}): check the network, and repeat the command.'
            )
        if 'not implemented' in text and 'scheme' in text:
            return UserError(
                f'{where} cannot be used: TensorFlow has no client for it: set EPATH_USE_TF=false, and pip install '
                f'{"s3fs" if where.startswith("s3") else "gcsfs"}.'
            )
        if isinstance(cause, ImportError):
            return UserError(
                f'{where} cannot be used ({_short(text)}): pip install {"s3fs" if where.startswith("s3") else "gcsfs"}.'
            )
        return UserError(
            f'{where} cannot be used ({_short(text) or kind.__name__}): check the address, that the bucket exists, and that the '
            'credentials of this machine may use it.'
        )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, those of a group, and what each was raised from."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        error = waiting.pop(0)
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        yield error
        waiting += [
            *(error.exceptions if isinstance(error, BaseExceptionGroup) else ()),
            error.__cause__,
            error.__context__,
        ]


def _http_status(error: BaseException) -> int:
    """The status of an HTTP answer that an error carries; 0: none."""
    response = getattr(error, 'response', None)
    metadata = response.get('ResponseMetadata', {}) if isinstance(response, dict) else {}
    for value in (metadata.get('HTTPStatusCode'), getattr(error, 'code', None), getattr(error, 'status', None)):
        if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) < 600:
            return int(value)
    return 0


def _short(text: str, longest: int = 300) -> str:
    text = without_password(text).rstrip('. ')
    return text if len(text) <= longest else f'{text[:longest]}...'


class _Patience(threading.local):
    """How long this thread asks a bucket that does not answer, in seconds; None: as long as all threads."""

    of_all: float = 0.0
    here: float | None = None


_patience = _Patience()


@contextlib.contextmanager
def patient(seconds: float = PATIENCE) -> Iterator[None]:
    """Inside, every thread asks a bucket that does not answer again, with growing pauses; after the retries of its client.

    Args:
      seconds: after which no other try begins.
    """
    before = _Patience.of_all
    _Patience.of_all = seconds
    try:
        yield
    finally:
        _Patience.of_all = before


@contextlib.contextmanager
def asking_once() -> Iterator[None]:
    """Inside, this thread leaves another try to its caller."""
    before, _patience.here = _patience.here, 0.0
    try:
        yield
    finally:
        _patience.here = before


def patiently(
    ask: Callable[[], Answer], where: str | os.PathLike[str], done: type[Exception] | None = None
) -> Answer | None:
    """What a function returns, which may be called several times; see `patient`.

    Args:
      ask: asks a bucket.
      where: an address in it.
      done: what it raises where an earlier try has succeeded and its answer was lost.
    """
    end = time.monotonic() + (_patience.of_all if _patience.here is None else _patience.here)
    for tries, pause in enumerate(itertools.chain(_PAUSES, itertools.repeat(_PAUSES[-1]))):
        try:
            return ask()
        except Exception as error:
            if done is not None and tries and isinstance(error, done):
                return None
            refusal = refused_by_bucket(error, [os.fspath(where)])
            if not isinstance(refusal, Unavailable) or time.monotonic() + pause > end:
                raise
            if not tries:
                said = _short(' '.join(str(error).split())) or type(error).__name__
                print(f'warning: {where} does not answer ({said}): trying again.', file=sys.stderr, flush=True)
        time.sleep(pause)
    raise AssertionError


@contextlib.contextmanager
def unanswered(where: str | os.PathLike[str]) -> Iterator[None]:
    """Around what is repeated later if it fails: suppresses errors of a disk, and a bucket's refusal or silence."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and refused_by_bucket(error, [os.fspath(where)]) is None:
            raise


class _BucketPath(gpath.PosixGPath):
    """A path in a bucket, for every library that asks `epath.Path`: each request is made patiently."""

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
    """Writes a file at once: whoever reads sees the old text or the new one."""
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
      OSError: fewer bytes have arrived.
    """

    def copy() -> None:
        with source.open('rb') as read, target.open('wb') as write:
            shutil.copyfileobj(read, write, _BLOCK_BYTES)
        sent, arrived = source.stat().st_size, target.stat().length
        if arrived != sent:
            raise OSError(f'{target} has {arrived} bytes after {sent} were sent')

    patiently(copy, target)


class Mirror:
    """A folder to which files are appended: the folder itself, or, of a bucket, a local one that is copied there.

    Args:
      folder: where the files are to be.
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
          Unavailable, UserError: the bucket does not take it. The local folder stays, and the message names it.
        """
        try:
            self.copy()
        except Exception as error:
            if (refusal := refused_by_bucket(error, [os.fspath(self.target)])) is None:
                raise
            raise type(refusal)(f'{refusal} What was to be sent there is in {self._local}.') from error
        if self._local is not None:
            shutil.rmtree(self._local)
