"""The folder of a run: what earlier starts of the run have left there."""

import contextlib
import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import files
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.integrity import finished_steps
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training.run import Run

# Distinguishes a run that was killed before its first checkpoint, which starts again, from one that has lost its checkpoints.
RECORD = 'saved.json'
# The files of a run, except checkpoints and events.
FILES = ('config.gin', 'lock.json', 'metrics.jsonl', 'receipt.json', RECORD)


def newest_step(model_dir: str) -> int | None:
    """Returns the newest finished step in the folder, whole or damaged, or None."""
    return max(finished_steps(files.absolute(model_dir) / 'checkpoints'), default=None)


def require_files(model_dir: str) -> None:
    """Raises UserError if something other than a file has the name of a file of the run, in a local folder."""
    folder = files.absolute(model_dir)
    for name in () if files.is_remote(folder) else FILES:
        require_file(folder / name)


def require_file(path: str | os.PathLike[str]) -> None:
    """Raises UserError if something other than a file is at the path of a file of a run."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode) and not os.path.isfile(path):
            raise UserError(
                f'{os.fspath(path)} is not a file, but a run writes a file there: delete it, or name another MODEL_DIR.'
            )


def require_same_data(run: Run, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint of the run was trained on other data, by its fingerprint."""
    if stored != now:
        stored = stored if isinstance(stored, Mapping) else {}
        changed = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
        raise UserError(
            f'MODEL_DIR = {run.model_dir!r} was trained on other data ({", ".join(changed)} differ): restore the data, or '
            'name another MODEL_DIR.'
        )


def record(model_dir: str, saved: bool) -> None:
    """Records whether a checkpoint of the run was ever finished; called by process 0."""
    files.replace_text(files.absolute(model_dir) / RECORD, json.dumps({'saved': saved}) + '\n')


def require_checkpoint(run: Run) -> None:
    """Raises UserError if the run would start again although its folder holds the log of a run that has lost its checkpoints."""
    folder = files.absolute(run.model_dir)
    if newest_step(run.model_dir) is not None:
        return
    lines = read_metrics(folder / 'metrics.jsonl')
    trained = [line for line in lines if line['split'] == 'train' or line['step'] > lines[0]['step']]
    if not trained or not _was_saved(folder):
        return
    last = max(line['step'] for line in trained)
    raise UserError(
        f'MODEL_DIR = {run.model_dir!r} has a metrics.jsonl up to step {last:g}, and its checkpoints are gone: restore them, '
        'name another MODEL_DIR, or remove that metrics.jsonl to start the run again.'
    )


def require_no_other_format(run: Run) -> None:
    """Raises UserError if the folder holds a checkpoint of another format, which readers would mistake for the run's."""
    try:
        reader = open_checkpoint(run.model_dir)
    except UserError:  # no folder, or no checkpoint in it
        return
    if reader.format != 'upcycle':
        raise UserError(
            f'MODEL_DIR = {run.model_dir!r} holds a checkpoint of the format {reader.format}, which would be read instead of '
            "the run's: name another MODEL_DIR."
        )


def _was_saved(folder: epath.Path) -> bool:
    """Returns whether a checkpoint of the run was ever finished; True if the record is damaged or of an older version."""
    try:
        return bool(json.loads((folder / RECORD).read_text())['saved'])
    except (OSError, ValueError, TypeError, KeyError):
        return True
