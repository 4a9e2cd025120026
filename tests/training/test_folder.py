"""Run folders without checkpoints: a run that lost its checkpoints is refused, one that never had any starts again."""

import os
import shutil

import pytest

from tests import runs
from upcycle import configuration
from upcycle.errors import UserError
from upcycle.metrics import SET_ASIDE, read_metrics
from upcycle.training import folder
from upcycle.training.preflight import preflight


@pytest.fixture
def run(dense, tmp_path):
    """A run of four steps, with checkpoints of steps 2 and 4."""
    return shutil.copytree(dense, tmp_path / 'run')


def remove(run):
    shutil.rmtree(run / 'checkpoints')


def empty(run):
    remove(run)
    (run / 'checkpoints').mkdir()


def set_aside(run):
    for step in ('2', '4'):
        (run / 'checkpoints' / step).rename(run / 'checkpoints' / f'{step}.damaged')


def half_written(run):
    for step in ('2', '4'):
        (run / 'checkpoints' / step).rename(run / 'checkpoints' / f'{step}.orbax-checkpoint-tmp')


def older(run):
    """A run of a version without a record."""
    empty(run)
    (run / folder.RECORD).unlink()


def damaged_record(run):
    empty(run)
    (run / folder.RECORD).write_text('{"sav')


def events_too(run):
    empty(run)
    for split in ('train', 'validation'):
        shutil.rmtree(run / split)
        (run / split).mkdir()


def stopped_early(run):
    """SIGTERM before the first checkpoint period ended, which the log does not reach."""
    empty(run)
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    (run / 'metrics.jsonl').write_text('\n'.join(lines[:2]))


def damaged_log(run):
    empty(run)
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    (run / 'metrics.jsonl').write_text('\n'.join(['{', *lines, '"']))


GONE = (remove, empty, set_aside, half_written, older, damaged_record, events_too, stopped_early, damaged_log)


def look(kind, model_dir, steps):
    """Checks a run like `upcycle plan`."""
    return preflight(runs.build(kind, model_dir, steps), configuration.resolved())


def contents(run):
    return {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}


@pytest.mark.parametrize('gone', GONE, ids=lambda gone: gone.__name__)
def test_lost_checkpoints_are_not_mistaken_for_a_new_run(gone, run):
    """Nothing is changed, and the message names both fixes."""
    gone(run)
    before = contents(run)
    with pytest.raises(
        UserError, match=r'up to step \d, and its checkpoints are gone: .* another MODEL_DIR, or remove'
    ):
        runs.train('dense', run, 6)
    assert contents(run) == before


@pytest.mark.parametrize('left', [remove, empty, half_written], ids=lambda left: left.__name__)
def test_a_run_killed_before_its_first_checkpoint_starts_again(left, run, dense, capsys):
    """The record decides: the log may exceed the first checkpoint period while that checkpoint is written."""
    left(run)
    folder.record(str(run), saved=False)
    before = (run / 'metrics.jsonl').read_bytes()
    runs.train('dense', run, 4)
    assert 'resumes from step' not in capsys.readouterr().err
    assert (run / SET_ASIDE).read_bytes() == before
    assert [line['loss'] for line in read_metrics(run / 'metrics.jsonl')] == [
        line['loss'] for line in read_metrics(f'{dense}/metrics.jsonl')
    ]
    empty(run)
    with pytest.raises(UserError, match='checkpoints are gone'):
        runs.train('dense', run, 4)


def test_without_its_log_it_starts_again(run):
    """The fix that the message names."""
    empty(run)
    os.unlink(run / 'metrics.jsonl')
    assert int(runs.train('dense', run, 4).step) == 4


def test_a_log_with_only_evaluations_at_the_start_allows_a_new_start(run):
    empty(run)
    first, *_ = (run / 'metrics.jsonl').read_text().splitlines()
    (run / 'metrics.jsonl').write_text(first + '\n')
    assert int(runs.train('dense', run, 4).step) == 4


@pytest.mark.parametrize('command', [runs.train, look])
@pytest.mark.parametrize('name', folder.FILES)
def test_a_folder_with_the_name_of_a_file_is_refused(name, command, run):
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    before = sorted(run.rglob('*'))
    with pytest.raises(UserError, match=f'{name}.* (cannot be read|is not a file)'):
        command('dense', run, 6)
    assert sorted(run.rglob('*')) == before


def test_invalid_names_of_steps_are_ignored(tmp_path):
    for name in ('4', '00000009', '\u0668', '\u00b2', '8.bak', '-8'):
        (tmp_path / 'checkpoints' / name).mkdir(parents=True)
    assert folder.newest_step(str(tmp_path)) == 4
