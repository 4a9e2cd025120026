"""A case of `scripts/fuzz.py` and its outcomes."""

import dataclasses
from collections.abc import Callable

REFUSED, SAME, ANOTHER, BLIND = 'refused', 'as without the damage', 'another valid one', 'the format cannot tell'
TRACEBACK, HANG, SILENT, LOST, STATUS = 'TRACEBACK', 'HANG', 'SILENT SUCCESS', 'LOST FILE', 'STATUS'
FAILURES = (TRACEBACK, HANG, SILENT, LOST, STATUS)


class LostError(Exception):
    """A file that existed before a case is missing or changed."""


class StatusError(Exception):
    """A process ended with an unexpected exit status."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
      kind: kind of damage, for the table.
      description: description of the damage.
      run: runs the case; returns an outcome, or raises.
    """

    kind: str
    description: str
    run: Callable[[], str]
