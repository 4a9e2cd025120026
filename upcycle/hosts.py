"""The processes of a run and their devices: finding each other, and refusing in a sentence what cannot be set up."""

import atexit
import contextlib
import glob
import ipaddress
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from upcycle.errors import STATUSES, Unavailable, UserError, status_of

TIMEOUT = 300  # seconds, as JAX's
_ADDRESS = re.compile(r'(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^\s\[\]:/@]+)):(?P<port>\d{1,5})')
_LONGEST_TEXT = 4096  # bytes that processes tell each other of an error
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
    except BaseException as error:
        if thread.is_alive() or isinstance(error.__cause__, RuntimeError):
            # What client and service hold cannot be taken down while they wait, or after they have failed.
            atexit.register(_end, status_of(error))
        raise


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


def gathered(values: np.ndarray) -> np.ndarray:
    """The array of every process, (processes, *shape), in all of them; they call it at the same point."""
    import jax
    from jax.experimental import multihost_utils

    # Wider types would be cut to 32 bits without a word.
    assert values.dtype.itemsize <= 4, values.dtype
    with jax.set_mesh(None):
        return np.asarray(multihost_utils.process_allgather(values)).reshape(jax.process_count(), *values.shape)


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
    text = ('' if error is None else f'{status_of(error)} {type(error).__name__}: {error}').encode()[:_LONGEST_TEXT]
    found = gathered(np.frombuffer(text.ljust(_LONGEST_TEXT, b'\0'), np.uint8))
    texts = [bytes(row).rstrip(b'\0').decode(errors='ignore') for row in found]
    failed = next((index for index, text in enumerate(texts) if text), None)
    if failed is None:
        return result
    if error is not None and not isinstance(error, UserError):
        raise error
    status, _, text = texts[failed].partition(' ')
    if int(status) not in (STATUSES[UserError], STATUSES[Unavailable]):
        raise UserError(f'process {failed} of {len(texts)} failed ({text}): see its output.') from error
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
    """On a machine without a TPU, holds back what an installed libtpu writes to standard error; JAX's own warnings stay."""
    if any(glob.glob(pattern) for pattern in _CHIPS):
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
