"""What ends a command early: a user's mistake, or a request to stop."""

import enum
from typing import TypeVar


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the binding, path or leaf and the way out. The command line prints it without a
    traceback and exits with 2.
    """


class Preempted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has saved its state. The command line exits with `PREEMPTED`."""


# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on. See docs/launching.md.
PREEMPTED = 75

Member = TypeVar('Member', bound=enum.StrEnum)


def one_of(kind: type[Member], value: str, binding: str) -> Member:
    """The member of an enum that a binding names.

    Raises:
      UserError: it names none.
    """
    if value not in set(kind):
        raise UserError(f'{binding} = {value!r} is not one of {", ".join(kind)}.')
    return kind(value)
