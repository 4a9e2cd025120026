"""Where a command writes: looked at before any work is done, in one place for every option and binding that names such a path."""

import enum
import errno
import os
import secrets
import shutil
import stat
import tempfile

from etils import epath

from upcycle import files
from upcycle.errors import UserError, writing_to

SPARE_BYTES = 64 << 20  # kept free on the disk that takes a checkpoint
_LITTLE = 1 << 20  # room for a report or a few lines
# Endings of what is being written; the longest one must fit into a name too. Writers of checkpoints use all but the last.
STAGING = ('.orbax-checkpoint-tmp', '.tmp-upcycle', '.new')
_DEEPEST = 512  # bytes of path that a run or a checkpoint adds below its folder
# What a run goes on from, or tells of itself.
_OF_A_RUN = (
    *('config.gin', 'metrics.jsonl', 'metrics.set_aside.jsonl', 'receipt.json', 'saved.json', 'lock.json'),
    *('checkpoints', 'train', 'validation'),
)
_KINDS = {
    stat.S_ISDIR: 'a folder',
    stat.S_ISREG: 'a file',
    stat.S_ISCHR: 'a device',
    stat.S_ISBLK: 'a device',
    stat.S_ISFIFO: 'a pipe',
    stat.S_ISSOCK: 'a socket',
}


class Kind(enum.Enum):
    """What a path is to become."""

    FILE = enum.auto()  # replaces a file that is there, unless it is one of a run
    FOLDER = enum.auto()  # may be there, with files in it
    NEW_FILE = enum.auto()  # must not be there
    NEW_FOLDER = enum.auto()  # must not be there, or be empty


def check(name: str, path: str | os.PathLike[str], kind: Kind, *, needed: int = 0, local: bool = False) -> epath.Path:
    """Whether a path can be written: its kind, links, permissions, names, room and contents. Nothing is left behind.

    Args:
      name: the option or binding, for the message, such as '--out'.
      path: local, or an address of a bucket, where a byte is written and removed; but for `Kind.FOLDER`, whose first file is
        written soon.
      kind: what is to be there afterwards.
      needed: bytes of the checkpoint that will be written; 0: a few lines.
      local: refuse addresses.

    Returns:
      The path in full, its links resolved.

    Raises:
      UserError: it cannot be written. The message names the part of the path that is in the way.
    """
    text = os.fspath(path)
    shown = f'{name} = {text}' if name.isupper() else f'{name}={text}'
    if not text or '\0' in text:
        raise UserError(f'{name} is {"empty" if not text else "a name with a zero byte"}: name a path.')
    full = files.absolute(text)
    if local and files.is_remote(full):
        raise UserError(f'{shown} is an address, and this is written to a local folder only: name one.')
    if not files.is_remote(full):
        _check_local(shown, os.fspath(full), kind, needed)
        full = epath.Path(os.path.realpath(full))
    elif kind in (Kind.FILE, Kind.NEW_FILE) and '/' not in os.fspath(full).partition('://')[2]:
        raise UserError(f'{shown} names a bucket and no file in it: write {full}/NAME.')
    _refuse_among_steps(shown, full)
    if kind in (Kind.NEW_FILE, Kind.NEW_FOLDER):
        refuse_existing(full, kind)
    if kind is Kind.FILE and full.exists():
        _refuse_file_of_run(shown, full)
    if files.is_remote(full) and kind is not Kind.FOLDER:
        _check_bucket(shown, full, kind)
    return full


def write(name: str, path: str | os.PathLike[str], text: str) -> None:
    """Writes a file at once, and the folders above it.

    Args:
      name: the option, as in `check`.
      path: what `check` has found to be writable.
      text: of the file, in UTF-8.

    Raises:
      UserError: it is not writable any more.
    """
    full = check(name, path, Kind.FILE)
    with writing_to(full.parent, f'name another {name}'):
        full.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(full, text)


def refuse_existing(path: epath.Path, kind: Kind = Kind.NEW_FOLDER) -> None:
    """The rule for what lies where a checkpoint will be, for every format: nothing, an empty folder, or the beginning of one.

    Raises:
      UserError: something else is there.
    """
    if not path.exists() or (kind is Kind.NEW_FOLDER and path.is_dir() and _is_unused(path)):
        return
    raise UserError(f'{path} exists already: delete it, or name another --to.')


def _refuse_file_of_run(shown: str, path: epath.Path) -> None:
    run = next((folder for folder in path.parents if (folder / 'config.gin').exists()), None)
    if run is None:
        return
    first = path.relative_to(run).parts[0]
    if first in _OF_A_RUN:
        raise UserError(f'{shown} is a file of the run in {run}, which would be lost: name another path.')


def _refuse_among_steps(shown: str, path: epath.Path) -> None:
    """Keeps a folder of checkpoints to what is saved there: older steps are removed with all that lies in them."""
    for folder in (path, *path.parents):
        if folder.name == 'checkpoints' and folder.is_dir():
            steps = (child for child in folder.iterdir() if child.name.isdecimal())
            if step := next((step for step in steps if (step / 'state' / '_METADATA').exists()), None):
                raise UserError(
                    f'{shown} lies in {folder}, which holds checkpoints such as {step.name}: name another path.'
                )


