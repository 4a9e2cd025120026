"""Records with broken content: named, counted, and skipped up to a limit.

A record that cannot be reached, such as a missing file, is not a bad record: another host may reach it, and hosts that skip
different records train on different data.
"""

from __future__ import annotations

from upcycle.errors import UserError
from upcycle.warning import warn


class BadRecordError(UserError):
    """One record is broken. The message names it and the fix."""


class BadRecords:
    """Counts the bad records of one data source in this process, each once.

    Args:
      most: number of records that may be skipped [MAX_BAD_RECORDS].
      setting: name of that number, for messages.
    """

    def __init__(self, most: int, setting: str = 'MAX_BAD_RECORDS'):
        self._most, self._setting = most, setting
        self._seen: set[str] = set()

    def leave_out(self, record: BadRecordError) -> None:
        """Counts a record and warns on standard error.

        Raises:
          UserError: the limit is exceeded.
        """
        text = str(record)
        if text in self._seen:
            return
        self._seen.add(text)
        if self._most < 1:
            raise record
        if len(self._seen) > self._most:
            raise UserError(
                f'{len(self._seen)} bad records are more than {self._setting} = {self._most}; the last one: {text}'
            )
        warn(f'bad record {len(self._seen)} of at most {self._most} is skipped: {text}')
