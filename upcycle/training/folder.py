"""What the folder of a run says of earlier legs: whether there was a checkpoint to resume from."""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from upcycle import aliases, files
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.integrity import finished_steps
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training.run import Run

# Tells a run that was killed before its first checkpoint, which begins again, from one that has lost its checkpoints.
RECORD = 'saved.json'
# What a run writes, but for checkpoints and events.
FILES = ('config.gin', 'lock.json', 'metrics.jsonl', 'receipt.json', RECORD)


def newest_step(model_dir: str) -> int | None:
    """The newest finished step in the folder, whole or damaged; None where there is none."""
    return max(finished_steps(files.absolute(model_dir) / 'checkpoints'), default=None)


def require_files(model_dir: str) -> None:
    """Raises UserError where something else stands where a run writes a file, in a local folder."""
    folder = files.absolute(model_dir)
    for name in () if files.is_remote(folder) else FILES:
        if (folder / name).exists() and not (folder / name).is_file():
            raise UserError(
                f'{folder / name} cannot be written: it is no file, and a run writes one there: delete it, or name another '
                'MODEL_DIR.'
            )


def require_same_data(run: Run, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint of the run was trained on other data, by its fingerprint."""
    if stored != now:
        stored = stored if isinstance(stored, Mapping) else {}
        changed = [name for name in sorted({*stored, *now}) if stored.get(name) != now.get(name)]
        raise UserError(
            f'MODEL_DIR = {run.model_dir!r} was trained on other data ({", ".join(changed)} differ): bring the data back, or '
            'name another MODEL_DIR.'
        )


def record(model_dir: str, saved: bool) -> None:
    """Notes whether a checkpoint of the run in the folder was ever finished; process 0 calls it."""
    files.replace_text(files.absolute(model_dir) / RECORD, json.dumps({'saved': saved}) + '\n')


def require_checkpoint(run: Run) -> None:
    """Raises UserError where the run would begin again although its folder has been trained in, and the checkpoints are gone."""
    folder = files.absolute(run.model_dir)
    if newest_step(run.model_dir) is not None:
        return
    lines = read_metrics(folder / 'metrics.jsonl')
    trained = [line for line in lines if line['split'] == 'train' or line['step'] > lines[0]['step']]
    if not trained or not _was_saved(folder, lines, run):
        return
    last = max(line['step'] for line in trained)
    raise UserError(
        f'MODEL_DIR = {run.model_dir!r} has a metrics.jsonl up to step {last:g}, and its checkpoints are gone: bring them back, '
        'name another MODEL_DIR, or remove that metrics.jsonl to start the run again.'
    )


def require_no_other_format(run: Run) -> None:
    """Raises UserError where the folder holds a checkpoint of another format, which readers would take for the run's."""
    try:
        reader = open_checkpoint(run.model_dir)
    except UserError:  # it is not there, or holds none
        return
    if reader.format != 'upcycle':
        raise UserError(
            f'MODEL_DIR = {run.model_dir!r} holds a checkpoint of the format {reader.format}, which would be read in place of '
            "the run's: name another MODEL_DIR."
        )


def _was_saved(folder: epath.Path, lines: list[dict[str, Any]], run: Run) -> bool:
    """By the record, or, of a run by an older version or a record that is damaged, by how far the log goes."""
    try:
        return bool(json.loads((folder / RECORD).read_text())['saved'])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    period, total = run.checkpoint_period, run.total_steps
    if (folder / 'config.gin').is_file():
        text = (folder / 'config.gin').read_bytes().decode(errors='replace')
        period = _bound(text, 'checkpoint_period') or period
        total = _bound(text, 'total_steps') or total
    first, last = (choose(line['step'] for line in lines) for choose in (min, max))
    # A line of training comes after the step, one of evaluation may stand for the state that the run began with.
    before = first - 1 if any(line['step'] == first and line['split'] == 'train' for line in lines) else first
    return last // period > before // period or last >= total


def _bound(text: str, field: str) -> int | None:
    current = '\n'.join(map(aliases.current, text.splitlines()))
    found = re.search(rf'^upcycle\.training\.run\.Run\.{field} = (\d+)$', current, re.MULTILINE)
    return int(found[1]) if found else None
