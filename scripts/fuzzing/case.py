"""A trial of `scripts/fuzz.py` and how it may end."""

import dataclasses
from collections.abc import Callable

REFUSED, SAME, ANOTHER, BLIND = 'refused', 'as without the damage', 'another valid one', 'the format cannot tell'
TRACEBACK, HANG, SILENT = 'TRACEBACK', 'HANG', 'SILENT SUCCESS'
FAILURES = (TRACEBACK, HANG, SILENT)


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
