"""Fine-tuning of both families from the shared run files: steps from 0, dropout, and a new head in the plan."""

import json
import os
import pathlib

import numpy as np
import pytest

from tests import runs, vision
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint
from upcycle.commands import train
from upcycle.metrics import read_metrics

FILES = (vision.MODEL, vision.TASK, 'runs/finetune_vit.gin')


@pytest.fixture(scope='module')
def dense_vit(tmp_path_factory):
    return vision.dense_checkpoint(str(tmp_path_factory.mktemp('vit')))


def lines_of(model_dir):
    return read_metrics(os.path.join(model_dir, 'metrics.jsonl'))


def test_an_upcycled_t5_starts_where_it_ended_and_counts_from_zero(tmp_path, upcycled):
    files = (runs.TINY, 'moe/t5.gin', runs.TASK, 'runs/finetune.gin')
    more = {'INITIAL_CHECKPOINT_PATH': upcycled, 'EXPERT_DROPOUT_RATE': 0.3, 'LOG_PERIOD': 1, 'EVAL_PERIOD': 100}
    small = runs.bindings('upcycle', tmp_path / 'run', 2, **more)
    state = train.run(files, {name: value for name, value in small.items() if name != 'WARMUP_STEPS'})
    assert (int(state.step), int(state.opt_state['count'])) == (2, 2)
    first, *rest = lines_of(tmp_path / 'run')
    before = [line for line in lines_of(upcycled) if line['split'] == 'validation'][-1]
    assert (first['step'], first['start_step'], first['split']) == (0, 0, 'validation')
    # Dropout is used only in training.
    assert first['loss'] == pytest.approx(before['loss'], rel=1e-6)
    assert first['sunk_flops'] == before['flops'] + before['sunk_flops'] > 0
    assert [line['learning_rate'] for line in rest if line['split'] == 'train'] == pytest.approx([1e-3, 1e-3])
    config = (tmp_path / 'run' / 'config.gin').read_text()
    assert '.dropout_rate = 0.1' in config and '.expert_dropout_rate = 0.3' in config
    # The upcycled checkpoint's receipt is kept, including its metrics of step 0.
    before, after = (
        json.loads(pathlib.Path(path, 'receipt.json').read_text()) for path in (upcycled, tmp_path / 'run')
    )
    assert before['operator'] == 'copy'
    assert {**after, 'plan': None} == {**before, 'plan': None}


def test_vit_gets_a_new_head_for_other_classes(tmp_path, dense_vit):
    more = {'INITIAL_CHECKPOINT_PATH': dense_vit, 'NUM_CLASSES': 12, 'BASE_LEARNING_RATE': 0.0}
    train.run(FILES, vision.bindings(tmp_path / 'run', 2, **more))
    old, new = open_checkpoint(dense_vit), open_checkpoint(str(tmp_path / 'run'))
    assert new.leaves()['params/head/kernel'].shape == (16, 12)
    names = [name for name in new.leaves() if name.startswith('params/') and '/head/' not in name]
    assert len(names) > 20
    for name in names:
        np.testing.assert_array_equal(new.read(name), old.read(name), err_msg=name)
    assert set(new.leaves()) & {'opt_state/param_states/head/kernel/m'}


def test_the_plan_names_the_new_head_and_the_old_one(tmp_path, dense_vit, capsys):
    bindings = vision.bindings('/nowhere', 2, NUM_CLASSES=12)
    options = [*(f'--gin_file={file}' for file in FILES), *(f'--gin.{n}={v}' for n, v in bindings.items())]
    code, out, _ = call(['plan', f'--from={dense_vit}', '--json', *options], capsys)
    assert code == 0
    plan = json.loads(out)
    rows = {row['target']: row for row in plan['rows']}
    assert rows['params/head/kernel']['action'] == rows['params/head/bias']['action'] == 'new'
    assert plan['dropped']['params/head/kernel'] == 'NEW_HEAD = True'
    code, _, error = call(['plan', f'--from={dense_vit}', *options, '--gin.NEW_HEAD=False'], capsys)
    assert code == 2 and 'NEW_HEAD = True' in error and 'params/head/kernel' in error


def test_vit_warms_up_and_follows_a_cosine(tmp_path, dense_vit):
    more = {'INITIAL_CHECKPOINT_PATH': dense_vit, 'BASE_LEARNING_RATE': 0.03, 'EVAL_PERIOD': 100, 'WARMUP_STEPS': 1}
    train.run(FILES, vision.bindings(tmp_path / 'run', 3, **more))
    rates = [line['learning_rate'] for line in lines_of(tmp_path / 'run') if line['split'] == 'train']
    assert rates == pytest.approx([0.0, 0.03, 0.015])
