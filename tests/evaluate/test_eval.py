"""`upcycle eval`: the trainer's metrics, for run folders and other checkpoints, and refusals."""

import json
import os
import shutil
import sys

import pytest

from tests import runs, vision
from tests.test_cli import call
from upcycle.commands import evaluate, train
from upcycle.errors import UserError
from upcycle.metrics import read_metrics

COMPARED = ('loss', 'cross_entropy_loss', 'accuracy', 'targets')


def lines_of(model_dir, split):
    return [line for line in read_metrics(os.path.join(model_dir, 'metrics.jsonl')) if line['split'] == split]


def options(files, bindings):
    return [f'--gin_file={file}' for file in files] + [f'--gin.{name}={value}' for name, value in bindings.items()]


def test_a_run_folder_needs_no_files(dense, tmp_path, capsys):
    code, out, _ = call(['eval', f'--from={dense}', '--json', f'--out={tmp_path}/new/result.json'], capsys)
    assert code == 0
    result = json.loads(out)
    assert result == json.loads((tmp_path / 'new' / 'result.json').read_text())
    assert (result['format'], result['step'], result['family'], result['operator']) == ('upcycle', 4, 't5', None)
    logged = lines_of(dense, 'validation')[-1]
    for name in COMPARED:
        assert result['metrics']['validation'][name] == pytest.approx(logged[name], rel=1e-6)


def test_a_checkpoint_without_its_folder_needs_the_files(dense, tmp_path, capsys):
    shutil.copytree(os.path.join(dense, 'checkpoints'), tmp_path / 'moved')
    code, _, error = call(['eval', f'--from={tmp_path}/moved'], capsys)
    assert code == 2 and 'runs/eval.gin' in error
    small = {
        name: runs.SMALL_STEPS[name]
        for name in ('ACTIVATION_DTYPE', 'BATCH_SIZE', 'NUM_EMBEDDINGS', 'TASK_FEATURE_LENGTHS')
    }
    files = options((runs.TINY, runs.TASK, 'runs/eval.gin'), {**small, 'EVAL_STEPS': 2})
    # A training batch could not be divided like this, but nothing is trained.
    files += options((), {'NUM_MICROBATCHES': 3})
    code, out, _ = call(['eval', f'--from={tmp_path}/moved', *files], capsys)
    assert code == 0
    logged = lines_of(dense, 'validation')[-1]
    (line,) = [line for line in out.splitlines() if line.split()[:2] == ['validation', 'accuracy']]
    assert float(line.split()[-1]) == pytest.approx(logged['accuracy'], rel=1e-5)


def test_long_names_stand_apart_from_their_values():
    metrics = {'validation': {'loss': 1.5, 'experts/fraction_tokens_left_behind': 0.0}}
    _, *lines = evaluate._metrics_table(
        {'checkpoint': 'x', 'format': 'upcycle', 'step': 4, 'metrics': metrics}
    ).splitlines()
    assert [line.split()[1:] for line in lines] == [['loss', '1.5'], ['experts/fraction_tokens_left_behind', '0']]


def test_a_dense_checkpoint_is_evaluated_as_it_is_upcycled(dense, upcycled, capsys):
    """The metrics equal the trainer's line at step 0 of the upcycled run."""
    first = lines_of(upcycled, 'validation')[0]
    files = options(runs.FILES['upcycle'], runs.bindings('upcycle', 'unused', 6))
    code, out, error = call(['eval', f'--from={dense}', '--json', *files], capsys)
    assert code == 0 and "upcycled by 'copy'" in error
    metrics = json.loads(out)['metrics']['validation']
    for name in (*COMPARED, 'experts/fraction_dropped'):
        assert metrics[name] == pytest.approx(first[name], rel=1e-6)
    # The run's own checkpoint is sparse and not upcycled again.
    code, out, error = call(['eval', f'--from={upcycled}', '--json'], capsys)
    last = lines_of(upcycled, 'validation')[-1]
    assert 'upcycled' not in error
    assert json.loads(out)['metrics']['validation']['loss'] == pytest.approx(last['loss'], rel=1e-6)


@pytest.mark.parametrize(
    ('kind', 'fixture', 'binding', 'value'),
    [
        ('dense', 'dense', 'MLP_ACTIVATIONS', "('silu', 'linear')"),
        ('upcycle', 'dense', 'MLP_ACTIVATIONS', "('silu', 'linear')"),
        ('vit dense', 'dense_vit', 'GELU', 'erf'),
        ('vit dense', 'dense_vit', 'NORM_EPSILON', 0.001),
    ],
)
def test_a_model_of_another_function_is_not_evaluated(kind, fixture, binding, value, request, capsys):
    """The leaves fit, but the metrics would be another model's."""
    folder = request.getfixturevalue(fixture)
    files = options(runs.FILES[kind], runs.bindings(kind, 'unused', 6) | {binding: value})
    code, _, error = call(['eval', f'--from={folder}', *files], capsys)
    assert code == 2 and 'was made with' in error and binding.lower() in error, error


