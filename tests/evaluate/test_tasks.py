"""Evaluation of seqio tasks: the arguments of their metrics, and the results of `upcycle eval` and the trainer."""

import json

import jax
import numpy as np
import pytest

from tests import runs
from tests.evaluate import small_tasks
from tests.test_cli import call
from upcycle import configuration, partitioning
from upcycle.commands import evaluate, train
from upcycle.errors import UserError
from upcycle.evaluate import tasks
from upcycle.metrics import read_metrics
from upcycle.models.decoding import generate

FILES = (runs.TINY, 'tasks/superglue.gin', 'runs/pretrain.gin')
SPARSE = (runs.TINY, 'moe/t5.gin', 'tasks/superglue.gin', 'runs/scratch.gin')
METRICS = 'runs/task_metrics.gin'


def bindings(model_dir='unused', **more):
    small = {
        **runs.SMALL_STEPS,
        'NUM_EMBEDDINGS': '384',
        'TASK_FEATURE_LENGTHS': "{'inputs': 80, 'targets': 8}",
        'MIXTURE_OR_TASK_NAME': 'small_glue',
        'MIXTURE_OR_TASK_MODULE': 'tests.evaluate.small_tasks',
        'EVAL_BATCH_SIZE': '4',
        'MODEL_DIR': str(model_dir),
        'TRAIN_STEPS': '1',
    }
    return small | {name: str(value) for name, value in more.items()}


def examples(name):
    """Token ids of a task's inputs and targets, padded to the lengths above."""
    task = small_tasks.seqio.get_mixture_or_task(f'small_{name}')
    rows = task.get_dataset({'inputs': 80, 'targets': 8}, split='validation', shuffle=False).as_numpy_iterator()
    rows = list(rows)
    return tuple(
        np.stack([np.pad(row[key], (0, length - len(row[key]))) for row in rows])
        for key, length in (('inputs', 80), ('targets', 8))
    )


@pytest.mark.parametrize(
    'files', [pytest.param(FILES, id='dense', marks=pytest.mark.exhaustive), pytest.param(SPARSE, id='sparse')]
)
def test_metrics_are_given_the_models_answers_in_order(files):
    """Six questions and three choices in batches of four: the last batch of each is padded."""
    more = {'NUM_EXPERTS': 4} if files is SPARSE else {}
    run = configuration.load([*files, METRICS], bindings(**more))
    mesh = partitioning.make_mesh((1, 1, 1), run.num_experts, jax.devices()[:1])
    with partitioning.use(mesh):
        params = jax.jit(lambda key: partitioning.unbox(run.model.init(key, run.eval_data.batch_spec())))(
            jax.random.key(3)
        )
        evaluator = tasks.TaskEvaluator(run.task_metrics, run.model, run.eval_data, partitioning.batch_sharding(mesh))
        found = evaluator.evaluate(params)
        inputs, _ = examples('boolq')
        batches = [inputs[:4], np.concatenate([inputs[4:], np.zeros_like(inputs[:2])])]
        answer = jax.jit(lambda params, x: generate(run.model.module(), params, x, max_length=8)[0][:, 0])
        expected = [answer(params, x) for x in batches]
        copa = dict(zip(('encoder_input_tokens', 'decoder_target_tokens'), examples('copa'), strict=True))
        copa = {name: np.concatenate([value, np.zeros_like(value[:1])]) for name, value in copa.items()}
        copa['decoder_input_tokens'] = np.pad(copa['decoder_target_tokens'], ((0, 0), (1, 0)))[:, :-1]
        log_probs = np.asarray(jax.jit(lambda *inputs: jax.nn.log_softmax(run.model.logits(*inputs)))(params, copa))
    targets, answers = small_tasks.ANSWERS[-1]
    assert targets == ['True', 'False'] * 3
    assert answers == [small_tasks.VOCABULARY.decode(row.tolist()) for row in np.concatenate(expected)[:6]]
    scores = [
        sum(log_probs[row, i, token] for i, token in enumerate(copa['decoder_target_tokens'][row]) if token)
        for row in range(3)
    ]
    np.testing.assert_allclose(small_tasks.SCORES[-1][1], scores, rtol=1e-5)
    assert found['small_copa/log_likelihood'] == pytest.approx(np.mean(scores), rel=1e-5)
    assert found['average'] == pytest.approx(
        np.mean([found['small_boolq/accuracy'], np.mean([found['small_copa/log_likelihood'], 3])]), rel=1e-6
    )


