"""JAX's devices in this process, and its errors where it cannot set them up."""

import contextlib
import glob
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from upcycle.errors import UserError

# Of TPUs, by either of their drivers.
_CHIPS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')


def devices() -> list[Any]:
    """JAX's devices, of all processes. The first call sets them up.

    Raises:
      UserError: JAX cannot set up the platform that it is told to use, or any.
    """
    import jax

    try:
        with _without_noise():
            return jax.devices()
    except Exception as error:
        raise _no_platform(error) from error


def refused_by_jax(error: BaseException) -> UserError | None:
    """An error of JAX about its environment, as a sentence, whichever of its functions raised it.

    Args:
      error: any that ended a command.

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
        return UserError(
            f'JAX does not take its settings, {given} ({reason_of(error)}): correct or unset the variable.'
        )
    return None


def _no_platform(error: Exception) -> UserError:
    import jax

    asked = os.environ.get('JAX_PLATFORMS') or jax.config.jax_platforms
    subject = f'JAX_PLATFORMS={asked}' if asked else 'the devices of this machine'
    reason = reason_of(error) or 'this JAX has no support for it, or the machine has no such device'
    return UserError(
        f'{subject} cannot be used: {reason}: name a platform that this machine has, such as JAX_PLATFORMS=cpu, install '
        "upcycle's extra for it ([gpu] or [tpu]), or end the process that holds its devices."
    )


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """On a machine without a TPU, hides the output of an installed libtpu on standard error; JAX's own warnings stay.

    With XLA_FLAGS everything is shown: XLA ends the process at an unknown flag, and names it there.
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


def reason_of(error: Exception) -> str:
    """The first line of an error of JAX, without its advice and final stop."""
    first = next(iter(str(error).splitlines()), '')
    return re.sub(r'\s*\((?:set|you may need) .*\)$', '', first).rstrip('. ')
