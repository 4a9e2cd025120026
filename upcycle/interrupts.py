"""SIGINT without a traceback, from the first line of our code to the last: exit status 130, or death by the signal.

KeyboardInterrupt is not safe everywhere: libraries that are interrupted while they load raise other errors, and an exception in
a destructor or callback is lost. There, and at a second SIGINT, the process dies at once, which loses no more than SIGKILL does.
"""

import os
import signal
import sys
import types
from typing import Any

_came = False


def listen() -> Any:
    """Has SIGINT raise KeyboardInterrupt where that is safe, unless whoever started the process has it ignored.

    Returns:
      The handler before, for `signal.signal`; None: nothing was changed.
    """
    global _came
    _came = False
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, signal.SIG_DFL):
        return None
    try:
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:
        return None  # signals are the main thread's
    sys.unraisablehook = _lost
    return before


def came() -> bool:
    """Whether SIGINT came since `listen`, whatever has become of the KeyboardInterrupt."""
    return _came


def die() -> None:
    """Ends the process as SIGINT does where nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)


def _interrupt(number: int, frame: types.FrameType | None) -> None:
    global _came
    again, _came = _came, True
    if again or _is_loading(frame):
        die()
    raise KeyboardInterrupt


def _is_loading(frame: types.FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith('<frozen importlib'):
            return True
        frame = frame.f_back
    return False


def _lost(unraisable: Any) -> None:
    """Of what cannot be raised, KeyboardInterrupt alone matters: it was meant for the command."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        die()
    sys.__unraisablehook__(unraisable)