@pytest.fixture(scope='module')
def learnt(tmp_path_factory):
    """A tiny model that has learnt the form of answers, but not which is correct."""
    path = tmp_path_factory.mktemp('learnt') / 'run'
    steps = {'TRAIN_STEPS': 160, 'EVAL_PERIOD': 160, 'CHECKPOINT_PERIOD': 160, 'LOG_PERIOD': 20, 'BATCH_SIZE': 8}
    more = {'TASK_METRICS_PERIOD': 80, 'WARMUP_STEPS': 100, 'MIXTURE_OR_TASK_NAME': 'small_boolq', **steps}
    train.run([*FILES, METRICS], bindings(path, **more))
    return path


def test_the_trainer_measures_as_it_goes(learnt):
    lines = [line for line in read_metrics(learnt / 'metrics.jsonl') if line['split'] == 'tasks']
    assert [line['step'] for line in lines] == [80, 160]
    targets, answers = small_tasks.ANSWERS[-1]
    assert set(answers) <= {'True', 'False'}
    right = sum(a == b for a, b in zip(targets, answers, strict=True))
    assert right > 0
    assert lines[-1]['small_boolq/accuracy'] == lines[-1]['average'] == pytest.approx(100 * right / 6)


def test_a_run_folder_needs_no_other_files(learnt, capsys):
    """Beam search on the first examples of another task. The run's config.gin imports tasks, so it is named explicitly."""
    more = ['--gin.TASK_METRICS_EXAMPLES=2', '--gin.TASK_METRICS_DECODES=2', '--gin.TASK_METRICS_OF=small_glue']
    files = [f'--gin_file={learnt}/config.gin', f'--gin_file={METRICS}']
    code, out, err = call(['eval', *files, f'--from={learnt}', '--json', *more], capsys)
    assert code == 0, err
    found = json.loads(out)['metrics']['tasks']
    assert found['small_copa/answers'] == 2
    targets, answers = small_tasks.ANSWERS[-1]
    assert targets == ['True', 'False'] and set(answers) <= set(targets)


@pytest.mark.parametrize(
    'binding',
    [{'TASK_METRICS_OF': 'small_unmeasured'}, {'TASK_METRICS_OF': 'typo'}, {'TASK_METRICS_SPLIT': 'typo'}],
    ids=str,
)
@pytest.mark.parametrize('command', [train.run, evaluate.run])
def test_what_cannot_be_measured_is_refused_before_anything_is_done(command, binding, dense, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, 'params_from', None)
    arguments = [*FILES, METRICS], bindings(tmp_path / 'run', MIXTURE_OR_TASK_NAME='small_boolq', **binding)
    with pytest.raises(UserError, match=r'no task with metrics and a split|typo'):
        command(*arguments, *([str(dense)] if command is evaluate.run else []))
    assert not (tmp_path / 'run').exists()


def test_random_tokens_are_not_a_task(tmp_path):
    with pytest.raises(UserError, match='TASK_METRICS needs a text task in EVAL_DATASET'):
        train.run([*runs.FILES['dense'], METRICS], runs.bindings('dense', tmp_path / 'run', 1))
    assert not (tmp_path / 'run').exists()


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match=r'small_unmeasured.*TASK_METRICS_OF'):
        run = configuration.load([*FILES, METRICS], bindings(TASK_METRICS_OF='small_unmeasured'))
        mesh = partitioning.make_mesh((1, 1, 1), None, jax.devices()[:1])
        tasks.TaskEvaluator(run.task_metrics, run.model, run.eval_data, partitioning.batch_sharding(mesh))
    with pytest.raises(UserError, match='TASK_METRICS_DECODES = 0'):
        configuration.load([*FILES, METRICS], bindings(TASK_METRICS_DECODES=0))
    with pytest.raises(UserError, match='TASK_METRICS is for T5 models'):
        small = runs.bindings('vit dense', 'unused', 1)
        configuration.load([*runs.FILES['vit dense'], METRICS], small)
