"""Checksums of a step's files: written before the step gets its name, compared before anything is read from it.

`checksums.json` in a step's folder holds the size and the SHA-256 of every file of its items. It is written after all other files
and before Orbax renames the folder to the step's name, so that every visible step has one. All processes hash; see `hashing`.
Three kinds of steps have none: those saved by older versions of `upcycle train`; those of `upcycle import` and `convert`, which
store a checksum with each chunk instead; and those in a bucket, where the object store checks its own.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from upcycle import files, hosts
from upcycle.checkpoints import hashing, json_files, orbax_item
from upcycle.errors import Unavailable, UserError

RECORD = 'checksums.json'

_NO_STEP, _REFUSED, _UNANSWERED, _FAILED = -1, -2, -3, -4


def write_record(folder: epath.Path) -> None:
    """Reads every file of a step back and writes its checksums; no file of its items may change any more.

    Raises:
        OSError: a file cannot be read.
    """
    found = hashing.describe(folder, {name: (folder / name).stat().length for name in _files(folder)})
    for name, file in found.items():
        if 'wrong' in file:
            raise OSError(f'{folder / name} {file["wrong"]}')
    (folder / RECORD).write_text(json.dumps({'files': found}, indent=1))


def has_record(folder: epath.Path) -> bool:
    """Whether a step's files can be compared with what was saved."""
    return (folder / RECORD).exists()


def damage(folder: epath.Path) -> str | None:
    """What is wrong with which file of a step that has a record; None where every file is as it was saved."""
    try:
        saved = json.loads((folder / RECORD).read_text())['files']
        expected = {name: (file['bytes'], file['sha256']) for name, file in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'{RECORD} cannot be read ({error})'
    for name in expected:
        if not all(map(json_files.is_plain_name, name.split('/'))):
            return f'{RECORD} names {name!r}, which is no file of the step'

    found = hashing.describe(
        folder, {name: size if isinstance(size, int) else 0 for name, (size, _) in sorted(expected.items())}
    )
    for name, file in found.items():
        size, digest = expected[name]
        if 'wrong' in file:
            return f'{name} {file["wrong"]}'
        if file['bytes'] != size:
            return f'{name} has {file["bytes"]} bytes and was saved with {size}'
        if file['sha256'] != digest:
            return f'bytes of {name} are not those that were saved'
    return None


def require_whole(path: str) -> None:
    """Looks at a checkpoint that all processes are about to read; process 0 looks for all.

    Raises:
        UserError: it has a record and its files differ from it, or the processes have found different steps.
    """
    folder = epath.Path(path)
    names = [folder.name] if jax.process_count() == 1 else hosts.texts(folder.name)
    if len(set(names)) > 1:
        raise UserError(
            f'the processes have found different steps in {folder.parent} ({", ".join(dict.fromkeys(names))}), as one was saved '
            'while they started: name the folder of one step.'
        )

    def look() -> int:
        if has_record(folder) and (wrong := damage(folder)):
            raise UserError(f'{folder} is damaged ({wrong}): copy it again, or name an earlier step.')
        return 0

    by_process_0(look, f'{folder} is damaged: process 0 says how.')


def newest_whole_step(model_dir: str) -> int | None:
    """The step that a run resumes from. Newer steps that are damaged are renamed to `STEP.damaged`, and a line says so.

    Process 0 looks and renames, and all processes return the same; to be called before the folder is opened for writing.

    Args:
        model_dir: the run's folder.

    Returns:
        The newest step whose files are those that were saved; None where nothing was ever saved.

    Raises:
        UserError: there are steps, and none is whole; nothing is renamed then.
    """
    folder = files.absolute(model_dir) / 'checkpoints'
    step = by_process_0(lambda: _set_aside_damaged(folder), f'no step in {folder} is whole: process 0 says why.')
    return None if step == _NO_STEP else step


def _set_aside_damaged(folder: epath.Path) -> int:
    steps = finished_steps(folder)
    recorded = [step for step in steps if has_record(folder / str(step))]
    damaged: dict[int, str] = {}
    whole = _NO_STEP
    for step in sorted(steps, reverse=True):
        wrong = _damage_among(folder, step, recorded)
        if wrong is None:
            whole = step
            break
        damaged[step] = wrong
    if damaged and whole == _NO_STEP:
        each = '; '.join(f'step {step}: {wrong}' for step, wrong in damaged.items())
        raise UserError(
            f'no step in {folder} is whole ({each}): bring the files back, or delete the folder to start the run again.'
        )
    for step, wrong in damaged.items():
        aside = _rename_aside(folder / str(step))
        print(
            f'{folder / str(step)} is damaged ({wrong}): it is now {aside.name}, and step {whole} is the newest whole one.',
            file=sys.stderr,
            flush=True,
        )
    return whole


def _damage_among(folder: epath.Path, step: int, recorded: list[int]) -> str | None:
    if step in recorded:
        return damage(folder / str(step))
    if files.is_remote(folder):
        return None
    # Once a run records its steps, it does so with every one.
    if any(older < step for older in recorded):
        return f'{RECORD} is missing'
    print(
        f'{folder / str(step)} has no {RECORD}, as it was saved by an older version: only what its format checks is checked.',
        file=sys.stderr,
        flush=True,
    )
    return None


def finished_steps(folder: epath.Path) -> list[int]:
    """The finished steps in the folder `checkpoints` of a run, whole or damaged, by names as a run writes them."""
    if not folder.is_dir():
        return []
    return [
        int(child.name)
        for child in folder.iterdir()
        if re.fullmatch('0|[1-9][0-9]*', child.name) and orbax_item.is_finished(child)
    ]


def _rename_aside(step: epath.Path) -> epath.Path:
    name, count = f'{step.name}.damaged', 1
    while (step.parent / name).exists():
        count += 1
        name = f'{step.name}.damaged-{count}'
    return step.rename(step.parent / name)


def _files(folder: epath.Path, below: str = '') -> Iterator[str]:
    """Files of the items. Files next to the items are Orbax's note of the save, which it finishes last."""
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        name = f'{below}{child.name}'
        if child.is_dir():
            yield from _files(child, name + '/')
        elif below:
            yield name


def by_process_0(look: Callable[[], int], refusal: str) -> int:
    """What process 0 finds, on all processes.

    Args:
        look: called by process 0; what it returns is not negative, or `_NO_STEP`.
        refusal: what the others say where process 0 raises a UserError.

    Raises:
        UserError, Unavailable: process 0 raised one, or a bucket did not answer it.
        RuntimeError: on the others, where process 0 raised anything else.
    """
    if jax.process_count() == 1:
        return look()
    hashing.serve()
    found, error = 0, None
    if jax.process_index() == 0:
        try:
            found = look()
        except Exception as raised:  # else the others would wait for ever
            error, found = raised, _FAILED
            kinds = [raised, files.refused_by_bucket(raised, [refusal])]
            for kind, code in ((UserError, _REFUSED), (Unavailable, _UNANSWERED)):
                if any(isinstance(each, kind) for each in kinds):
                    found = code
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if error is not None:
        raise error
    if found == _REFUSED:
        raise UserError(refusal)
    if found == _UNANSWERED:
        raise Unavailable('a store did not answer process 0, which says more: repeat the command.')
    if found == _FAILED:
        raise RuntimeError('process 0 failed, and says how')
    return found
