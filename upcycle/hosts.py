"""The processes of a run: joining, exchanging results, and ending together."""

import atexit
import contextlib
import ipaddress
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from upcycle.errors import STATUSES, Unavailable, UserError, status_of
from upcycle.platforms import reason_of

if TYPE_CHECKING:
    import numpy as np

TIMEOUT = 300  # seconds, as JAX's
# Seconds between polls of the store, and seconds that a process has to end by itself.
_POLL = 1.0
_GRACE = 5.0
_ADDRESS = re.compile(r'(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^\s\[\]:/@]+)):(?P<port>[0-9]{1,5})')
_LONGEST_TEXT = 4096  # bytes of a text exchanged between processes
Result = TypeVar('Result')


def parse_address(text: str) -> tuple[str, int]:
    """Parses the host and port of '--coordinator_address'.

    Raises:
      UserError: the address is not HOST:PORT.
    """
    match = _ADDRESS.fullmatch(text)
    with contextlib.suppress(ValueError):
        if match and 1 <= int(match['port']) <= 65535:
            return str(ipaddress.IPv6Address(match['six'])) if match['six'] else match['host'], int(match['port'])
    raise UserError(
        f'--coordinator_address={text} is not HOST:PORT with a port of 1 to 65535, such as 10.0.0.1:1234 or [fd00::1]:1234.'
    )


def join(address: str | None, count: int | None, index: int | None, timeout: float = TIMEOUT) -> None:
    """Joins the other processes of a run.

    JAX's client aborts its process at its timeout, and blocks signals meanwhile. So it runs in a thread, with a longer timeout
    than ours.

    Args:
      address: of process 0. None here, in `count` or in `index`: detected by JAX from the platform.
      count: number of processes.
      index: number of this process.
      timeout: seconds.

    Raises:
      UserError: JAX cannot detect a value, or process 0 cannot listen at the address.
      Unavailable: not all processes joined in time.
    """
    import jax

    if address is not None and index == 0:
        _require_free(parse_address(address)[1])
    errors: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(address, count, index, initialization_timeout=int(timeout) + 3600)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=connect, name='joining the other processes', daemon=True)
    thread.start()
    try:
        thread.join(timeout)
        if thread.is_alive():
            raise Unavailable(_who_is_missing(address, count, index, timeout))
        if errors:
            raise UserError(f'the processes cannot connect: {reason_of(errors[0])}') from errors[0]
        _watch_others()
    except BaseException as error:
        if thread.is_alive() or isinstance(error.__cause__, RuntimeError):
            # JAX's client and service cannot be shut down while they wait or after they failed.
            atexit.register(_end, status_of(error))
        raise


def store() -> Any | None:
    """Returns the key-value store of JAX's coordination service, usable during collectives, or None if it does not run."""
    from jax._src import distributed

    return distributed.global_state.client


def lookup(store: Any, key: str) -> str | None:
    """Returns the value of a key, or None if it has none or the store does not answer."""
    try:
        return store.key_value_try_get(key)
    except Exception:  # a RuntimeError of JAX
        return None


class Together:
    """Ends every process of a run when one of them fails; otherwise the others would hang in their next collective.

    The failing process writes the reason into the key-value store of JAX's coordination service. In every other process a thread
    polls the store, gives its process time to end by itself, and then ends it: a process that waits in a collective runs no
    Python code. Process 0 ends last: the service ends with it, and JAX aborts every process that is still connected.

    Args:
      store: see `store`.
      index, count: the number of this process, and the number of processes.
      end: ends this process with a status.
      grace: seconds that a process has to end by itself.
    """

    _FAILED = 'upcycle/failed'
    _DONE = 'upcycle/done'  # the process is finished
    _ENDED = 'upcycle/ended'  # the process makes no more requests

    def __init__(self, store: Any, index: int, count: int, end: Callable[[int], None], grace: float = _GRACE):
        self._store, self._index, self._count = store, index, count
        self._end, self._grace = end, grace
        self._over = threading.Event()
        self._watching = threading.Thread(target=self._watch, name='watching the other processes', daemon=True)
        self._watching.start()

    def close(self) -> None:
        """Stops polling."""
        self._over.set()
        self._watching.join()

    def part(self) -> None:
        """Waits until all processes are finished, so that JAX is not shut down while one of them may still fail."""
        self._announce(self._DONE)
        self._await(self._DONE, TIMEOUT)
        if lookup(self._store, self._FAILED) is not None:
            self._watching.join()
        self.close()

    def fail(self, status: int, text: str) -> None:
        """Tells the others why this process ends. The first process that fails counts.

        Args:
          status: exit status of this process and the others.
          text: the reason, a sentence.
        """
        self.close()
        with contextlib.suppress(Exception):  # another process was first, or the service is gone
            self._store.key_value_set(self._FAILED, json.dumps({'process': self._index, 'status': status, 'why': text}))
        self._leave()

    def _watch(self) -> None:
        while not self._over.wait(_POLL):
            if (failure := lookup(self._store, self._FAILED)) is None:
                continue
            if self._over.wait(self._grace):
                return
            failed = json.loads(failure)
            print(f'upcycle: process {failed["process"]} ended the run: {failed["why"]}', file=sys.stderr, flush=True)
            self._leave()
            self._end(failed['status'])
            return

    def _leave(self) -> None:
        """Waits until this process may end."""
        self._announce(self._ENDED)
        if self._index == 0:
            self._await(self._ENDED, 2 * (self._grace + _POLL))
            time.sleep(0.5)  # until they have exited

    def _announce(self, event: str) -> None:
        with contextlib.suppress(Exception):  # the service is gone
            self._store.key_value_set(f'{event}/{self._index}', '', allow_overwrite=True)

    def _await(self, event: str, seconds: float) -> None:
        """Waits until all processes have announced the event, one has failed, or the timeout."""
        end = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            while len(self._store.key_value_dir_get(event)) < self._count and time.monotonic() < end:
                if event == self._DONE and lookup(self._store, self._FAILED) is not None:
                    return
                time.sleep(0.1)


