"""The lock of a run's folder: process 0 holds it while it trains, so that only one run writes there.

`MODEL_DIR/lock.json` names the holder: host, process id and its start time, boot id, PID namespace, start of the lock, and a
heartbeat, a number that the holder raises every `beat` seconds. A holder is known to be dead if boot id and PID namespace are
ours and no process has its id and start time: its lock is taken over at once. Any other lock is taken over when its heartbeat has
not changed for `PATIENCE` seconds of our own clock; clocks of two hosts are never compared.

In a local folder a lock is created by `O_EXCL` and changed under `flock`, so that one of several takers wins. In a bucket, or if
the file system has no `flock` across hosts, two processes that take the lock at the same moment both start, and the one whose
text was overwritten stops at its next heartbeat, or before it saves.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from upcycle import files
from upcycle.checkpoints.integrity import by_process_0
from upcycle.errors import UserError, writing_to
from upcycle.training.folder import require_file

NAME = 'lock.json'
PATIENCE = 60.0
_POLL = 0.25
# Seconds that process 0 waits before it answers the others, whose collectives time out.
_TOGETHER = 10.0
_SIZE = 1024  # bytes of a lock, padded with spaces, since it is overwritten in place


class _BusyError(Exception):
    """Another process is changing the lock."""


class _LocalFile:
    """A lock in a folder."""

    beat = 2.0  # seconds between two heartbeats

    def __init__(self, path: epath.Path):
        self._path = os.fspath(path)

    def create(self, text: bytes) -> bool:
        """Writes a lock if there is none; returns whether it did."""
        try:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            require_file(self._path)
            return False
        try:
            _write(file, text)
        except OSError:
            os.unlink(self._path)
            raise
        finally:
            os.close(file)
        return True

    def read(self) -> bytes | None:
        """Returns the lock, or None if there is none."""
        # Opened again each time, so that a network file system asks its server.
        try:
            with open(self._path, 'rb') as file:
                return file.read()
        except FileNotFoundError:
            return None

    def change(self, is_expected: Callable[[bytes], bool], text: bytes | None) -> bool:
        """Replaces the lock, or removes it, if it is as expected; returns whether it did.

        Raises:
          _BusyError: another process is changing it.
        """
        try:
            file = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _BusyError from error
            except OSError:  # the file system has no flock
                pass
            # Another lock may have replaced it since it was opened.
            with contextlib.suppress(FileNotFoundError):
                now = os.fstat(file)
                if os.path.samestat(now, os.stat(self._path)) and is_expected(os.pread(file, now.st_size, 0)):
                    if text is None:
                        os.unlink(self._path)
                    else:
                        _write(file, text)
                        os.ftruncate(file, len(text))  # the old text may have been longer
                    return True
            return False
        finally:
            os.close(file)


def _write(file: int, text: bytes) -> None:
    """Writes a text at the start of a file. A nearly full disk first writes a part of it."""
    written = 0
    while written < len(text):
        written += os.pwrite(file, text[written:], written)


class _Object:
    """A lock in a bucket, which replaces whole objects and has no locks. The methods are those of `_LocalFile`."""

    beat = 15.0  # each heartbeat is a request that costs money

    def __init__(self, path: epath.Path):
        self._path = path

    def create(self, text: bytes) -> bool:
        if self._path.exists():
            return False
        self._path.write_bytes(text)
        return True

    def read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def change(self, is_expected: Callable[[bytes], bool], text: bytes | None) -> bool:
        now = self.read()
        if now is None or not is_expected(now):
            return False
        if text is None:
            self._path.unlink()
        else:
            self._path.write_bytes(text)
        return True


def this_process() -> dict[str, Any]:
    """Describes this process, with None for what the system does not tell."""
    boot, pid_namespace = _machine()
    return {
        'host': socket.gethostname(),
        'process': os.getpid(),
        'started': _start_of(os.getpid()),
        'boot': boot,
        'pid_namespace': pid_namespace,
    }


def is_dead(holder: Mapping[str, Any]) -> bool:
    """Returns whether a holder is known to have ended."""
    pid, ours = holder.get('process'), _machine()
    if None in ours or (holder.get('boot'), holder.get('pid_namespace')) != ours or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    started = _start_of(pid)
    return started is not None and started != holder.get('started')


def _start_of(pid: int) -> str | None:
    """Returns when a process was started, in ticks since the boot; 'ended' for a zombie."""
    try:
        with open(f'/proc/{pid}/stat', 'rb') as file:
            # The second field is the name in parentheses, which may contain anything.
            fields = file.read().rpartition(b')')[2].split()
    except OSError:
        return None
    return 'ended' if fields[0] in (b'Z', b'X') else fields[19].decode()


def _machine() -> tuple[str | None, str | None]:
    """Returns the boot id and the PID namespace."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            return file.read().strip(), os.readlink('/proc/self/ns/pid')
    except OSError:
        return None, None


