"""Batches, training and evaluation of four processes with two devices each equal one process's, in every device order.

What happens in a process is a function of this module, called by `many_hosts.call`.
"""

import itertools
import json

import jax
import numpy as np
import pytest

from tests import runs
from tests.evaluate import small_tasks
from tests.evaluate.probe_on_a_mesh import probe
from tests.invariants import test_processes
from tests.invariants.many_hosts import MESHES, ORDERS, call
from tests.invariants.on_eight_devices import step
from tests.invariants.test_mesh import assert_same, often_and_exhaustive, on_eight
from upcycle import configuration, partitioning
from upcycle.commands import evaluate as command
from upcycle.data.images import DatasetConfig, Mnist5k, ScanAugmentation
from upcycle.data.synthetic import SyntheticText
from upcycle.evaluate import tasks
from upcycle.metrics import read_metrics

EVERYWHERE = [(shape, order) for shape in MESHES for order in ORDERS]
# Every mesh, and every order, for what takes long.
EACH = [case for case in EVERYWHERE if case[1] == 'interleaved' or case[0] == (2, 2, 2)]
# `model` across processes, and rows of a process that do not follow each other.
SCATTERED = (2, 2, 2), 'interleaved'


def meshes_and_orders(cases, *often):
    """Parameters `shape` and `order`; those outside `often` are left to `make test-all`."""
    return pytest.mark.parametrize(('shape', 'order'), often_and_exhaustive(cases, often))


def sources():
    """Data of both families; the images end in the middle of the last batch."""
    text = SyntheticText({'inputs': 4, 'targets': 4}, 100, batch_size=16, seed=3)
    one_pass = {'split': 'validation', 'shuffle': False, 'repeat': False}
    images = DatasetConfig(Mnist5k(), ScanAugmentation(), batch_size=16, **one_pass)
    return {'text': (text, 7), 'images': (images, 61)}


def placed():
    """Of batches on every mesh: of each device of this process the index of its part, and what it was given."""
    found = {}
    for shape in MESHES:
        sharding = partitioning.batch_sharding(partitioning.make_mesh(shape, None))
        for name, (source, start) in sources().items():
            batches = partitioning.batches(source, start, sharding)
            for number, batch in enumerate(itertools.islice(batches, 2)):
                found[shape, name, number] = {
                    feature: (
                        array.shape,
                        [(shard.index, np.asarray(shard.data)) for shard in array.addressable_shards],
                    )
                    for feature, array in batch.items()
                }
    return found


@pytest.mark.parametrize('order', ORDERS)
def test_every_device_is_given_its_rows(order):
    wholes = {name: list(itertools.islice(source.batches(start), 2)) for name, (source, start) in sources().items()}
    for process in call(placed, order=order):
        assert len(process) == len(MESHES) * sum(map(len, wholes.values()))
        for (_, name, number), features in process.items():
            whole = wholes[name][number]
            assert features.keys() == whole.keys()
            for feature, (global_shape, parts) in features.items():
                assert global_shape == whole[feature].shape
                assert len(parts) == 2
                for index, rows in parts:
                    np.testing.assert_array_equal(rows, whole[feature][index])


@meshes_and_orders(EVERYWHERE)
def test_gradients(shape, order):
    assert_same(on_eight('gather', 'one device'), call(step, 'gather', shape, order=order)[0])


SETTINGS = {**test_processes.SETTINGS, **runs.ONE_SPARSE_LAYER}


def train(model_dir, steps, start, shape):
    runs.train('upcycle', model_dir, steps, INITIAL_CHECKPOINT_PATH=start, MESH_SHAPE=shape, **SETTINGS)


@pytest.fixture(scope='module')
def whole(shallow, tmp_path_factory):
    """The run folder of steps 5 to 10, by one process with one device."""
    path = tmp_path_factory.mktemp('whole') / 'run'
    train(path, 10, shallow, (1, 1, 1))
    return path


