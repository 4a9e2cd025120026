"""TFDS datasets, prepared here in both file formats: read by index, or streamed."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from upcycle.data import WHOLE, Share, tensorflow_quiet
from upcycle.data.images import CentralCropPreprocessing, DatasetConfig, InceptionPreprocessing, TfdsImages
from upcycle.errors import UserError

N = {'train': 40, 'test': 10}


def examples(n):
    """Images identified by their brightness."""
    for i in range(n):
        labels = [i % 7, 6] if i % 2 else [i % 7]
        yield i, {'image': np.full((12, 10, 3), 5 * i, np.uint8), 'label': i % 7, 'labels': labels, 'number': i}


def prepare(folder, file_format):
    tfds = tensorflow_quiet.tfds()
    classes = tfds.features.ClassLabel(num_classes=7)
    features = tfds.features.FeaturesDict(
        {
            'image': tfds.features.Image(shape=(None, None, 3), encoding_format='png'),
            'label': classes,
            'labels': tfds.features.Sequence(classes),
            'number': np.int64,
        }
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name='bright',
        version='1.0.0',
        features=features,
        split_datasets={split: list(examples(n)) for split, n in N.items()},
        data_dir=str(folder),
        file_format=file_format,
        download_config=tfds.download.DownloadConfig(num_shards=4),
    )


@pytest.fixture(scope='module')
def by_place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('array_record')
    prepare(folder, 'array_record')
    return str(folder)


@pytest.fixture(scope='module')
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tfrecord')
    prepare(folder, 'tfrecord')
    return str(folder)


def config(data_dir, source=None, **changes):
    settings = {
        'source': TfdsImages('bright', data_dir, **(source or {})),
        'preprocessing': CentralCropPreprocessing(8, value_range=(0, 255), resize_small=None),
        'split': 'train',
        'batch_size': 8,
        'seed': 5,
    }
    return DatasetConfig(**settings | changes)


def numbers(batches):
    """Numbers of the images, 5 levels of brightness each."""
    return [int(round(float(row.mean()) / 5)) for batch in batches for row in batch['image'][batch['weights'] > 0]]


def first(data, n, start=0, share=WHOLE):
    return list(itertools.islice(data.batches(start, share), n))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_the_two_formats_are_told_apart(by_place, streamed):
    assert not TfdsImages('bright', by_place).streamed
    assert TfdsImages('bright', streamed).streamed
    assert 'pure function' in config(by_place).promise()
    assert 'same number of readers' in config(streamed).promise()


@pytest.mark.parametrize('kind', ['by_place', 'streamed'])
def test_epochs_labels_and_spec(kind, request):
    data = config(request.getfixturevalue(kind))
    assert data.num_classes == 7
    batches = first(data, 10)
    for batch in batches:
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == data.batch_spec()
        np.testing.assert_array_equal(batch['labels'][:, 0], np.array(numbers([batch])) % 7)
    one, two = numbers(batches[:5]), numbers(batches[5:])
    assert sorted(one) == sorted(two) == list(range(40))
    assert one != two and one != sorted(one)
    assert numbers(first(config(request.getfixturevalue(kind), seed=6), 5)) != one


@pytest.mark.parametrize('kind', ['by_place', 'streamed'])
def test_resuming_gives_the_same_batches(kind, request):
    data = config(request.getfixturevalue(kind), preprocessing=InceptionPreprocessing(8))
    whole = first(data, 8)
    assert_same(first(data, 8), whole)
    assert_same(first(data, 5, start=3), whole[3:])


def test_by_place_any_hosts_give_the_same_batches(by_place):
    data = config(by_place)
    parts = [first(data, 6, share=Share.even(h, 4)) for h in range(4)]
    joined = [{name: np.concatenate([part[b][name] for part in parts]) for name in parts[0][b]} for b in range(6)]
    assert_same(joined, first(data, 6))


def test_streamed_hosts_share_the_images(streamed):
    data = config(streamed)
    parts = [first(data, 5, share=Share.even(h, 2)) for h in range(2)]
    assert sorted(numbers(parts[0]) + numbers(parts[1])) == list(range(40))
    assert_same(first(data, 3, start=2, share=Share.even(1, 2)), parts[1][2:])
    # A stream is dealt out to readers, independently of their rows in the batch.
    assert_same(first(data, 5, share=Share(0, 2, (0, 3), 4)), parts[0])


@pytest.mark.parametrize('kind', ['by_place', 'streamed'])
@pytest.mark.parametrize('hosts', [1, 4])
def test_evaluation_is_one_pass_whose_end_hosts_agree_on(kind, hosts, request):
    data = config(request.getfixturevalue(kind), split='test', shuffle=False, repeat=False)
    parts = [list(data.batches(share=Share.even(h, hosts))) for h in range(hosts)]
    assert [len(part) for part in parts] == [2] * hosts
    assert sorted(number for part in parts for number in numbers(part)) == list(range(10))
    if hosts == 1:
        assert parts[0][1]['labels'][2:].tolist() == [[-1]] * 6


def test_parts_of_splits(by_place):
    assert config(by_place, split='train[:25%]').source.size('train[:25%]') == 10
    batches = list(config(by_place, split='train[10:14]', shuffle=False, repeat=False).batches())
    assert sum(batch['weights'].sum() for batch in batches) == 4


@pytest.mark.parametrize('kind', ['by_place', 'streamed'])
def test_images_of_several_labels(kind, request):
    data = config(request.getfixturevalue(kind), source={'label_feature': 'labels', 'max_labels': 3})
    batch = first(data, 1)[0]
    for number, row in zip(numbers([batch]), batch['labels'].tolist(), strict=True):
        assert row == ([number % 7, 6, -1] if number % 2 else [number % 7, -1, -1])
    with pytest.raises(UserError, match=r'bright, .* has 2 labels and MAX_LABELS = 1'):
        first(config(request.getfixturevalue(kind), source={'label_feature': 'labels'}), 5)


def test_fingerprint(by_place, streamed):
    identity = config(by_place).fingerprint()
    assert json.loads(json.dumps(identity)) == identity
    assert identity['source'] == 'bright/1.0.0' and by_place not in json.dumps(identity)
    others = [config(by_place, split='train[:50%]'), config(by_place, split='test'), config(streamed)]
    assert len({json.dumps(other.fingerprint()) for other in [config(by_place), *others]}) == 4


def test_mistakes(by_place, tmp_path):
    with pytest.raises(UserError, match=r"bright has no split 'validation': set it to one of .*test.*train"):
        config(by_place, split='validation').batches()
    with pytest.raises(UserError, match=r"TFDS_NAME = 'brihgt' is neither known to TFDS .* nor prepared in"):
        DatasetConfig(TfdsImages('brihgt', by_place), CentralCropPreprocessing(), 'train', 8).batches()
    with pytest.raises(
        UserError, match=r'cifar10/3\.0\.2 is not prepared in .*: run `tfds build cifar10 --file_format=array'
    ):
        DatasetConfig(TfdsImages('cifar10', str(tmp_path)), CentralCropPreprocessing(), 'train', 8).batches()
    with pytest.raises(UserError, match=r"label_feature = 'class' is not a feature of bright"):
        config(by_place, source={'label_feature': 'class'}).num_classes  # noqa: B018
    with pytest.raises(UserError, match=r"label_feature = 'number' of bright is not a class label"):
        config(by_place, source={'label_feature': 'number'}).num_classes  # noqa: B018


def test_a_damaged_file_is_named(tmp_path):
    prepare(tmp_path, 'tfrecord')
    file = next((tmp_path / 'bright' / '1.0.0').glob('*train.tfrecord*'))
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(UserError, match='bright cannot be read'):
        list(config(str(tmp_path), repeat=False, shuffle=False).batches())


def test_reading_is_quiet_and_leaves_accelerators_alone(by_place):
    program = f"""
from upcycle.data.images import *
data = DatasetConfig(TfdsImages('bright', {by_place!r}), InceptionPreprocessing(8), 'train', 8)
assert next(data.batches())['image'].shape == (8, 8, 8, 3)
import sys
import tensorflow as tf
assert not tf.config.get_visible_devices('GPU') and not tf.config.get_visible_devices('TPU')
assert 'keras' not in sys.modules
tf.keras.layers.Dense
"""
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
    result = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
