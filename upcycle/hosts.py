"""The processes of a run and their devices: finding each other, and refusing in a sentence what cannot be set up."""

import atexit
import contextlib
import glob
import ipaddress
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle.errors import STATUSES, Unavailable, UserError, status_of

if TYPE_CHECKING:
    import numpy as np

TIMEOUT = 300  # seconds, as JAX's
# Seconds between looks at what other processes say, and those that a process is given to end by itself.
_POLL = 1.0
_GRACE = 5.0
_ADDRESS = re.compile(r'(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^\s\[\]:/@]+)):(?P<port>[0-9]{1,5})')
_LONGEST_TEXT = 4096  # bytes that processes tell each other
Result = TypeVar('Result')
# Of TPUs, by either of their drivers.
_CHIPS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of '--coordinator_address'.

    Raises:
      UserError: it is not HOST:PORT.
    """
    found = _ADDRESS.fullmatch(text)
    with contextlib.suppress(ValueError):
        if found and 1 <= int(found['port']) <= 65535:
            return str(ipaddress.IPv6Address(found['six'])) if found['six'] else found['host'], int(found['port'])
    raise UserError(
        f'--coordinator_address={text} is not HOST:PORT with a port of 1 to 65535, such as 10.0.0.1:1234 or [fd00::1]:1234.'
    )


def join(address: str | None, count: int | None, index: int | None, timeout: float = TIMEOUT) -> None:
    """Joins the other processes of a run.

    JAX's client ends its process by SIGABRT when its time is over, and hears no signal meanwhile. So it waits in a thread, longer
    than we do.

    Args:
      address: of process 0; None, as the others: whatever the platform says.
      count: of processes.
      index: of this one.
      timeout: seconds.

    Raises:
      UserError: the platform does not say, or process 0 cannot listen there.
      Unavailable: not all came in time.
    """
    import jax

    if address is not None and index == 0:
        _require_free(parse_address(address)[1])
    found: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(address, count, index, initialization_timeout=int(timeout) + 3600)
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=connect, name='joining the other processes', daemon=True)
    thread.start()
    try:
        thread.join(timeout)
        if thread.is_alive():
            raise Unavailable(_who_is_missing(address, count, index, timeout))
        if found:
            raise UserError(f'the processes do not find each other: {_reason(found[0])}') from found[0]
        _watch_others()
    except BaseException as error:
        if thread.is_alive() or isinstance(error.__cause__, RuntimeError):
            # What client and service hold cannot be taken down while they wait, or after they have failed.
            atexit.register(_end, status_of(error))
        raise


def store() -> Any | None:
    """The key-value store of JAX's coordination service, which disturbs no collective; None: it does not run."""
    from jax._src import distributed

    return distributed.global_state.client


def lookup(store: Any, key: str) -> str | None:
    """What a key of the store holds; None: nothing, or the store does not answer."""
    try:
        return store.key_value_try_get(key)
    except Exception:  # JAX raises RuntimeErrors of its own
        return None


