"""Checksums of a step's files: written before the step gets its final name, compared before anything is read.

`checksums.json` in a step's folder holds the size and the SHA-256 of every file of its items. It is written after all other files
and before Orbax renames the folder, so that every visible step has one. All processes hash; see `hashing`. Three kinds of steps
have none: steps saved by older versions of `upcycle train`; steps of `upcycle import` and `convert`, which store a checksum with
each chunk; and steps in a bucket, because the object store has its own checksums.
"""

from __future__ import annotations

import itertools
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
    """Reads every file of a step back and writes its checksums. The files must not change afterwards.

    Raises:
      OSError: a file cannot be read.
    """
    hashes = hashing.describe(folder, {name: (folder / name).stat().length for name in _files(folder)})
    for name, file in hashes.items():
        if 'wrong' in file:
            raise OSError(f'{folder / name} {file["wrong"]}')
    (folder / RECORD).write_text(json.dumps({'files': hashes}, indent=1))


def has_record(folder: epath.Path) -> bool:
    """Whether a step has checksums."""
    return (folder / RECORD).exists()


def damage(folder: epath.Path) -> str | None:
    """Describes the first damaged file of a step with checksums; None if all files are as they were saved."""
    try:
        saved = json.loads((folder / RECORD).read_text())['files']
        expected = {name: (file['bytes'], file['sha256']) for name, file in saved.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f'{RECORD} cannot be read ({error})'
    for name in expected:
        if not all(map(json_files.is_plain_name, name.split('/'))):
            return f'{RECORD} names {name!r}, which is not a file of the step'
    sizes = {name: size if isinstance(size, int) else 0 for name, (size, _) in sorted(expected.items())}
    for name, file in hashing.describe(folder, sizes).items():
        size, digest = expected[name]
        if 'wrong' in file:
            return f'{name} {file["wrong"]}'
        if file['bytes'] != size:
            return f'{name} has {file["bytes"]} bytes but was saved with {size}'
        if file['sha256'] != digest:
            return f'bytes of {name} have changed since the save'
    return None


def require_whole(path: str) -> None:
    """Checks the checksums of a checkpoint that all processes are about to read. Process 0 checks for all.

    Raises:
      UserError: a file is damaged, or the processes have opened different steps.
    """
    folder = epath.Path(path)
    names = [folder.name] if jax.process_count() == 1 else hosts.texts(folder.name)
    if len(set(names)) > 1:
        raise UserError(
            f'the processes have opened different steps in {folder.parent} ({", ".join(dict.fromkeys(names))}), because one was '
            'saved while they started: name the folder of one step.'
        )

    def check() -> int:
        if has_record(folder) and (wrong := damage(folder)):
            raise UserError(f'{folder} is damaged ({wrong}): copy it again, or name an earlier step.')
        return 0

    by_process_0(check, f'{folder} is damaged: see the message of process 0.')


def newest_whole_step(model_dir: str) -> int | None:
    """Finds the step that a run resumes from. Renames newer, damaged steps to `STEP.damaged` and prints a line for each.

    Process 0 checks and renames; all processes return the same. Call this before the folder is opened for writing.

    Args:
      model_dir: the run's folder.

    Returns:
      The newest undamaged step; None if there are no steps.

    Raises:
      UserError: all steps are damaged; none is renamed.
    """
    folder = files.absolute(model_dir) / 'checkpoints'
    refusal = f'no step in {folder} is whole: see the message of process 0.'
    step = by_process_0(lambda: _set_aside_damaged(folder), refusal)
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
        listing = '; '.join(f'step {step}: {wrong}' for step, wrong in damaged.items())
        raise UserError(
            f'no step in {folder} is whole ({listing}): restore the files, or delete the folder to start the run again.'
        )
    for step, wrong in damaged.items():
        aside = _rename_aside(folder / str(step))
        _say(
            f'{folder / str(step)} is damaged ({wrong}): renamed to {aside.name}; step {whole} is the newest undamaged one.'
        )
    return whole


def _damage_among(folder: epath.Path, step: int, recorded: list[int]) -> str | None:
    if step in recorded:
        return damage(folder / str(step))
    if files.is_remote(folder):
        return None
    # All steps of a run after the first one with checksums have them.
    if any(older < step for older in recorded):
        return f'{RECORD} is missing'
    _say(f'{folder / str(step)} has no {RECORD}, because an older version saved it: its files are not compared.')
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def finished_steps(folder: epath.Path) -> list[int]:
    """Returns the finished steps in the folder `checkpoints` of a run, damaged ones included."""
    if not folder.is_dir():
        return []
    return [
        int(child.name)
        for child in folder.iterdir()
        if re.fullmatch('0|[1-9][0-9]*', child.name) and orbax_item.is_finished(child)
    ]


def _rename_aside(step: epath.Path) -> epath.Path:
    suffixes = itertools.chain(['damaged'], (f'damaged-{count}' for count in itertools.count(2)))
    paths = (step.parent / f'{step.name}.{suffix}' for suffix in suffixes)
    return step.rename(next(path for path in paths if not path.exists()))


def _files(folder: epath.Path, below: str = '') -> Iterator[str]:
    """Yields the files of the items. Files next to the items belong to Orbax, which finishes them last."""
    for child in sorted(folder.iterdir(), key=lambda child: child.name):
        name = f'{below}{child.name}'
        if child.is_dir():
            yield from _files(child, name + '/')
        elif below:
            yield name


def by_process_0(compute: Callable[[], int], refusal: str) -> int:
    """Calls a function on process 0 and returns its result on all processes.

    Args:
      compute: returns a number from 0, or `_NO_STEP`.
      refusal: the message on the other processes if process 0 raises a UserError.

    Raises:
      UserError, Unavailable: process 0 raised one, or a bucket did not answer it.
      RuntimeError: on the other processes, if process 0 raised anything else.
    """
    if jax.process_count() == 1:
        return compute()
    hashing.serve()
    result, error = 0, None
    if jax.process_index() == 0:
        try:
            result = compute()
        except Exception as raised:  # the other processes must not wait forever
            error, result = raised, _FAILED
            kinds = [raised, files.refused_by_bucket(raised, [refusal])]
            for kind, code in ((UserError, _REFUSED), (Unavailable, _UNANSWERED)):
                if any(isinstance(each, kind) for each in kinds):
                    result = code
    result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
    if error is not None:
        raise error
    if result == _REFUSED:
        raise UserError(refusal)
    if result == _UNANSWERED:
        raise Unavailable('a store did not answer process 0 (see its message): repeat the command.')
    if result == _FAILED:
        raise RuntimeError('process 0 failed: see its message')
    return result
