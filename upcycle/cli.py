"""The command line. Heavy imports wait until a command needs them, so that `--help` is quick."""

import contextlib
import errno
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
from upcycle.errors import INTERRUPTED, PREEMPTED, UserError, status_of, whole_list, without_password

TRACEBACK = 'UPCYCLE_TRACEBACK'  # an environment variable


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits: 0 when it did what was asked, else by `errors.STATUSES`, and 1 after what nobody has foreseen.

    Args:
      arguments: of the command line; None: those of this process, which ends with the command.
    """
    before = interrupts.listen()
    _open_standard_streams()
    failure: BaseException | None = None
    try:
        code = run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except SystemExit as stop:  # argparse has said what there is to say
        code = stop.code
    except BaseException as error:
        code = _explain(error)
        failure = error
    code = _part(code, failure)
    if arguments is None:
        _say_no_more(code)
    elif before is not None:
        signal.signal(signal.SIGINT, before)
    sys.exit(code)


def _explain(error: BaseException) -> int:
    """Says why a command ended early; its exit status."""
    code = INTERRUPTED if interrupts.came() else status_of(error)
    if code == INTERRUPTED:
        _say('interrupted; the same command goes on from the last checkpoint, where it has written one.')
    elif code != 1:
        _say(without_password(str(error)) + whole_list(error))
    elif reason := _cannot_print(error):
        _say(f'standard output cannot be written ({reason}): make room where it goes, or send it elsewhere.')
        _drop(sys.stdout)
        code = 2
    else:
        said = ' '.join(str(error).split())
        said = f'{type(error).__name__}: {said[:500]}' if said else type(error).__name__
        if traced := _is_traced():
            traceback.print_exception(error)
        _say(f'unexpected {without_password(said)}{"" if traced else f" ({TRACEBACK}=1 shows where)"}')
    return code


def _part(code: int, failure: BaseException | None) -> int:
    """Parts from the other processes of a run, which end with this one; asked to stop, all do so at the same step.

    Returns:
      The exit status.
    """
    from upcycle import hosts

    told = None if failure is None or code == PREEMPTED else ' '.join(str(failure).split()) or type(failure).__name__
    try:
        hosts.part(code, None if told is None else without_password(told))
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _is_traced() -> bool:
    return os.environ.get(TRACEBACK, '') not in ('', '0')


def _say(text: str) -> None:
    # A terminal that has gone changes nothing about the exit status.
    with contextlib.suppress(OSError, ValueError):
        print(f'upcycle: {text}', file=sys.stderr, flush=True)


def _cannot_print(error: BaseException) -> str | None:
    """Why standard output takes no more, where that is what an error may be about; None: it does, as far as one line tells."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        print(flush=True)
    except OSError as error:
        return error.strerror
    return None


def _drop(stream: TextIO) -> None:
    """Lets go of what a stream still holds and cannot write."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _open_standard_streams() -> None:
    """Makes all three usable: closed ones lead nowhere, as do those that nobody reads any more, and what an encoding lacks is
    spelt out (as '\\xb1')."""
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        stream = getattr(sys, name)
        if stream is None:
            with contextlib.suppress(OSError):
                os.fstat(number)
                continue
            # Else the next file that is opened would be the stream, and get what libraries print.
            os.open(os.devnull, os.O_RDWR)
            stream = open(number, 'r' if number == 0 else 'w', encoding='utf-8', closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if number and isinstance(stream, io.TextIOWrapper):
            stream = _that_may_go(stream)
            setattr(sys, name, stream)
            stream.reconfigure(errors='backslashreplace')


class _MayGo(io.FileIO):
    """A pipe or terminal that leads nowhere once it is gone: a command ends when its work is done, read or not."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return super().write(data)


def _that_may_go(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """The same stream, where it is a pipe or a terminal, on a `_MayGo`."""
    before = getattr(stream.buffer, 'raw', stream.buffer)
    if type(before) is not io.FileIO or stat.S_ISREG(os.fstat(before.fileno()).st_mode):
        return stream
    raw = _MayGo(before.fileno(), 'w', closefd=False)
    return io.TextIOWrapper(
        raw if stream.buffer is before else io.BufferedWriter(raw),  # PYTHONUNBUFFERED
        stream.encoding,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _say_no_more(code: int) -> None:
    """Before the interpreter ends: what libraries have left open is not the user's, and SIGINT has nothing to interrupt."""
    with contextlib.suppress(ValueError):
        if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)
    if code == INTERRUPTED:
        os._exit(code)  # threads of JAX and Orbax that are at work crash an interpreter that ends
    if code and not _is_traced():
        logging.disable()
        sys.unraisablehook = lambda unraisable: None


def run(given: Sequence[str]) -> int:
    """Parses and dispatches; raises UserError where `main` prints it."""
    warning.forget()
    options, rest = arguments.parser().parse_known_args(given)
    bindings = {}
    for argument in rest:
        name, equals, value = argument.removeprefix('--gin.').partition('=')
        if not argument.startswith('--gin.') or not equals or not name:
            raise UserError(f'{argument} is not understood: bindings look like --gin.NAME=VALUE; see `upcycle --help`.')
        bindings[name] = value
    if bindings and not hasattr(options, 'gin_file'):
        raise UserError(f'{options.command} takes no gin bindings: leave out --gin.{next(iter(bindings))}.')
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(f'the working folder is gone ({error.strerror}): change into one that is there.') from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise UserError('no folder for temporary files can be written: set TMPDIR to one that can.') from error
    try:
        return options.handler(options, bindings) or 0
    except Exception as error:
        if status_of(error) != 1:
            raise
        from upcycle import files, platforms

        refusal = files.refused_by_bucket(error, given) or platforms.refused_by_jax(error)
        if refusal is None:
            raise
        raise refusal from error