class Together:
    """Ends every process of a run when one of them fails. Otherwise the others would wait for it in their next collective.

    The process that fails writes why into the key-value store of JAX's coordination service. In every other process a thread
    reads the store, gives its process time to end by itself, and then ends it, since a process that waits in a collective runs no
    Python code. Process 0 ends last: the service ends with it, and JAX aborts every process that is still connected.

    Args:
      store: see `store`.
      index, count: this process, and how many there are.
      end: ends this process with a status.
      grace: seconds that a process is given to end by itself.
    """

    _FAILED = 'upcycle/failed'
    _DONE = 'upcycle/done'  # has come to its end
    _ENDED = 'upcycle/ended'  # will make no request any more

    def __init__(self, store: Any, index: int, count: int, end: Callable[[int], None], grace: float = _GRACE):
        self._store, self._index, self._count = store, index, count
        self._end, self._grace = end, grace
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name='watching the other processes', daemon=True)
        self._watching.start()

    def close(self) -> None:
        """Looks no more."""
        self._over.set()
        self._watching.join()

    def part(self) -> None:
        """Returns when all have come to their end, so that JAX takes nothing down while one of them may still fail."""
        self._announce(self._DONE)
        self._await(self._DONE, TIMEOUT)
        if lookup(self._store, self._FAILED) is not None:
            self._watching.join()
        self.close()

    def fail(self, status: int, text: str) -> None:
        """Tells the others why this process ends; of several that fail, the first is heard.

        Args:
          status: its exit status, and that of the others.
          text: a sentence.
        """
        self.close()
        with contextlib.suppress(Exception):  # another process was first, or the service is gone
            self._store.key_value_set(self._FAILED, json.dumps({'process': self._index, 'status': status, 'why': text}))
        self._leave()

    def _watch(self) -> None:
        while not self._over.wait(_POLL):
            if (told := lookup(self._store, self._FAILED)) is None:
                continue
            if self._over.wait(self._grace):
                return
            failed = json.loads(told)
            print(f'upcycle: process {failed["process"]} ended the run: {failed["why"]}', file=sys.stderr, flush=True)
            self._leave()
            self._end(failed['status'])
            return

    def _leave(self) -> None:
        """Returns when this process may end."""
        self._announce(self._ENDED)
        if self._index == 0:
            self._await(self._ENDED, 2 * (self._grace + _POLL))
            time.sleep(0.5)  # until they really have

    def _announce(self, what: str) -> None:
        with contextlib.suppress(Exception):  # the service is gone
            self._store.key_value_set(f'{what}/{self._index}', '', allow_overwrite=True)

    def _await(self, what: str, seconds: float) -> None:
        """Returns when all have announced it, one has failed first, or the time is over."""
        end = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            while len(self._store.key_value_dir_get(what)) < self._count and time.monotonic() < end:
                if what == self._DONE and lookup(self._store, self._FAILED) is not None:
                    return
                time.sleep(0.1)


_together: Together | None = None


def _watch_others() -> None:
    global _together
    from jax._src.distributed import global_state as state  # and not JAX's own functions, which set the devices up

    if state.num_processes > 1:
        count = _count(store(), state.process_id, state.num_processes)
        _together = Together(store(), state.process_id, count, _end)
        if count != state.num_processes:
            raise UserError(
                f'--process_count={state.num_processes}, and process 0 was started with {count}: give the same number in each.'
            )


def _count(store: Any, index: int, count: int) -> int:
    """How many processes there are, as process 0 was told, and with it JAX."""
    if index == 0:
        store.key_value_set('upcycle/count', str(count))
    return int(store.blocking_key_value_get('upcycle/count', 1000 * TIMEOUT))


def part(status: int, failure: str | None) -> None:
    """Parts from the other processes, where there are some, at the end of this one.

    Args:
      status: the exit status.
      failure: why this process ends early, in a sentence, with which the others end, too; None: it has done all.
    """
    if _together is not None and failure is None:
        _together.part()
    elif _together is not None:
        _together.fail(status, failure)
        # JAX's client would wait for the others.
        atexit.register(_end, status)


def _require_free(port: int) -> None:
    """JAX crashes where its service cannot listen."""
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(('', port)).close()
    except OSError as error:
        raise UserError(
            f'--coordinator_address: process 0 cannot listen at port {port} ({error.strerror}): end what does, or name another '
            'port.'
        ) from error


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _who_is_missing(address: str | None, count: int | None, index: int | None, timeout: float) -> str:
    what = f'not all {"" if count is None else f"{count} "}processes have come within {timeout:g} s'
    way_out = (
        'start the same command in each, check the network and firewalls between them, or raise --coordinator_timeout.'
    )
    if address is not None and index != 0:
        try:
            socket.create_connection(parse_address(address), timeout=2).close()
        except OSError as error:
            return f'process 0 does not answer at {address} ({error.strerror or error}), and {what}: {way_out}'
    return f'{what}{"" if address is None else f" to {address}"}: {way_out}'


