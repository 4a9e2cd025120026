"""What ends a command early: a user's mistake, or a request to stop."""

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
    """A mistake the user can correct.

    The message is one sentence that names the binding, path or leaf and the way out. The command line prints it without a
    traceback and exits with 2.
    """


# Lines about leaves, so that the whole message is no more than 24.
_ON_A_SCREEN = 16


class DifferentLeaves(UserError):  # noqa: N818  it is a kind of mistake
    """Leaves of a checkpoint that do not fit; the message holds what fits a screen.

    Attributes:
      heading: the sentence that comes before them.
      problems: a sentence about each leaf.
    """

    def __init__(self, heading: str, problems: Iterable[str], before: Iterable[str] = ()):
        self.heading, self.problems = heading, tuple(problems)
        before = list(before)
        most = _ON_A_SCREEN - len(before)
        count = len(self.problems)
        lines = [f'{heading} ({count} {"leaf" if count == 1 else "leaves"}):', *before, *_summary(self.problems, most)]
        super().__init__('\n  '.join(lines))


def whole_list(error: BaseException) -> str:
    """What a message about leaves leaves out, in a file that is not deleted: a line that names it, or nothing."""
    if not isinstance(error, DifferentLeaves) or all(problem in str(error) for problem in error.problems):
        return ''
    try:
        with tempfile.NamedTemporaryFile(
            'w', prefix='upcycle_leaves_', suffix='.txt', delete=False, encoding='utf-8'
        ) as file:
            file.write('\n'.join([f'{error.heading} ({len(error.problems)} leaves):', *error.problems, '']))
    except OSError:  # no room, and the message says the most
        return ''
    return f'\n  all of them: {file.name}'


def _summary(problems: Sequence[str], most: int) -> list[str]:
    """By pattern; an optimizer's state follows its parameters."""
    states = [problem for problem in problems if problem.startswith(('opt_state/', 'only in the model: opt_state/'))]
    others = [problem for problem in problems if problem not in set(states)]
    if not others:
        return leaf_names.grouped(states, most)
    return [
        *leaf_names.grouped(others, most),
        *([f'and {len(states)} leaves of the optimizer state'] if states else []),
    ]


class MissingData(UserError):  # noqa: N818  it is a kind of mistake
    """The data is not on this machine, or not the package that knows it; everything else may be right."""


class UserErrors(UserError):  # noqa: N818  it is several
    """Several mistakes at once, each of them one sentence.

    Attributes:
      mistakes: the sentences, none of them twice.
    """

    def __init__(self, mistakes: Iterable[str]):
        self.mistakes = tuple(dict.fromkeys(mistakes))
        super().__init__('\n  '.join([f'{len(self.mistakes)} mistakes:', *self.mistakes]))


def refuse(mistakes: Iterable[str]) -> None:
    """Raises what is wrong, all of it, where anything is.

    Raises:
      UserError: of one mistake.
      UserErrors: of several.
    """
    found = tuple(dict.fromkeys(mistakes))
    if len(found) > 1:
        raise UserErrors(found)
    if found:
        raise UserError(found[0])


def mistakes_of(error: UserError) -> tuple[str, ...]:
    """Its sentences."""
    return error.mistakes if isinstance(error, UserErrors) else (str(error),)


def without_password(text: str) -> str:
    """A text with the user names and passwords taken out of its addresses, so that it can be shown."""
    return re.sub(r'(?<=://)[^/@\s]+@', '***@', text)


class Preempted(Exception):  # noqa: N818  it is no error
    """The run was asked to stop, and has saved its state. The command line exits with `PREEMPTED`."""


class Unavailable(UserError):  # noqa: N818  it is kept apart from mistakes by its status
    """A store or another process did not answer. Nothing may be wrong with the command, so that launchers try it again."""


# EX_TEMPFAIL of sysexits.h: nothing is wrong, and the same command goes on. See docs/launching.md.
PREEMPTED = 75
# EX_UNAVAILABLE of sysexits.h.
UNAVAILABLE = 69
INTERRUPTED = 130  # as shells count: 128 and the number of SIGINT
# The exit status of what ends a command early; 1 for anything else, which nobody has foreseen.
STATUSES = {Unavailable: UNAVAILABLE, UserError: 2, Preempted: PREEMPTED, KeyboardInterrupt: INTERRUPTED}


def status_of(error: BaseException) -> int:
    """The exit status of a command that ends so; see `STATUSES`."""
    return next((STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES), 1)


# By which the system refuses to write, whatever is written.
_REFUSALS = {
    getattr(errno, name)
    for name in (
        'ENOSPC',
        'EDQUOT',
        'EFBIG',
        'EROFS',
        'EACCES',
        'EPERM',
        'ENOTDIR',
        'EISDIR',
        'EEXIST',
        'EIO',
        'ESTALE',
    )
}

Member = TypeVar('Member', bound=enum.StrEnum)


def one_of(kind: type[Member], value: str, binding: str) -> Member:
    """The member of an enum that a binding names.

    Raises:
      UserError: it names none.
    """
    if value not in set(kind):
        raise UserError(f'{binding} = {value!r} is not one of {", ".join(kind)}.')
    return kind(value)


@contextlib.contextmanager
def writing_to(folder: str | os.PathLike[str], way_out: str = 'name another MODEL_DIR') -> Iterator[None]:
    """Around whatever writes to a folder.

    Args:
      folder: what the system refuses elsewhere is not its fault.
      way_out: what the message advises where neither room nor permissions help.

    Raises:
      UserError: the disk is full, or the folder or a file in it cannot be made or written.
    """
    try:
        yield
    except OSError as error:
        folder = os.path.abspath(folder)
        file = folder if error.filename is None else os.path.abspath(error.filename)
        # A file that is missing in a folder that is there is a mistake of ours.
        known = error.errno in _REFUSALS or (error.filename is not None and not os.path.isdir(folder))
        if not known or os.path.commonpath([folder, file]) != folder:
            raise
        raise UserError(
            f'{file} cannot be written ({error.strerror}): make room or change its permissions, and give the same command '
            f'again, or {way_out}.'
        ) from error
