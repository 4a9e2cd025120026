"""Records whose content is broken: named, counted, and left out up to a bound.

What cannot be reached, such as a missing file, is no bad record: another host or another day may reach it, and hosts that leave
out different records train on different data.
"""

from __future__ import annotations

from upcycle.errors import UserError
from upcycle.metrics import warn


class BadRecordError(UserError):
    """One record is broken; the message names it, and what would repair it."""


class BadRecords:
    """Those of one data source that this process has met, each counted once.

    most: so many may be left out [MAX_BAD_RECORDS].
    """

    def __init__(self, most: int):
        self._most = most
        self._found: set[str] = set()

    def leave_out(self, record: BadRecordError) -> None:
        """Counts a record and says so on standard error.

        Raises:
            UserError: if it is one too many.
        """
        text = str(record)
        if text in self._found:
            return
        self._found.add(text)
        if self._most < 1:
            raise record
        if len(self._found) > self._most:
            raise UserError(
                f'{len(self._found)} bad records are more than MAX_BAD_RECORDS = {self._most}; the last one: {text}'
            )
        warn(f'bad record {len(self._found)} of at most {self._most} is left out: {text}')


def checked_bound(most: int) -> int:
    """The bound.

    Raises:
        UserError: if it is no whole number of at least 0.
    """
    if not isinstance(most, int) or isinstance(most, bool) or most < 0:
        raise UserError(f'MAX_BAD_RECORDS = {most!r} must be a whole number of at least 0.')
    return most
