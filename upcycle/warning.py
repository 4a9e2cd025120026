"""Warnings of a command on standard error: each is given once, and below a long listing."""

import contextlib
import sys
from collections.abc import Iterator

# Warnings of this command, and whether they have been given; not while they are held.
_warned: dict[str, bool] = {}
_held: list[bool] = []


def once(text: str) -> None:
    """A warning on standard error; a command that opens a checkpoint twice gives it once."""
    if text not in _warned:
        _warned[text] = False
        if not _held:
            _give()


def forget() -> None:
    """Begins a command: whatever it warns of is said again."""
    _warned.clear()


@contextlib.contextmanager
def last() -> Iterator[None]:
    """Around a command whose listing is long: its warnings come below."""
    _held.append(True)
    try:
        yield
    finally:
        _held.pop()
        sys.stdout.flush()
        _give()


def _give() -> None:
    from upcycle.metrics import warn

    for text, given in _warned.items():
        if not given:
            warn(text)
            _warned[text] = True
