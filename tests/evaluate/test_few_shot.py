"""The few-shot probe: compared with scikit-learn's ridge regression, one device with eight; draws, labels and refusals."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

from tests import runs, vision
from tests.evaluate.probe_on_a_mesh import probe
from tests.invariants.devices import on_devices, processes
from upcycle.commands import train
from upcycle.errors import UserError
from upcycle.evaluate import few_shot
from upcycle.evaluate.few_shot import Features, FewShot

V = 7


def clusters(count, width, seed, spread=3.0):
    """Features around a centre per class, with columns of very different scale and mean, and a constant one."""
    centres = np.random.default_rng(0).normal(size=(V, width))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % V)
    features = centres[labels] + spread * rng.normal(size=(count, width))
    features = features * np.logspace(-2, 2, width) + np.linspace(-5, 5, width)
    features[:, 1] = 0.1
    return Features(jnp.asarray(features, jnp.float32), labels[:, None].astype(np.int32))


def scikit_scores(train, rows, test, l2):
    """Scores of big_vision's regression by scikit-learn, float64."""
    x, test = (np.asarray(x, np.float64) for x in (train.features_NxD[rows], test.features_NxD))
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-5
    with_bias = [np.pad((x - mean) / std, ((0, 0), (0, 1)), constant_values=100.0) for x in (x, test)]
    targets = 2 * np.eye(V)[train.labels_NxM[rows, 0]] - 1
    return Ridge(alpha=l2, fit_intercept=False, solver='svd').fit(with_bias[0], targets).predict(with_bias[1])


@pytest.mark.parametrize('shots', [3, 10], ids=['fewer images than features', 'more images than features'])
@pytest.mark.parametrize('l2', [1024.0, 1.0, 2.0**-10])
def test_equals_scikit_learn(shots, l2):
    train, test = clusters(210, 40, seed=1), clusters(100, 40, seed=2)
    rows = few_shot.draw(few_shot.permuted_classes(train.labels_NxM[:, 0], V, 0), shots)
    assert (len(rows) < 40) == (shots == 3)
    classifier = few_shot.ridge(train, rows, V)(l2)
    expected = scikit_scores(train, rows, test, l2)
    scores = np.asarray(classifier.scores(test.features_NxD))
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()
    assert few_shot.accuracy(classifier, test) == np.mean(expected.argmax(axis=1) == test.labels_NxM[:, 0])


