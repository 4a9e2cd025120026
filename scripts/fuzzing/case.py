"""A trial of `scripts/fuzz.py` and how it may end."""

import dataclasses
from collections.abc import Callable

REFUSED, SAME, ANOTHER, BLIND = 'refused', 'as without the damage', 'another valid one', 'the format cannot tell'
TRACEBACK, HANG, SILENT, LOST, STATUS = 'TRACEBACK', 'HANG', 'SILENT SUCCESS', 'LOST FILE', 'STATUS'
FAILURES = (TRACEBACK, HANG, SILENT, LOST, STATUS)


class LostError(Exception):
    """Something that was there before a case is gone or changed."""


class StatusError(Exception):
    """A process ended with a status that it must not have."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One trial.

    Attributes:
      kind: of the damage, for the table.
      description: of this damage, to read.
      run: does it; returns an outcome, or raises.
    """

    kind: str
    description: str
    run: Callable[[], str]
