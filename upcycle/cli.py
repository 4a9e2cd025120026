"""The command line. Modules that load JAX are imported by the command that needs them, so that `--help` is quick."""

import contextlib
import errno
import gc
import io
import logging
import os
import signal
import stat
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any, TextIO

from upcycle import arguments, interrupts, warning
from upcycle.errors import INTERRUPTED, PREEMPTED, UserError, one_line, status_of, whole_list, without_password

TRACEBACK = 'UPCYCLE_TRACEBACK'  # environment variable: print the traceback of an unexpected error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: with 0 on success, else by `errors.STATUSES`; 1 means an unexpected error.

    Args:
      arguments: the command line without the program's name. None: `sys.argv`, and the process ends with the command.
    """
    before = interrupts.listen()
    _open_standard_streams()
    failure: BaseException | None = None
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except SystemExit as stop:  # argparse has printed its message
        code = stop.code
    except BaseException as error:
        code = _report(error)
        failure = error
    code = _leave_hosts(code, failure)
    if arguments is None:
        _close_quietly(code)
    elif before is not None:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _report(error: BaseException) -> int:
    """Prints why a command ended early; returns its exit status."""
    code = INTERRUPTED if interrupts.came() else status_of(error)
    if code == INTERRUPTED:
        _print('interrupted; repeat the command to resume from the last checkpoint, if one was written.')
    elif code != 1:
        _print(without_password(str(error)) + whole_list(error))
    elif reason := _cannot_print(error):
        _print(f'standard output cannot be written ({reason}): free space where it goes, or redirect it.')
        _discard(sys.stdout)
        code = 2
    else:
        name = type(error).__name__
        text = f'{name}: {one_line(error)[:500]}' if str(error) else name
        if traced := _is_traced():
            traceback.print_exception(error)
        _print(f'unexpected {without_password(text)}{"" if traced else f" ({TRACEBACK}=1 shows where)"}')
    return code


def _leave_hosts(code: int, failure: BaseException | None) -> int:
    """Leaves the other processes of the run, which end with this one; after a preemption all stop at the same step.

    Returns:
      The exit status.
    """
    from upcycle import hosts

    reason = None if failure is None or code == PREEMPTED else without_password(one_line(failure))
    try:
        hosts.part(code, reason)
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _is_traced() -> bool:
    return os.environ.get(TRACEBACK, '') not in ('', '0')


def _print(text: str) -> None:
    # A closed terminal does not change the exit status.
    with contextlib.suppress(OSError, ValueError):
        print(f'upcycle: {text}', file=sys.stderr, flush=True)


def _cannot_print(error: BaseException) -> str | None:
    """Returns why standard output cannot be written, if `error` may come from that; else None."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)
    except OSError as error:
        return error.strerror
    return None


def _discard(stream: TextIO) -> None:
    """Discards what a stream has buffered and cannot write."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Makes the three standard streams usable.

    A closed stream, and a pipe or terminal whose other end is closed, become the null device; characters that an encoding lacks
    are escaped (as '\\xb1').
    """
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            # Without this the next opened file would get the descriptor, and what libraries print.
            os.open(os.devnull, os.O_RDWR)
            stream = open(number, 'r' if number == 0 else 'w', encoding='utf-8', closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream = _without_broken_pipes(stream)
            setattr(sys, name, stream)
            stream.reconfigure(errors='backslashreplace')


class _Pipe(io.FileIO):
    """A pipe or terminal that becomes the null device when its other end closes, so that the command finishes its work."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def _without_broken_pipes(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream on a `_Pipe`; unchanged if it is a regular file."""
    before = getattr(stream.buffer, 'raw', stream.buffer)
    if type(before) is not io.FileIO or stat.S_ISREG(os.fstat(before.fileno()).st_mode):
        return stream
    raw = _Pipe(before.fileno(), 'w', closefd=False)
    return io.TextIOWrapper(
        raw if stream.buffer is before else io.BufferedWriter(raw),  # PYTHONUNBUFFERED
        stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _close_quietly(code: int) -> None:
    """Silences libraries that complain at exit about what they left open, and SIGINT, which has nothing left to interrupt."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(stream)
    gc.freeze()  # Python collects everything when it ends, which takes as long as the imports
    if code == INTERRUPTED:
        os._exit(code)  # working threads of JAX and Orbax would crash an interpreter that ends
    if code and not _is_traced():
        logging.disable()
        sys.unraisablehook = lambda unraisable: None


def run(given: Sequence[str]) -> int:
    """Parses a command line and runs its command; returns the exit status.

    Raises:
      UserError: a mistake, which `main` prints.
    """
    warning.forget()
    parsed, rest = arguments.parser().parse_known_args(given)
    options = vars(parsed)
    command, handler, bindings = options.pop('command'), options.pop('handler'), {}
    for argument in rest:
        name, equals, value = argument.removeprefix('--gin.').partition('=')
        if not argument.startswith('--gin.') or not equals or not name:
            raise UserError(
                f'unknown argument {argument}: bindings are written --gin.NAME=VALUE; see `upcycle --help`.'
            )
        bindings[name] = value
    if 'gin_files' in options:
        options['bindings'] = bindings
    elif bindings:
        raise UserError(f'{command} takes no gin bindings: remove --gin.{next(iter(bindings))}.')
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f'the working folder is gone ({error.strerror}): change to an existing one.') from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError('no folder for temporary files is writable: set TMPDIR to one that is.') from error
    try:
        return handler(**options) or 0
    except Exception as error:
        if status_of(error) != 1:
            raise
        from upcycle import files, platforms

        refusal = files.refused_by_bucket(error, given) or platforms.refused_by_jax(error)
        if refusal is None:
            raise
        raise refusal from error