def test_classes_of_different_size():
    """`ridge` accepts any rows; classes of different size have different biases."""
    train, test = clusters(210, 10, seed=1), clusters(50, 10, seed=2)
    rows = np.flatnonzero(train.labels_NxM[:, 0] < 3)[:70]
    scores = few_shot.ridge(train, rows, V)(16.0).scores(test.features_NxD)
    expected = scikit_scores(train, rows, test, 16.0)
    assert np.abs(np.asarray(scores) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_every_seed_draws_its_own_images_and_fewer_shots_draw_some_of_them():
    labels = np.arange(70) % V
    labels[-4:] = -1
    one, other = (few_shot.permuted_classes(labels, V, seed) for seed in (0, 1))
    rng = np.random.default_rng(1)
    for c, rows in enumerate(other):
        # big_vision's draw.
        np.testing.assert_array_equal(rows, rng.permutation(np.where(labels == c)[0]))
    five, nine = few_shot.draw(one, 5), few_shot.draw(one, 9)
    assert np.bincount(labels[five]).tolist() == [5] * V
    assert set(five) < set(nine) != set(few_shot.draw(other, 9))


def test_mean_over_seeds_for_every_shot_and_strength():
    train, test = clusters(210, 20, seed=1), clusters(300, 20, seed=2)
    spec = FewShot(shots=(1, 5), l2=(1.0, 1024.0), num_seeds=3)
    metrics = few_shot.probe(spec, train, test, V)
    assert len(metrics) == 2 * 2 * 3
    seeds = metrics['5shot/l2=1024/seeds']
    assert len(seeds) == 3 and len(set(seeds)) > 1
    assert metrics['5shot/l2=1024'] == pytest.approx(np.mean(seeds))
    assert metrics['5shot/l2=1024/stddev'] == pytest.approx(np.std(seeds, ddof=1))
    assert metrics['1shot/l2=1024'] < metrics['5shot/l2=1024'] > 2 / V
    alone = few_shot.probe(dataclasses.replace(spec, l2=(1024.0,), shots=(5,)), train, test, V)
    assert alone['5shot/seeds'] == seeds


def test_any_of_several_labels_is_right():
    labels = np.array([[1, 2], [3, -1], [0, -1], [-1, -1]])
    assert few_shot.precision_at_1(np.array([2, 3, 1, 5]), labels).tolist() == [True, True, False, False]
    train, test = clusters(70, 5, seed=1, spread=0.1), clusters(70, 5, seed=2, spread=0.1)
    classifier = few_shot.ridge(train, np.arange(70), V)(1.0)
    right = few_shot.accuracy(classifier, test)
    wrong_first = np.concatenate([(test.labels_NxM + 1) % V, test.labels_NxM], axis=1)
    assert few_shot.accuracy(classifier, Features(test.features_NxD, wrong_first)) >= right > 0.9


def test_rows_that_fill_up_a_batch_do_not_count():
    def batches(count, batch=8):
        x = np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
        for start in range(0, count, batch):
            real = np.arange(start, start + batch) < count
            yield {
                'image': jnp.asarray(x[start : start + batch] * real[:, None]),
                'labels': jnp.asarray(np.arange(start, start + batch)[:, None] % 3, jnp.int32),
                'weights': jnp.asarray(real, jnp.float32),
            }

    seen = few_shot.extract(lambda params, batch: batch['image'] * params, 2.0, batches(19))
    assert seen.features_NxD.shape == (24, 3)
    assert (seen.labels_NxM[:19, 0] == np.arange(19) % 3).all() and (seen.labels_NxM[19:] == -1).all()
    classifier = few_shot.ridge(seen, np.arange(18), 3)(1.0)
    whole = few_shot.extract(lambda params, batch: batch['image'] * params, 2.0, batches(16))
    hits = np.asarray(classifier.scores(whole.features_NxD)).argmax(axis=1) == np.arange(16) % 3
    assert few_shot.accuracy(classifier, whole) == hits.mean()


def test_eight_devices_and_two_processes_equal_one_device():
    expected = probe()
    for result in (on_devices(8, probe), processes(2, 4).call(probe)[0]):
        assert result['metrics'] == expected['metrics']
        for name in ('more images than features', 'fewer images than features'):
            scores = np.array(expected[name])
            assert np.abs(np.array(result[name]) - scores).max() <= 1e-5 * np.abs(scores).max()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'shots': ()}, 'FEW_SHOT_SHOTS must have at least one value'),
        ({'l2': ()}, 'FEW_SHOT_L2 must have at least one value'),
        ({'shots': (0,)}, r'FEW_SHOT_SHOTS = \(0,\) must be'),
        ({'shots': (2.5,)}, r'FEW_SHOT_SHOTS = \(2.5,\) must be'),
        ({'l2': 'much'}, "FEW_SHOT_L2 = 'much' must be"),
        ({'l2': (0,)}, r'FEW_SHOT_L2 = \(0,\) must be'),
        ({'num_seeds': 0}, 'FEW_SHOT_SEEDS = 0 must be'),
        ({'period': 0}, 'FEW_SHOT_PERIOD = 0 must be'),
    ],
)
def test_bounds(settings, message):
    with pytest.raises(UserError, match=message):
        FewShot(**settings)


def test_random_images_have_no_split(tmp_path):
    files = [vision.MODEL, 'tasks/synthetic_images.gin', 'runs/pretrain.gin', 'runs/few_shot.gin']
    with pytest.raises(UserError, match='FEW_SHOT needs labelled images in EVAL_DATASET'):
        train.run(files, runs.bindings('vit dense', tmp_path / 'run', 1))
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('binding', ['FEW_SHOT_TRAIN_SPLIT', 'FEW_SHOT_TEST_SPLIT'])
def test_a_missing_split_is_refused_before_the_first_step(binding, tmp_path):
    files = [*runs.FILES['vit dense'], 'runs/few_shot.gin']
    with pytest.raises(UserError, match='typo'):
        train.run(files, runs.bindings('vit dense', tmp_path / 'run', 1, **{binding: 'typo'}))
    assert not (tmp_path / 'run').exists()


def test_too_few_images_and_several_labels_are_refused():
    train = clusters(V * 9, 5, seed=1)
    with pytest.raises(UserError, match='FEW_SHOT_SHOTS = 10: class 0 has only 9 images'):
        few_shot.probe(FewShot(), train, train, V)
    two = Features(train.features_NxD, np.concatenate([train.labels_NxM] * 2, axis=1))
    with pytest.raises(UserError, match='one label per image'):
        few_shot.probe(FewShot(shots=(1,)), two, train, V)
