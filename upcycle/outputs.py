"""Checks the paths that a command writes to, before any work. Used for every option and binding that names such a path."""

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

SPARE_BYTES = 64 << 20  # kept free on a disk with a checkpoint
_LITTLE = 1 << 20  # room for a report
# Suffixes of temporary names, for which names must have room. Writers of checkpoints use all but the last.
STAGING = ('.orbax-checkpoint-tmp', '.tmp-upcycle', '.new')
_DEEPEST = 512  # bytes of path that a run or a checkpoint adds below its folder
# Files and folders of a run.
_OF_A_RUN = (
    *('config.gin', 'metrics.jsonl', 'metrics.set_aside.jsonl', 'receipt.json', 'saved.json', 'lock.json'),
    *('checkpoints', 'train', 'validation', 'huggingface'),
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
    """The kind of output at a path."""

    FILE = enum.auto()  # may replace a file, except one of a run
    FOLDER = enum.auto()  # may exist and contain files
    NEW_FILE = enum.auto()  # must not exist
    NEW_FOLDER = enum.auto()  # must not exist, or must be empty


def check(name: str, path: str | os.PathLike[str], kind: Kind, *, needed: int = 0, local: bool = False) -> epath.Path:
    """Checks that a path can be written: kind, links, permissions, lengths of names, disk space and existing files.

    Nothing is left behind. In a bucket, a byte is written and removed, except for `Kind.FOLDER`, whose first file follows soon.

    Args:
      name: the option or binding, for the message, such as '--out'.
      path: local, or an address of a bucket.
      kind: of the output.
      needed: bytes of the checkpoint to write; 0 for small files.
      local: whether to refuse addresses.

    Returns:
      The absolute path with links resolved.

    Raises:
      UserError: the path cannot be written. The message names the part of the path that prevents it.
    """
    text = os.fspath(path)
    shown = f'{name} = {text}' if name.isupper() else f'{name}={text}'
    if not text or '\0' in text:
        raise UserError(f'{name} {"contains a zero byte" if text else "is empty"}: name a path.')
    full = files.absolute(text)
    if local and files.is_remote(full):
        raise UserError(f'{shown} is an address of a bucket: name a local folder.')
    if not files.is_remote(full):
        _check_local(shown, os.fspath(full), kind, needed)
        full = epath.Path(os.path.realpath(full))
    elif kind in (Kind.FILE, Kind.NEW_FILE) and '/' not in os.fspath(full).partition('://')[2]:
        raise UserError(f'{shown} names a bucket, not a file in it: write {full}/NAME.')
    _refuse_among_steps(shown, full)
    if kind in (Kind.NEW_FILE, Kind.NEW_FOLDER):
        refuse_existing(full, kind)
    if kind is Kind.FILE and full.exists():
        _refuse_file_of_run(shown, full)
    if files.is_remote(full) and kind is not Kind.FOLDER:
        _check_bucket(shown, full, kind)
    return full


def write(name: str, path: str | os.PathLike[str], text: str) -> None:
    """Writes a file atomically, and makes its parent folders.

    Args:
      name: the option, as in `check`.
      path: a path that `check` has accepted.
      text: of the file, in UTF-8.

    Raises:
      UserError: the path is not writable any more.
    """
    full = check(name, path, Kind.FILE)
    with writing_to(full.parent, f'name another {name}'):
        full.parent.mkdir(parents=True, exist_ok=True)
        files.replace_text(full, text)


def refuse_existing(path: epath.Path, kind: Kind = Kind.NEW_FOLDER) -> None:
    """Raises UserError if the path of a new checkpoint exists, unless it is empty or an unfinished checkpoint."""
    if not path.exists() or (kind is Kind.NEW_FOLDER and path.is_dir() and _is_unused(path)):
        return
    raise UserError(f'{path} exists already: delete it, or name another --to.')


def _refuse_file_of_run(shown: str, path: epath.Path) -> None:
    run = next((folder for folder in path.parents if (folder / 'config.gin').exists()), None)
    if run is not None and path.relative_to(run).parts[0] in _OF_A_RUN:
        raise UserError(f'{shown} is a file of the run in {run}, which would be lost: name another path.')


def _refuse_among_steps(shown: str, path: epath.Path) -> None:
    """Raises UserError for a path among the steps of a run, which are removed with all files in them."""
    for folder in (path, *path.parents):
        if folder.name == 'checkpoints' and folder.is_dir():
            steps = (child for child in folder.iterdir() if child.name.isdecimal())
            if step := next((step for step in steps if (step / 'state' / '_METADATA').exists()), None):
                raise UserError(
                    f'{shown} is in {folder}, which holds checkpoints such as {step.name}: name another path.'
                )


def refuse_runs(path: epath.Path) -> None:
    """Raises UserError if a path is, or is inside, the folder of a run."""
    for folder in (path, *path.parents):
        is_run = (folder / 'config.gin').exists() and (folder / 'checkpoints').exists()
        if is_run or (folder / 'metrics.jsonl').exists():
            raise UserError(
                f'--to={path} is in {folder}, the folder of a run, where only `upcycle train` may write: name another --to.'
            )


def check_space(folder: str | os.PathLike[str], needed: int, way_out: str = 'name another --to') -> None:
    """Checks that the disk of a local folder, which may not exist yet, has room for a checkpoint.

    Args:
      folder: local.
      needed: bytes.
      way_out: the alternative to making room, for the message.

    Raises:
      UserError: the disk is too full.
    """
    folder = nearest(os.fspath(folder))
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f'{folder} has {size(free)} free, but {size(needed + SPARE_BYTES)} are needed ({size(needed)} for the checkpoint and '
            f'{size(SPARE_BYTES)} to stay free): make room, or {way_out}.'
        )


