"""Errors that end a command early: a user's mistake, or a request to stop."""

import contextlib
import enum
import errno
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from upcycle import leaf_names


class UserError(Exception):
    """A mistake that the user can correct.

    The message is one sentence that names the binding, path or leaf and the fix. The command line prints it without a traceback
    and exits with 2.
    """


# Lines about leaves in one message, so that the whole message stays within 24 lines.
_ON_A_SCREEN = 16


class DifferentLeaves(UserError):  # noqa: N818  named after the mistake
    """Leaves of a checkpoint that do not fit the model. The message is cut to one screen.

    Attributes:
      heading: the sentence above the list.
      problems: one sentence per leaf, all of them.
    """

    def __init__(self, heading: str, problems: Iterable[str], before: Iterable[str] = ()):
        self.heading, self.problems = heading, tuple(problems)
        before = list(before)
        most = _ON_A_SCREEN - len(before)
        count = len(self.problems)
        lines = [f'{heading} ({count} {"leaf" if count == 1 else "leaves"}):', *before, *_summary(self.problems, most)]
        super().__init__('\n  '.join(lines))


def whole_list(error: BaseException) -> str:
    """Writes all problems of a shortened `DifferentLeaves` to a file; returns a line that names it, else ''."""
    if not isinstance(error, DifferentLeaves) or all(problem in str(error) for problem in error.problems):
        return ''
    try:
        with tempfile.NamedTemporaryFile(
            'w', prefix='upcycle_leaves_', suffix='.txt', delete=False, encoding='utf-8'
        ) as file:
            file.write('\n'.join([f'{error.heading} ({len(error.problems)} leaves):', *error.problems, '']))
    except OSError:  # the disk is full; the message holds the essentials
        return ''
    return f'\n  all of them: {file.name}'


def _summary(problems: Sequence[str], most: int) -> list[str]:
    """Groups problems by pattern; counts those of the optimizer state, which repeat their parameters' problems."""
    states = [problem for problem in problems if problem.startswith(('opt_state/', 'only in the model: opt_state/'))]
    others = [problem for problem in problems if problem not in set(states)]
    if not others:
        return leaf_names.grouped(states, most)
    count = [f'and {len(states)} leaves of the optimizer state'] if states else []
    return leaf_names.grouped(others, most) + count


class MissingData(UserError):  # noqa: N818  named after the mistake
    """The data, or the package that registers it, is not on this machine; the configuration may be valid."""


class UserErrors(UserError):  # noqa: N818  a plural
    """Several mistakes.

    Attributes:
      mistakes: one sentence each.
    """

    def __init__(self, mistakes: Sequence[str]):
        self.mistakes = tuple(mistakes)
        super().__init__('\n  '.join([f'{len(self.mistakes)} mistakes:', *self.mistakes]))


def refuse(mistakes: Iterable[str]) -> None:
    """Raises all collected mistakes at once, repeated ones once; returns if there are none.

    Raises:
      UserError: one mistake.
      UserErrors: several mistakes.
    """
    mistakes = tuple(dict.fromkeys(mistakes))
    if len(mistakes) > 1:
        raise UserErrors(mistakes)
    if mistakes:
        raise UserError(mistakes[0])


def mistakes_of(error: UserError) -> tuple[str, ...]:
    """The sentences of an error."""
    return error.mistakes if isinstance(error, UserErrors) else (str(error),)


def one_line(error: BaseException) -> str:
    """The message of an error on one line, or its type if it has none."""
    return ' '.join(str(error).split()) or type(error).__name__


def without_password(text: str) -> str:
    """Masks the user names and passwords of all addresses in a text."""
    return re.sub(r'(?<=://)[^/@\s]+@', '***@', text)


class Preempted(Exception):  # noqa: N818  not a mistake
    """The run was asked to stop and has saved its state. The command line exits with `PREEMPTED`."""


class Unavailable(UserError):  # noqa: N818  separate from mistakes for its exit status
    """A store or another process did not answer. The command may be correct, so launchers retry it."""


# EX_TEMPFAIL of sysexits.h: the same command resumes the run. See docs/launching.md.
PREEMPTED = 75
# EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
INTERRUPTED = 130  # 128 + SIGINT, as in shells
# Exit statuses by exception; all other exceptions, which are bugs, give 1.
STATUSES = {Unavailable: UNAVAILABLE, UserError: 2, Preempted: PREEMPTED, KeyboardInterrupt: INTERRUPTED}


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends with this exception; see `STATUSES`."""
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 1)


# Codes with which the system refuses any write to a path: no room, no permission, wrong kind of file, failing disk.
_REFUSALS = ('ENOSPC', 'EDQUOT', 'EFBIG', 'EROFS', 'EACCES', 'EPERM', 'ENOTDIR', 'EISDIR', 'EEXIST', 'EIO', 'ESTALE')

Member = TypeVar('Member', bound=enum.StrEnum)


def one_of(kind: type[Member], value: str, binding: str) -> Member:
    """Returns the member of an enum that a binding names.

    Raises:
      UserError: the enum has no such member.
    """
    if value not in set(kind):
        raise UserError(f'{binding} = {value!r} is not one of {", ".join(kind)}.')
    return kind(value)


@contextlib.contextmanager
def writing_to(folder: str | os.PathLike[str], way_out: str = 'name another MODEL_DIR') -> Iterator[None]:
    """Turns the system's refusal to write to a folder into a `UserError`.

    Args:
      folder: errors about paths outside of it pass unchanged.
      way_out: the last advice of the message.

    Raises:
      UserError: the disk is full, or the folder or a file in it cannot be created or written.
    """
    try:
        yield
    except OSError as error:
        folder = os.path.abspath(folder)
        file = folder if error.filename is None else os.path.abspath(error.filename)
        # A missing file in an existing folder is a bug of ours.
        refused = errno.errorcode.get(error.errno) in _REFUSALS
        known = refused or (error.filename is not None and not os.path.isdir(folder))
        if not known or os.path.commonpath([folder, file]) != folder:
            raise
        raise UserError(
            f'{file} cannot be written ({error.strerror}): make room or change its permissions and repeat the command, or '
            f'{way_out}.'
        ) from error