class Lock:
    """The lock of a run's folder.

    Args:
      model_dir: the folder.
      me: see `this_process`.
      clock: returns seconds of a monotonic clock.
      sleep: waits for a number of seconds of that clock.
    """

    def __init__(
        self,
        model_dir: str,
        me: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._model_dir = model_dir
        self._path = files.absolute(model_dir) / NAME
        self._store = _Object(self._path) if files.is_remote(self._path) else _LocalFile(self._path)
        since = time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())
        self._me = {**(this_process() if me is None else me), 'since': since, 'token': secrets.token_hex(16)}
        self._clock, self._sleep = clock, sleep
        self._beats = 0
        # The lock of another process when first seen, the time, and whether the user was told.
        self._seen: bytes | None = None
        self._seen_at = 0.0
        self._said = False
        self._lost = threading.Event()
        self._released = threading.Event()

    def take(self, seconds: float = float('inf')) -> bool:
        """Takes the lock; waits if it is unknown whether its holder is alive.

        Args:
          seconds: maximum time to wait in this call; the next call continues to wait.

        Returns:
          Whether the lock was taken.

        Raises:
          UserError: the holder is alive.
        """
        end = self._clock() + seconds
        while not self._store.create(self._text()):
            now = self._store.read()
            if now is None:
                continue
            holder = _parse(now)
            if self._seen not in (None, now):
                raise UserError(
                    f'MODEL_DIR = {self._model_dir!r} is in use: {_in_words(holder)} trains there. Wait for its end or stop it, '
                    'or name another MODEL_DIR.'
                )
            if self._seen is None:
                self._seen, self._seen_at = now, self._clock()
            waited = self._clock() - self._seen_at
            if is_dead(holder) or waited >= PATIENCE:
                with contextlib.suppress(_BusyError):
                    if self._store.change(now.__eq__, self._text()):
                        return True
                # Another process was faster, or the holder is alive.
            if waited > 2 * self._store.beat and not self._said:
                self._said = True
                print(
                    f'MODEL_DIR = {self._model_dir!r} may be in use: waiting {PATIENCE:g} s for a sign of life of '
                    f'{_in_words(holder)}.',
                    file=sys.stderr,
                    flush=True,
                )
            if self._clock() >= end:
                return False
            self._sleep(_POLL)
        return True

    def beat(self) -> None:
        """Raises the heartbeat, or notes that another process has the lock."""
        # If another process is changing the lock, or disk or bucket do not answer, the next heartbeat tries again.
        with contextlib.suppress(_BusyError), files.unanswered(self._path), files.asking_once():
            self._beats += 1
            if not self._store.change(self._is_mine, self._text()) and not self._is_mine(self._store.read() or b''):
                self._lost.set()

    def keep(self) -> None:
        """Raises the heartbeat until the lock is released or lost; runs in a thread."""
        while not self._released.wait(self._store.beat) and not self._lost.is_set():
            self.beat()

    def check(self, *, look: bool = True) -> None:
        """Raises UserError if another process has the lock: if `look`, reads the lock, else trusts the last heartbeat."""
        if look and not self._lost.is_set():
            with files.unanswered(self._path):
                if not self._is_mine(self._store.read() or b''):
                    self._lost.set()
        if self._lost.is_set():
            now = None
            with files.unanswered(self._path):
                now = self._store.read()
            why = f'its {NAME} was removed'
            if now is not None:
                why = f'{_in_words(_parse(now))} took it over, as this process gave no sign of life for {PATIENCE:g} s'
            raise UserError(
                f'MODEL_DIR = {self._model_dir!r} is no longer held by this process, which stops here: {why}.'
            )

    def release(self) -> None:
        """Removes the lock, if it is ours."""
        self._released.set()
        for _ in range(20):
            try:
                with files.unanswered(self._path), files.asking_once():
                    self._store.change(self._is_mine, None)
                return
            except _BusyError:
                self._sleep(0.01)

    def _is_mine(self, text: bytes) -> bool:
        return self._me['token'].encode() in text

    def _text(self) -> bytes:
        return json.dumps({**self._me, 'beat': self._beats}).encode().ljust(_SIZE - 1) + b'\n'


def _parse(text: bytes) -> dict[str, Any]:
    """Parses a lock; {} if it was cut off or is not a lock."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_words(holder: Mapping[str, Any]) -> str:
    if not {'process', 'host', 'since'} <= holder.keys():
        return 'another process'
    return f'process {holder["process"]} on {holder["host"]} (since {holder["since"]})'


@contextlib.contextmanager
def held(model_dir: str) -> Iterator[Callable[[bool], None]]:
    """Makes a run's folder and holds its lock, in process 0.

    Yields:
      A function to call before writing to the folder, which raises UserError if the lock was lost. Its argument is `look` of
      `Lock.check`. In other processes than 0 it does nothing.

    Raises:
      UserError: another process holds the lock.
    """
    lock = Lock(model_dir)

    def take() -> int:
        with writing_to(model_dir):
            files.absolute(model_dir).mkdir(parents=True, exist_ok=True)
            return int(not lock.take(_TOGETHER))

    try:
        while by_process_0(take, f'MODEL_DIR = {model_dir!r} is in use: process 0 says by whom.'):
            pass
        if jax.process_index() == 0:
            threading.Thread(target=lock.keep, name='lock', daemon=True).start()
            yield lambda look: lock.check(look=look)
        else:
            yield lambda look: None
    finally:
        lock.release()