def nearest(path: str) -> str:
    """Returns the path if it exists, or else its nearest existing parent. A dangling link exists."""
    while not os.path.lexists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return path


def size(count: int) -> str:
    """Formats bytes with three digits: '1.21 MB'."""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if count < 999.5:
            return f'{count} {unit}' if unit == 'bytes' else f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:.4g} TB'


def _check_local(shown: str, path: str, kind: Kind, needed: int) -> None:
    existing = nearest(path)
    is_folder = kind in (Kind.FOLDER, Kind.NEW_FOLDER)
    try:
        mode = os.stat(existing).st_mode
    except OSError as error:
        problem, way_out = f'{existing}: {error.strerror}', 'name another path'
        if error.errno == errno.ELOOP:
            problem = f'{existing} is in a loop of links'
        elif os.path.islink(existing):
            problem = f'{existing} is a link to {os.readlink(existing)}, which does not exist'
            way_out = 'make that folder, or name another path'
        raise UserError(f'{shown} cannot be written: {problem}: {way_out}.') from error
    actual = next((word for test, word in _KINDS.items() if test(mode)), 'not a file')
    if existing != path and not stat.S_ISDIR(mode):
        raise UserError(f'{shown} cannot be written: {existing} is {actual}, not a folder: name another path.')
    if existing == path and not (stat.S_ISDIR(mode) if is_folder else stat.S_ISREG(mode)):
        wanted = 'a folder' if is_folder else 'a file'
        raise UserError(f'{shown} cannot be written: it is {actual}, not {wanted}: name another path.')
    folder = existing if stat.S_ISDIR(mode) else os.path.dirname(existing)
    _check_names(shown, path, folder, _DEEPEST if is_folder else 0)
    _check_permission(shown, path if existing == path and not is_folder else None, folder)
    if needed:
        check_space(folder, needed, 'name another path')
    elif (free := shutil.disk_usage(folder).free) < _LITTLE:
        raise UserError(
            f'{shown} cannot be written: {folder} has {size(free)} free, but {size(_LITTLE)} are needed: make room, or name '
            'another path.'
        )


def _check_bucket(shown: str, path: epath.Path, kind: Kind) -> None:
    """Writes and removes a byte, which also shows whether the bucket exists."""
    # The name is random because several processes may check, and buckets limit the rate of writes to one object.
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
    suffix = max(map(len, STAGING))
    most_of_name, most_of_path = (
        os.pathconf(folder, 'PC_NAME_MAX') - suffix,
        os.pathconf(folder, 'PC_PATH_MAX') - suffix,
    )
    names = os.path.relpath(path, folder).split(os.sep)
    limits = [*(('name', name, most_of_name) for name in names), ('path', path, most_of_path - deeper)]
    for word, text, most in limits:
        if (length := len(os.fsencode(text))) > most:
            raise UserError(
                f'{shown[:80]}... cannot be written: a {word} of {length} bytes is too long (maximum {most}): name another path.'
            )


def _check_permission(shown: str, file: str | None, folder: str) -> None:
    """Tries to write, which shows missing permissions, read-only disks, immutable files and special file systems."""
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
            advice = 'the disk is read-only: mount it writable'
        else:
            advice = 'change the permissions'
        raise UserError(
            f'{shown} cannot be written: {file or folder}: {error.strerror}: {advice}, or name another path.'
        ) from error


def _is_unused(folder: epath.Path) -> bool:
    """Whether a folder is empty, or only contains an unfinished checkpoint."""
    return all(
        entry.name.endswith(STAGING[:2]) or (entry.name == 'checkpoints' and entry.is_dir() and _is_unused(entry))
        for entry in folder.iterdir()
    )