@meshes_and_orders(EACH, SCATTERED)
def test_training_and_resuming(shape, order, whole, shallow, tmp_path):
    """Two steps and their evaluations on many hosts; then by one process, and on many hosts again."""
    path = tmp_path / 'run'
    call(train, path, 6, shallow, shape, order=order)
    train(path, 8, shallow, (1, 1, 1))
    call(train, path, 10, shallow, shape, order=order)
    lines, expected = (read_metrics(folder / 'metrics.jsonl') for folder in (path, whole))
    assert [(line['step'], line['split']) for line in lines] == [(line['step'], line['split']) for line in expected]
    for line, one in zip(lines, expected, strict=True):
        for name in ('loss', 'accuracy', 'gradient_norm', 'experts/router_entropy', 'flops'):
            if name in one:
                # A step's update is Adafactor's, which makes rounding larger.
                tolerance = 1e-5 if line['step'] <= 5 else 1e-4
                np.testing.assert_allclose(line[name], one[name], rtol=tolerance, err_msg=f'{line["step"]} {name}')


def evaluate(checkpoint, shape, out):
    """`upcycle eval` of a dense run."""
    bindings = runs.bindings('dense', 'unused', 1, MESH_SHAPE=shape, BATCH_SIZE=8, EVAL_BATCH_SIZE=8, **runs.ONE_LAYER)
    return command.run(runs.FILES['dense'], bindings, checkpoint, out=str(out))['metrics']


@meshes_and_orders(EACH, ((1, 1, 8), 'interleaved'))
def test_evaluation_of_a_checkpoint(shape, order, shallow, tmp_path):
    expected = evaluate(shallow, (1, 1, 1), tmp_path / 'one.json')
    found = call(evaluate, shallow, shape, tmp_path / 'four.json', order=order)
    assert all(of_process == found[0] for of_process in found)
    assert json.loads((tmp_path / 'four.json').read_text())['metrics'] == found[0]
    assert found[0]['validation'].keys() == expected['validation'].keys()
    for name, value in expected['validation'].items():
        np.testing.assert_allclose(found[0]['validation'][name], value, rtol=1e-5, err_msg=name)


def answer(shape):
    """Scores of seqio's tasks of a fresh model, with the answers and scores that their metrics were given."""
    bindings = {
        **runs.SMALL_STEPS,
        **runs.ONE_LAYER,
        'TASK_FEATURE_LENGTHS': "{'inputs': 80, 'targets': 8}",
        'MIXTURE_OR_TASK_NAME': 'small_glue',
        'MIXTURE_OR_TASK_MODULE': 'tests.evaluate.small_tasks',
        'EVAL_BATCH_SIZE': '8',
        'MODEL_DIR': 'unused',
        'TRAIN_STEPS': '1',
    }
    run = configuration.load([runs.TINY, 'tasks/superglue.gin', 'runs/pretrain.gin', 'runs/task_metrics.gin'], bindings)
    mesh = partitioning.make_mesh(shape, None, None if np.prod(shape) > 1 else jax.devices()[:1])
    sharding = partitioning.batch_sharding(mesh)
    with partitioning.use(mesh):
        make = jax.jit(
            lambda: partitioning.unbox(run.model.init(jax.random.key(3), run.eval_data.batch_spec())),
            out_shardings=partitioning.replicated(mesh),
        )
        found = tasks.TaskEvaluator(run.task_metrics, run.model, run.eval_data, sharding).evaluate(make())
    return found, small_tasks.ANSWERS[-1], small_tasks.SCORES[-1]


@meshes_and_orders(EACH)
def test_task_scores_belong_to_their_examples(shape, order):
    metrics, (targets, answers), (_, scores) = answer((1, 1, 1))
    assert len(set(answers)) > 1 and len({round(float(score), 3) for score in scores}) == len(scores)
    for found, (found_targets, found_answers), (_, found_scores) in call(answer, shape, order=order):
        assert found_targets == targets and found_answers == answers
        np.testing.assert_allclose(found_scores, scores, rtol=1e-5)
        assert found == pytest.approx(metrics, rel=1e-5)


@meshes_and_orders(EACH, SCATTERED)
def test_few_shot_probes(shape, order):
    one = probe((1, 1, 1))
    for found in call(probe, shape, order=order):
        assert found['metrics'] == one['metrics']
        for kind in ('more images than features', 'fewer images than features'):
            scores = np.array(one[kind])
            assert np.abs(np.array(found[kind]) - scores).max() <= 1e-5 * np.abs(scores).max()