_together: Together | None = None


def _watch_others() -> None:
    global _together
    from jax._src.distributed import global_state as state  # jax.process_count() would initialise the devices

    if state.num_processes > 1:
        count = _count(store(), state.process_id, state.num_processes)
        _together = Together(store(), state.process_id, count, _end)
        if count != state.num_processes:
            raise UserError(
                f'--process_count={state.num_processes}, but process 0 was started with {count}: use the same number in each.'
            )


def _count(store: Any, index: int, count: int) -> int:
    """Returns the number of processes that process 0, and so JAX, was started with."""
    if index == 0:
        store.key_value_set('upcycle/count', str(count))
    return int(store.blocking_key_value_get('upcycle/count', 1000 * TIMEOUT))


def part(status: int, failure: str | None) -> None:
    """Leaves the other processes, if any, at the end of this process.

    Args:
      status: the exit status.
      failure: why this process ends early, a sentence, which also ends the others; None if it is finished.
    """
    if _together is not None and failure is None:
        _together.part()
    elif _together is not None:
        _together.fail(status, failure)
        # JAX's client would wait for the others.
        atexit.register(_end, status)


def _require_free(port: int) -> None:
    """Raises UserError if the port is in use: JAX would crash."""
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(('', port)).close()
    except OSError as error:
        raise UserError(
            f'--coordinator_address: process 0 cannot listen at port {port} ({error.strerror}): end the process that uses it, or '
            'choose another port.'
        ) from error


def _end(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _who_is_missing(address: str | None, count: int | None, index: int | None, timeout: float) -> str:
    problem = f'not all {"" if count is None else f"{count} "}processes have connected within {timeout:g} s'
    fix = (
        'start the same command in each, check the network and firewalls between them, or raise --coordinator_timeout.'
    )
    if address is not None and index != 0:
        try:
            socket.create_connection(parse_address(address), timeout=2).close()
        except OSError as error:
            return f'process 0 does not answer at {address} ({error.strerror or error}), and {problem}: {fix}'
    return f'{problem}{"" if address is None else f" to {address}"}: {fix}'


def gathered(values: 'np.ndarray') -> 'np.ndarray':
    """Gathers the arrays of all processes, (processes, *shape). A collective: all processes must call it."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    # JAX would silently cut wider types to 32 bits.
    assert values.dtype.itemsize <= 4, values.dtype
    with jax.set_mesh(None):
        return np.asarray(multihost_utils.process_allgather(values)).reshape(jax.process_count(), *values.shape)


def texts(text: str) -> list[str]:
    """Gathers the texts of all processes, cut off at `_LONGEST_TEXT`. A collective: all processes must call it."""
    import numpy as np

    encoded = text.encode()[:_LONGEST_TEXT].ljust(_LONGEST_TEXT, b'\0')
    return [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in gathered(np.frombuffer(encoded, np.uint8))]


def together(action: Callable[[], Result]) -> Result:
    """Runs an action in all processes and returns this process's result once it has succeeded in all of them.

    An action that may fail in a single process must not contain a collective: the others would hang in it.

    Raises:
      UserError: the action failed; with the message of the first such process, the same in all.
    """
    import jax

    if jax.process_count() == 1:
        return action()
    result, error = None, None
    try:
        result = action()
    except Exception as raised:
        error = raised
    messages = texts('' if error is None else f'{status_of(error)} {type(error).__name__}: {error}')
    failed = next((index for index, text in enumerate(messages) if text), None)
    if failed is None:
        return result
    if error is not None and not isinstance(error, UserError):
        raise error
    status, _, text = messages[failed].partition(' ')
    if int(status) not in (STATUSES[UserError], STATUSES[Unavailable]):
        raise UserError(f'process {failed} of {len(messages)} failed ({text}): see its output.') from error
    kind = Unavailable if int(status) == STATUSES[Unavailable] else UserError
    raise kind(text.partition(': ')[2]) from error
