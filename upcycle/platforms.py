"""JAX's devices, and sentences for its errors if it cannot set them up."""

import contextlib
import glob
import logging
import logging.handlers
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from upcycle.errors import UserError

# Device files of TPUs, by either of their drivers.
_CHIPS = ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*')


def devices() -> list[Any]:
    """Returns JAX's devices of all processes. The first call sets them up.

    Raises:
      UserError: JAX cannot set up the platform that it should use, or any.
    """
    import jax

    try:
        with _without_noise():
            return jax.devices()
    except Exception as error:
        raise _no_platform(error) from error


def refused_by_jax(error: BaseException) -> UserError | None:
    """Turns an error of JAX about its environment into a sentence.

    Args:
      error: any error that ended a command.

    Returns:
      The sentence, or None if the error is not about JAX's platforms or settings.
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
            f'JAX does not accept its settings {given} ({reason_of(error)}): correct or unset the variable.'
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
    """Hides the output of libtpu on standard error on machines without a TPU, but not JAX's own warnings.

    With XLA_FLAGS nothing is hidden, because XLA ends the process at an unknown flag and names it on standard error.
    """
    if any(glob.glob(pattern) for pattern in _CHIPS) or os.environ.get('XLA_FLAGS'):
        yield
        return
    warnings = logging.handlers.BufferingHandler(1000)
    warnings.setLevel(logging.WARNING)
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
    for record in warnings.buffer:
        print(f'warning: {record.getMessage()}', file=sys.stderr, flush=True)


def reason_of(error: Exception) -> str:
    """Returns the first line of an error of JAX, without its advice and full stop."""
    first = next(iter(str(error).splitlines()), '')
    return re.sub(r'\s*\((?:set|you may need) .*\)$', '', first).rstrip('. ')