def refuse_runs(path: epath.Path) -> None:
    """Keeps the folders of runs to the runs.

    Raises:
      UserError: a path is, or lies in, the folder of a run.
    """
    for folder in (path, *path.parents):
        if (folder / 'metrics.jsonl').exists() or (
            (folder / 'config.gin').exists() and (folder / 'checkpoints').exists()
        ):
            raise UserError(
                f'--to={path} lies in {folder}, which is the folder of a run, and only `upcycle train` writes there: name '
                'another --to.'
            )


def check_space(folder: str | os.PathLike[str], needed: int, way_out: str = 'name another --to') -> None:
    """Whether the disk that holds, or will hold, a local folder has room for a checkpoint.

    Args:
      folder: local.
      needed: bytes.
      way_out: what the message advises instead of making room.

    Raises:
      UserError: it has not.
    """
    folder = nearest(os.fspath(folder))
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f'{folder} has {size(free)} free, and {size(needed + SPARE_BYTES)} are needed ({size(needed)} for the checkpoint and '
            f'{size(SPARE_BYTES)} that stay free): make room, or {way_out}.'
        )


def nearest(path: str) -> str:
    """The path itself, or the nearest one above it that is there, were it a link that leads nowhere."""
    while True:
        try:
            os.lstat(path)
            return path
        except OSError:
            above = os.path.dirname(path)
            if above == path:
                return path
            path = above


def size(count: int) -> str:
    """Bytes as people read them, to three digits: '1.21 MB'."""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if count < 999.5:
            return f'{count} {unit}' if unit == 'bytes' else f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:.4g} TB'


def _check_local(shown: str, path: str, kind: Kind, needed: int) -> None:
    found = nearest(path)
    is_folder = kind in (Kind.FOLDER, Kind.NEW_FOLDER)
    try:
        mode = os.stat(found).st_mode
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(
                f'{shown} cannot be written: {found} is one of a loop of links: name another path.'
            ) from error
        if os.path.islink(found):
            raise UserError(
                f'{shown} cannot be written: {found} is a link to {os.readlink(found)}, which does not exist: make that folder, '
                'or name another path.'
            ) from error
        raise UserError(f'{shown} cannot be written: {found}: {error.strerror}: name another path.') from error
    actual = next((word for test, word in _KINDS.items() if test(mode)), 'no file')
    if found != path and not stat.S_ISDIR(mode):
        raise UserError(f'{shown} cannot be written: {found} is {actual} and not a folder: name another path.')
    if found == path and not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        wanted = 'a folder' if is_folder else 'a file'
        raise UserError(f'{shown} cannot be written: it is {actual}, and {wanted} is needed: name another path.')
    folder = found if stat.S_ISDIR(mode) else os.path.dirname(found)
    _check_names(shown, path, folder, _DEEPEST if is_folder else 0)
    _check_permission(shown, path if found == path and not is_folder else None, folder)
    if needed:
        check_space(folder, needed, 'name another path')
    elif (free := shutil.disk_usage(folder).free) < _LITTLE:
        raise UserError(
            f'{shown} cannot be written: {folder} has {size(free)} free, and {size(_LITTLE)} are needed: make room, or name '
            'another path.'
        )


def _check_bucket(shown: str, path: epath.Path, kind: Kind) -> None:
    """By trying it, too: whether the bucket exists, and lets us write and remove."""
    # Buckets let an object be written once a second, and several processes of a run may try.
    name = f'{secrets.token_hex(4)}{STAGING[1]}'
    probe = path / name if kind is Kind.NEW_FOLDER else path.with_name(f'{path.name}.{name}')
    try:
        probe.write_bytes(b'\n')
        probe.unlink()
    except Exception as error:
        if (refusal := files.refused_by_bucket(error, [os.fspath(path)])) is None:
            raise
        raise type(refusal)(f'{shown} cannot be written: {refusal}') from error


def _check_names(shown: str, path: str, folder: str, deeper: int) -> None:
    ending = max(len(ending) for ending in STAGING)
    longest, whole = os.pathconf(folder, 'PC_NAME_MAX'), os.pathconf(folder, 'PC_PATH_MAX')
    for part in os.path.relpath(path, folder).split(os.sep):
        if len(os.fsencode(part)) + ending > longest:
            raise UserError(
                f'{shown[:80]}... cannot be written: a name of {len(os.fsencode(part))} bytes is too long, and '
                f'{longest - ending} are the most: name another path.'
            )
    if len(os.fsencode(path)) + ending + deeper > whole:
        raise UserError(
            f'{shown[:80]}... cannot be written: a path of {len(os.fsencode(path))} bytes is too long, and '
            f'{whole - ending - deeper} are the most: name another path.'
        )


def _check_permission(shown: str, file: str | None, folder: str) -> None:
    """By trying it: permissions, read-only disks, immutable files and systems that take no files all refuse in their own way."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
        if file is not None:
            with open(file, 'ab'):
                pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = 'make room'
        elif os.statvfs(folder).f_flag & os.ST_RDONLY:
            advice = 'it lies on a disk that is read-only: mount it to be written'
        else:
            advice = 'change the permissions'
        raise UserError(
            f'{shown} cannot be written: {file or folder}: {error.strerror}: {advice}, or name another path.'
        ) from error


def _is_unused(folder: epath.Path) -> bool:
    """Whether a folder holds nothing, or only what a writer of checkpoints left unfinished."""
    return all(
        entry.name.endswith(STAGING[:2]) or (entry.name == 'checkpoints' and entry.is_dir() and _is_unused(entry))
        for entry in folder.iterdir()
    )
