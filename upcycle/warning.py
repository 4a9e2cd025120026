"""Warnings of a command on standard error: each is printed once, and after a long listing."""

import contextlib
import sys
from collections.abc import Iterator

_printed: set[str] = set()
# Warnings held until the end of `last`; None outside of it.
_held: list[str] | None = None


def warn(text: str) -> None:
    """Prints a warning on standard error."""
    print(f'warning: {text}', file=sys.stderr, flush=True)


def once(text: str) -> None:
    """Prints a warning once per command, even if a checkpoint is opened twice."""
    if text in _printed:
        return
    _printed.add(text)
    if _held is None:
        warn(text)
    else:
        _held.append(text)


def forget() -> None:
    """Starts a new command, which prints all of its warnings."""
    _printed.clear()


@contextlib.contextmanager
def last() -> Iterator[None]:
    """Holds warnings until the end of the block, so that they follow a long listing."""
    global _held
    _held = held = []
    try:
        yield
    finally:
        _held = None
        sys.stdout.flush()
        for text in held:
            warn(text)
