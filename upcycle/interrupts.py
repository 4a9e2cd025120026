"""Handling of SIGINT without a traceback: exit status 130, or death by the signal.

KeyboardInterrupt is not safe everywhere: a library that is interrupted during its import raises other errors, and exceptions in
destructors and callbacks are lost. There, and at a second SIGINT, the process dies at once, which loses no more than SIGKILL.
"""

import os
import signal
import sys
import types
from typing import Any

_came = False


def listen() -> Any:
    """Makes SIGINT raise KeyboardInterrupt where that is safe, unless the process was started with SIGINT ignored.

    Returns:
      The previous handler, for `signal.signal`; None if nothing was changed.
    """
    global _came
    _came = False
    before = signal.getsignal(signal.SIGINT)
    if before not in (signal.default_int_handler, signal.SIG_DFL):
        return None
    try:
        signal.signal(signal.SIGINT, _interrupt)
    except ValueError:
        return None  # only the main thread can handle signals
    sys.unraisablehook = _lost
    return before


def came() -> bool:
    """Returns whether SIGINT came since `listen`, even if the KeyboardInterrupt was lost."""
    return _came


def die() -> None:
    """Ends the process as an unhandled SIGINT does."""
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
    """Ends the process at a KeyboardInterrupt that cannot be raised."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        die()
    sys.__unraisablehook__(unraisable)
