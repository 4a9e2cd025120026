"""`plan` refuses what `train` refuses before it starts, with the same message."""

import dataclasses
import json
import pathlib
import shutil

import pytest

from tests import runs
from upcycle import configuration
from upcycle.commands import convert, plan, train
from upcycle.errors import UserError
from upcycle.transfer import transfer

PRETRAIN = (runs.TINY, runs.TASK, 'runs/pretrain.gin')


def refusal(command, files, bindings):
    with pytest.raises(UserError) as error:
        command(files, bindings)
    return str(error.value)


@pytest.mark.parametrize(
    ('more', 'words'),
    [
        ({'TRAIN_STEPS': 4}, 'TRAIN_STEPS = 4 counts from'),
        ({'TRAIN_STEPS': 3}, 'is at step 4: raise TRAIN_STEPS'),
        ({'DENSE_STEP': 9}, 'is at step 9: raise TRAIN_STEPS'),
        ({'NUM_MICROBATCHES': 3}, 'does not divide into 3 microbatches'),
        (
            {'GROUPS_MULTIPLE_OF': 2, 'GROUP_SIZE': 64, 'NUM_MICROBATCHES': 4},
            'NUM_MICROBATCHES = 4 would split a routing group',
        ),
        ({'MESH_SHAPE': '(1, 2, 1)'}, 'MESH_SHAPE = (1, 2, 1) needs 2 devices'),
        ({'TRAINABLE': 'no_such_leaf'}, "TRAINABLE = 'no_such_leaf' matches no parameter"),
        ({'LEARNING_RATE_FACTORS': 'constant * linear_cooldown', 'COOLDOWN_STEPS': 9}, 'COOLDOWN_STEPS'),
        ({'SURGERY': None}, 'SURGERY is None: use runs/continue_dense.gin'),
        ({'MODEL_DIR': 'the dense run'}, 'holds another run, in which upcycle.training.run.Run.'),
        ({'MODEL_DIR': 'no run'}, 'holds checkpoints but no config.gin'),
        ({'MODEL_DIR': 'lost'}, 'its checkpoints are gone'),
    ],
    ids=lambda value: '' if isinstance(value, str) else ' '.join(map(str, value.items())),
)
def test_plan_refuses_what_train_refuses(more, words, tmp_path, dense, upcycled):
    folder = tmp_path / 'run'
    if (place := more.get('MODEL_DIR')) is not None:
        shutil.copytree(upcycled if place == 'lost' else dense, folder)
        if place == 'no run':
            (folder / 'config.gin').unlink()
        elif place == 'lost':
            shutil.rmtree(folder / 'checkpoints')
        more = {}
    bindings = runs.bindings('upcycle', folder, 6, **{'INITIAL_CHECKPOINT_PATH': dense, **more})
    before = sorted(path.name for path in tmp_path.rglob('*'))
    said = [refusal(command, runs.FILES['upcycle'], bindings) for command in (train.run, plan.run)]
    assert words in said[0] and said[0] == said[1]
    assert sorted(path.name for path in tmp_path.rglob('*')) == before


def test_a_run_does_not_begin_in_the_folder_of_a_foreign_checkpoint(tmp_path, dense):
    transfer(dense, str(tmp_path / 'theirs'), 'huggingface', optimizer_state='none')
    before = sorted(path.name for path in tmp_path.rglob('*'))
    bindings = runs.bindings('upcycle', tmp_path / 'theirs', 6, INITIAL_CHECKPOINT_PATH=dense)
    for command in (train.run, plan.run):
        said = refusal(command, runs.FILES['upcycle'], bindings)
        assert 'holds a checkpoint of the format huggingface' in said and 'name another MODEL_DIR' in said
    assert sorted(path.name for path in tmp_path.rglob('*')) == before


