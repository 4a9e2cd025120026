"""Profiles of some steps."""

import time

import pytest

from tests import runs
from upcycle import cli
from upcycle.checkpoints.native import CheckpointManager
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training import profile


def command(model_dir, steps, *more, **bindings):
    named = runs.bindings('vit dense', model_dir, steps, **bindings)
    files = [f'--gin_file={file}' for file in runs.FILES['vit dense']]
    return ['train', *files, *(f'--gin.{name}={value}' for name, value in named.items()), *more]


def test_steps_are_traced_and_time_is_booked(tmp_path, monkeypatch, capsys):
    began = time.monotonic()
    cli.run(command(tmp_path, 4, '--profile_steps=2:3', CHECKPOINT_PERIOD=2, EVAL_PERIOD=2))
    lasted = time.monotonic() - began
    (trace,) = (tmp_path / 'profile').rglob('*.xplane.pb')
    content = trace.read_bytes()
    # Annotations of these steps only.
    assert content.count(b'step_num') > 0
    lines = [line for line in read_metrics(str(tmp_path / 'metrics.jsonl')) if line['split'] == 'train']
    spent = [[line[f'{name}seconds'] for name in ('data_', 'evaluation_', 'checkpoint_', '')] for line in lines]
    for before, after in zip(spent, spent[1:], strict=False):
        assert all(a >= b for a, b in zip(after, before, strict=True))
    data, evaluation, checkpoint, steps = spent[-1]
    assert 0 < data < steps and evaluation > 0 and checkpoint > 0
    assert spent[0][1:3] == [0, 0]
    assert steps + evaluation + checkpoint < lasted

    # A resumed run past the requested steps, on one process instead of four.
    restore = CheckpointManager.restore

    def of_four(self, *arguments):
        tree, data, metadata = restore(self, *arguments)
        return tree, data | {'readers': 4}, metadata

    monkeypatch.setattr(CheckpointManager, 'restore', of_four)
    cli.run(command(tmp_path, 5, '--profile_steps=2:3'))
    assert len(list((tmp_path / 'profile').rglob('*.xplane.pb'))) == 1
    said = 'the number of readers of the data changed from 4 to 1 at step 4. Global batch b of this split'
    assert said in capsys.readouterr().err


def test_mistakes(tmp_path):
    for text in ('10', '5:4', '0:3', 'a:b', '1:2:3'):
        with pytest.raises(UserError, match=f'--profile_steps={text} must be'):
            profile.parse(text)
    with pytest.raises(UserError, match='--profile_steps ends at step 9, after TRAIN_STEPS = 4'):
        cli.run(command(tmp_path, 4, '--profile_steps=8:9'))
    assert not list(tmp_path.iterdir())
