"""Runs that are killed, damaged or cannot write: they resume from the newest whole step, or give the reason in a sentence."""

import importlib.util
import os
import pathlib
import resource
import shutil
import sys

import numpy as np
import pytest

from tests import runs
from upcycle.checkpoints import open_checkpoint
from upcycle.errors import UserError
from upcycle.log_lines import depends_on_speed
from upcycle.metrics import read_metrics

SOAK = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'soak.py'


@pytest.fixture
def run(dense, tmp_path):
    """A run of four steps, with checkpoints of steps 2 and 4."""
    return shutil.copytree(dense, tmp_path / 'run')


def lines_of(run):
    lines = read_metrics(str(pathlib.Path(run) / 'metrics.jsonl'))
    return [{name: value for name, value in line.items() if not depends_on_speed(name)} for line in lines]


def flip(step):
    """Flips a bit of the weights."""
    file = max((path for path in (step / 'state').rglob('*') if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_run_resumes_from_the_step_before_a_damaged_one(run, dense, capsys):
    """The result is that of an undamaged run: metrics are cut back, steps are repeated, the step is saved again."""
    flip(run / 'checkpoints' / '4')
    runs.train('dense', run, 4, CHECKPOINT_KEEP=2)
    said = capsys.readouterr().err
    assert '4 is damaged (bytes of state/' in said and 'resumes from step 2' in said
    assert lines_of(run) == lines_of(dense)
    assert sorted(os.listdir(run / 'checkpoints')) == ['2', '4', '4.damaged']
    ours, undisturbed = open_checkpoint(run), open_checkpoint(dense)
    for name in undisturbed.leaves():
        np.testing.assert_array_equal(ours.read(name), undisturbed.read(name), err_msg=name)


def test_a_run_without_a_whole_step_is_refused_and_so_is_a_start_from_it(run, tmp_path):
    for step in ('2', '4'):
        flip(run / 'checkpoints' / step)
    before = lines_of(run)
    with pytest.raises(UserError, match='no step in .* is whole'):
        runs.train('dense', run, 6, CHECKPOINT_KEEP=2)
    assert lines_of(run) == before and sorted(os.listdir(run / 'checkpoints')) == ['2', '4']
    with pytest.raises(UserError, match='4 is damaged .*: copy it again, or name an earlier step'):
        runs.train('upcycle', tmp_path / 'up', 6, INITIAL_CHECKPOINT_PATH=run)
    assert not (tmp_path / 'up' / 'checkpoints').exists()


def test_a_run_that_cannot_write_says_so_and_loses_nothing(run, tmp_path, capsys):
    """A file instead of the folder, and a full disk, simulated by a limit on file sizes."""
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='file.* cannot be written: .* a folder'):
        runs.train('dense', tmp_path / 'file', 4)
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(UserError, match=r'cannot be written \(File too large\)') as caught:
            runs.train('dense', run, 6, CHECKPOINT_KEEP=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert '\n' not in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ('family', 'processes', 'kills'),
    [
        ('vision', 1, 1),
        pytest.param('vision', 1, 5, marks=pytest.mark.exhaustive),
        pytest.param('llm', 1, 2, marks=pytest.mark.exhaustive),
        pytest.param('llm', 2, 2, marks=pytest.mark.exhaustive),
    ],
)
def test_killed_and_nothing_is_lost(family, processes, kills, tmp_path):
    """More kills with the same script: docs/reliability.md."""
    spec = importlib.util.spec_from_file_location('soak', SOAK)
    soak = sys.modules['soak'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(soak)
    case = soak.Case(family, processes)
    account = soak.soak(case, kills=kills, steps=24, seed=0, folder=tmp_path, converted=kills > 2)
    assert account.kills >= kills and account.runs >= 1
    assert account.most <= 2 * soak.PERIODS['CHECKPOINT_PERIOD']
    if kills > 2:
        assert account.phases['upcycling'] >= 1