class Changed:
    """Data with a file that has changed since the run was started."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def fingerprint(self):
        return self._source.fingerprint() | {'files': 'others'}


@pytest.mark.parametrize('stored', [3, None, [], 'text', {}])
def test_a_checkpoint_without_a_data_fingerprint(stored, tmp_path, upcycled):
    folder = shutil.copytree(upcycled, tmp_path / 'run')
    for step in (folder / 'checkpoints').iterdir():
        (step / 'data' / 'metadata').write_text(json.dumps({'fingerprint': stored}))
        (step / 'checksums.json').unlink()
    bindings = runs.bindings('upcycle', folder, 8, INITIAL_CHECKPOINT_PATH=dense_of(folder))
    for command in (train.run, plan.run):
        assert 'was trained on other data' in refusal(command, runs.FILES['upcycle'], bindings)


def test_a_run_whose_data_have_changed(tmp_path, upcycled, monkeypatch):
    folder = shutil.copytree(upcycled, tmp_path / 'run')
    load = configuration.load

    def changed(*arguments):
        run = load(*arguments)
        return dataclasses.replace(run, train_data=Changed(run.train_data))

    monkeypatch.setattr(configuration, 'load', changed)
    bindings = runs.bindings('upcycle', folder, 8, INITIAL_CHECKPOINT_PATH=dense_of(folder))
    for command in (train.run, plan.run):
        assert 'was trained on other data (files differ)' in refusal(command, runs.FILES['upcycle'], bindings)


def dense_of(folder):
    config = (pathlib.Path(folder) / 'config.gin').read_text()
    (dense,) = [line.split("'")[1] for line in config.splitlines() if 'initial_checkpoint_path' in line]
    return dense


def test_a_checkpoint_without_a_surgery(tmp_path, dense):
    """In T5X the path alone is enough."""
    bindings = runs.bindings('dense', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense)
    for command in (train.run, plan.run):
        said = refusal(command, PRETRAIN, bindings)
        assert 'use runs/continue_dense.gin, or runs/upcycle.gin with a file of moe/' in said
    assert not (tmp_path / 'run').exists()


def test_a_plan_of_a_run_that_has_begun(tmp_path, upcycled, capsys):
    """The run resumes from its own checkpoint; the plan is still that of the dense one."""
    folder = shutil.copytree(upcycled, tmp_path / 'run')
    plan.run(runs.FILES['upcycle'], runs.bindings('upcycle', folder, 6, INITIAL_CHECKPOINT_PATH=dense_of(folder)))
    assert 'parameters_after' in capsys.readouterr().out


@pytest.mark.parametrize(
    'more',
    [{'TRAIN_STEPS': 4}, {'NUM_MICROBATCHES': 3}, {'SURGERY': None}, {'TRAINABLE': 'no_such_leaf'}],
    ids=str,
)
def test_convert_refuses_a_run_that_could_not_train_the_result(more, tmp_path, dense):
    bindings = runs.bindings('upcycle', tmp_path / 'run', 6, **{'INITIAL_CHECKPOINT_PATH': dense, **more})

    def converts(files, bindings):
        convert.run(files, bindings, str(tmp_path / 'sparse'), 'upcycle')

    said = [refusal(command, runs.FILES['upcycle'], bindings) for command in (converts, plan.run)]
    assert said[0] == said[1] or 'SURGERY' in more
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['upcycle', 'scratch'])
def test_moe_layers_that_choose_no_layer_are_named(kind, tmp_path, dense):
    start = {'INITIAL_CHECKPOINT_PATH': dense} if kind == 'upcycle' else {}
    with pytest.raises(UserError, match='MOE_LAYERS choose no layers'):
        runs.build(kind, tmp_path / 'run', 6, **runs.ONE_LAYER, **start)


class Unreadable:
    """A stream that fails when it is opened."""

    def __init__(self, source):
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def batches(self, start=0, share=None):
        raise UserError('this split is not there')


@pytest.mark.parametrize('which', ['train_data', 'eval_data'])
def test_data_that_cannot_be_opened(which, tmp_path, dense, monkeypatch):
    load = configuration.load

    def broken(*arguments):
        run = load(*arguments)
        object.__setattr__(run, which, Unreadable(getattr(run, which)))
        return run

    monkeypatch.setattr(configuration, 'load', broken)
    bindings = runs.bindings('upcycle', tmp_path / 'run', 6, INITIAL_CHECKPOINT_PATH=dense)
    for work in (train.run, plan.run):
        assert refusal(work, runs.FILES['upcycle'], bindings) == 'this split is not there'
    assert not (tmp_path / 'run').exists()