def gathered(values: 'np.ndarray') -> 'np.ndarray':
    """The array of every process, (processes, *shape), in all of them; they call it at the same point."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    # Wider types would be cut to 32 bits without a word.
    assert values.dtype.itemsize <= 4, values.dtype
    with jax.set_mesh(None):
        return np.asarray(multihost_utils.process_allgather(values)).reshape(jax.process_count(), *values.shape)


def texts(text: str) -> list[str]:
    """The text of every process, cut off where it is very long, in all of them; they call it at the same point."""
    import numpy as np

    encoded = text.encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT, b'\0')
    return [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in gathered(np.frombuffer(encoded, np.uint8))]


def together(action: Callable[[], Result]) -> Result:
    """What an action returns in this process, when it has returned in all of them.

    An action that one process fails in alone must not have others wait for that one before they return.

    Raises:
      UserError: with the sentence of the first process that failed, the same in all.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    found = texts('' if error is None else f'{status_of(error)} {type(error).__name__}: {error}')
    failed = next((index for index, text in enumerate(found) if text), None)
    if failed is None:
        return result
    if error is not None and not isinstance(error, UserError):
        raise error
    status, _, text = found[failed].partition(' ')
    if int(status) not in (STATUSES[UserError], STATUSES[Unavailable]):
        raise UserError(f'process {failed} of {len(found)} failed ({text}): see its output.') from error
    kind = Unavailable if int(status) == STATUSES[Unavailable] else UserError
    raise kind(text.partition(': ')[2]) from error


def devices() -> list[Any]:
    """JAX's devices, of all processes. The first call sets them up, whose failure is the user's to correct.

    Raises:
      UserError: JAX cannot set up the platform that it was told to use, or any.
    """
    import jax

    try:
        with _without_noise():
            return jax.devices()
    except Exception as error:
        raise _no_platform(error) from error


def refused_by_jax(error: BaseException) -> UserError | None:
    """What JAX says of its environment, as a sentence, whichever of its functions was the first to look at it.

    Args:
      error: whatever ended a command.

    Returns:
      None: the error has nothing to do with JAX's platforms or settings.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [(frame.f_globals.get('__name__'), frame.f_code.co_name) for frame in frames]
    if not isinstance(error, Exception) or not frames:
        return None
    if ('jax._src.xla_bridge', 'backends') in names:
        return _no_platform(error)
    if names[-1][0] == 'jax._src.config':
        given = ', '.join(f'{name}={value}' for name, value in sorted(os.environ.items()) if name.startswith('JAX_'))
        return UserError(f'JAX does not take its settings, {given} ({_reason(error)}): correct or unset the variable.')
    return None


def _no_platform(error: Exception) -> UserError:
    import jax

    asked = os.environ.get('JAX_PLATFORMS') or jax.config.jax_platforms
    where = f'JAX_PLATFORMS={asked}' if asked else 'the devices of this machine'
    reason = _reason(error) or 'this JAX has no support for it, or the machine has no such device'
    return UserError(
        f'{where} cannot be used: {reason}: name a platform that this machine has, such as JAX_PLATFORMS=cpu, install '
        "upcycle's extra for it ([gpu] or [tpu]), or end the process that holds its devices."
    )


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """On a machine without a TPU, holds back what an installed libtpu writes to standard error; JAX's own warnings stay.

    With XLA_FLAGS everything is shown, since XLA ends the process at a flag that it does not know, and says so there.
    """
    if any(glob.glob(pattern) for pattern in _CHIPS) or os.environ.get('XLA_FLAGS'):
        yield
        return
    warnings = _Records()
    logger = logging.getLogger('jax')
    logger.addHandler(warnings)
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            os.close(terminal)
            logger.removeHandler(warnings)
    for text in warnings.texts:
        print(f'warning: {text}', file=sys.stderr, flush=True)


class _Records(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def _reason(error: Exception) -> str:
    """The first line of what JAX says, without its own advice and final stop."""
    first = next(iter(str(error).splitlines()), '')
    return re.sub(r'\s*\((?:set|you may need) .*\)$', '', first).rstrip('. ')
