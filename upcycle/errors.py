"""The one exception that a user's mistake becomes."""

import enum
from typing import TypeVar


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the binding, path or leaf and the way out. The command line prints it without a
    traceback and exits with 2.
    """


Member = TypeVar('Member', bound=enum.StrEnum)


def one_of(kind: type[Member], value: str, binding: str) -> Member:
    """The member of an enum that a binding names.

    Raises:
      UserError: it names none.
    """
    if value not in set(kind):
        raise UserError(f'{binding} = {value!r} is not one of {", ".join(kind)}.')
    return kind(value)