def test_a_run_is_not_resumed_as_another_function(dense, tmp_path):
    """Independent of its config.gin."""
    run = shutil.copytree(dense, tmp_path / 'run')
    config = run / 'config.gin'
    config.write_text(config.read_text().replace("('gelu', 'linear')", "('silu', 'linear')"))
    with pytest.raises(UserError, match='was made with mlp_activations'):
        runs.train('dense', run, 6, MLP_ACTIVATIONS="('silu', 'linear')")


def test_probes_of_the_trainer_and_of_the_command_are_one(tmp_path, capsys):
    files = (vision.MODEL, vision.TASK, 'runs/pretrain.gin', 'runs/few_shot.gin')
    few = {'FEW_SHOT_SEEDS': 2, 'FEW_SHOT_SHOTS': '(5, 10)', 'FEW_SHOT_PERIOD': 2, 'EVAL_PERIOD': 100}
    train.run(files, vision.bindings(tmp_path / 'run', 3, **few))
    # A run may be resumed with other probes.
    few |= {'FEW_SHOT_SHOTS': '(1, 5, 10)'}
    train.run(files, vision.bindings(tmp_path / 'run', 3, **few))
    capsys.readouterr()
    logged = lines_of(tmp_path / 'run', 'few_shot')
    assert [line['step'] for line in logged] == [2, 3]
    assert 0.1 < logged[-1]['10shot'] < 1 and len(logged[-1]['10shot/seeds']) == 2
    code, out, _ = call(['eval', f'--from={tmp_path}/run', '--json'], capsys)
    assert code == 0
    result = json.loads(out)['metrics']['few_shot']
    assert result['10shot/seeds'] == logged[-1]['10shot/seeds']
    assert result['5shot'] == logged[-1]['5shot']
    # The same by files with their own bindings.
    more = ['--few_shot', '--gin.FEW_SHOT_SEEDS=1', '--gin.EVAL_STEPS=1']
    files = options(files[:-1], {k: v for k, v in vision.TINY.items() if k != 'EVAL_STEPS'})
    code, out, _ = call(['eval', f'--from={tmp_path}/run', '--json', *files, *more], capsys)
    assert code == 0
    result = json.loads(out)['metrics']
    assert result['few_shot']['10shot/seeds'] == logged[-1]['10shot/seeds'][:1]
    assert result['validation']['targets'] == 64


MISTAKES = {
    'no such checkpoint': (['--from=/nowhere/at/all'], ['/nowhere/at/all', 'does not exist']),
    'probe of a language model': (['--few_shot'], ['FEW_SHOT', 't5']),
    'an option of lm-eval alone': (['--limit=3'], ['--limit is an option of --lm_eval']),
    'no lm-eval': (['--lm_eval=a'], ['--lm_eval needs lm_eval: pip install upcycle[lm_eval].']),
    'a sparse model': (
        options((runs.TINY, 'moe/t5.gin', runs.TASK, 'runs/eval.gin'), {'BATCH_SIZE': 4}),
        ['is dense and the model is sparse', 'runs/upcycle.gin'],
    ),
    'another architecture': (
        options((runs.TINY, runs.TASK, 'runs/eval.gin'), {'BATCH_SIZE': 4, 'NUM_EMBEDDINGS': 384, 'MLP_DIM': 8}),
        [
            'another architecture',
            'MLP_DIM is 8 here and 128 in the checkpoint',
            'params/encoder/layers_*/mlp/wi_0/kernel',
        ],
    ),
    'unused binding': (
        options((runs.TINY, runs.TASK, 'runs/eval.gin'), {'NUM_EXPERTS': 4}),
        ['NUM_EXPERTS', 'is unused'],
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_one_sentence(mistake, dense, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'lm_eval', None)  # as if it were not installed
    more, words = MISTAKES[mistake]
    source = [] if any(text.startswith('--from') for text in more) else [f'--from={dense}']
    code, out, error = call(['eval', *source, *more, f'--out={tmp_path}/result.json'], capsys)
    assert code == 2 and not out
    assert error.startswith('upcycle: ') and 'Traceback' not in error
    assert all(word in error for word in words), error
    assert os.listdir(tmp_path) == []
