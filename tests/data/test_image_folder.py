"""The user's images: listing, splitting, reading and error messages."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from upcycle.data import Share
from upcycle.data.image_folder import ImageFolder
from upcycle.data.images import CentralCropPreprocessing, DatasetConfig
from upcycle.errors import UserError

COLOURS = {'blue': (0, 0, 255), 'green': (0, 255, 0), 'red': (255, 0, 0)}


@pytest.fixture
def folder(tmp_path):
    """train/ with 3 x 8 images of one colour each, in several formats and depths; validation/ with 3 x 2."""
    for split, n in (('train', 8), ('validation', 2)):
        for name, colour in COLOURS.items():
            for i in range(n):
                path = (
                    tmp_path / split / name / ('deeper' if i % 2 else '') / f'{i}.{("png", "JPG", "bmp", "gif")[i % 4]}'
                )
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new('RGB', (12 + i, 10), colour).save(path)
    (tmp_path / 'train' / 'red' / '.DS_Store').write_bytes(b'?')
    (tmp_path / 'train' / 'Thumbs.db').write_bytes(b'?')
    return tmp_path


def source(folder):
    return ImageFolder(str(folder / 'train'), str(folder / 'validation'))


def config(source, **changes):
    settings = {'preprocessing': CentralCropPreprocessing(8, resize_small=8), 'split': 'train', 'batch_size': 6}
    return DatasetConfig(source, **settings | changes)


def labels_by_colour(batch):
    return (batch['image'].mean(axis=(1, 2)) < 0).argmin(axis=-1)


def test_classes_are_the_folders_in_alphabetical_order(folder):
    data = config(source(folder))
    assert (data.num_classes, data.image_shape) == (3, (8, 8, 3))
    batches = list(itertools.islice(data.batches(), 4))
    for batch in batches:
        np.testing.assert_array_equal(batch['labels'][:, 0], 2 - labels_by_colour(batch))
    np.testing.assert_array_equal(np.bincount(np.concatenate([b['labels'][:, 0] for b in batches])), [8, 8, 8])


def test_any_start_and_hosts_and_one_pass_of_validation(folder):
    data = config(source(folder))
    whole = list(itertools.islice(data.batches(), 5))
    for start, hosts in ((0, 2), (3, 3)):
        parts = [list(itertools.islice(data.batches(start, Share.even(h, hosts)), 5 - start)) for h in range(hosts)]
        for b, batch in enumerate(whole[start:]):
            for name in batch:
                np.testing.assert_array_equal(np.concatenate([part[b][name] for part in parts]), batch[name])
    validation = list(config(source(folder), split='validation', shuffle=False, repeat=False, batch_size=4).batches())
    assert [batch['weights'].tolist() for batch in validation] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert validation[1]['labels'].tolist() == [[2], [2], [-1], [-1]]


def test_without_a_validation_folder_some_images_are_held_out(folder):
    for i in range(60):
        Image.new('RGB', (8, 8)).save(folder / 'train' / 'red' / f'more{i}.png')
    held_out = ImageFolder(str(folder / 'train'))
    assert held_out.size('train') + held_out.size('validation') == 84
    assert 1 <= held_out.size('validation') <= 10


def test_fingerprint_is_of_names_and_sizes_not_of_the_place(folder, tmp_path_factory):
    identity = config(source(folder)).fingerprint()
    assert json.loads(json.dumps(identity)) == identity and str(folder) not in json.dumps(identity)
    moved = tmp_path_factory.mktemp('elsewhere') / 'copy'
    shutil.copytree(folder, moved)
    assert config(source(moved)).fingerprint() == identity
    other = tmp_path_factory.mktemp('other') / 'copy'
    shutil.copytree(folder, other)
    Image.new('RGB', (40, 40)).save(other / 'train' / 'red' / '0.png')
    assert config(source(other)).fingerprint()['files_sha256'] != identity['files_sha256']
    assert config(source(folder), split='validation').fingerprint()['files_sha256'] != identity['files_sha256']


def test_a_corrupt_image_is_named(folder):
    bad = folder / 'train' / 'green' / '4.png'
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(UserError, match=r'train/green/4\.png cannot be decoded'):
        list(config(source(folder), repeat=False).batches())


def test_a_file_that_vanishes_is_named(folder):
    data = source(folder)
    data.size('train')
    (folder / 'train' / 'green' / '4.png').unlink()
    with pytest.raises(UserError, match=r'train/green/4\.png cannot be read \(No such file'):
        list(config(data, repeat=False).batches())


def test_a_dangling_link_is_named(folder):
    os.symlink(folder / 'nowhere.png', folder / 'train' / 'red' / 'link.png')
    with pytest.raises(UserError, match=r'red/link\.png cannot be read'):
        source(folder).size('train')


def mistakes():
    def empty_class(folder):
        (folder / 'train' / 'yellow').mkdir()

    def lacking(folder):
        shutil.rmtree(folder / 'validation' / 'blue')

    def additional(folder):
        shutil.copytree(folder / 'validation' / 'blue', folder / 'validation' / 'azure')

    def loose(folder):
        shutil.copy(folder / 'train' / 'red' / '0.png', folder / 'train')

    def text(folder):
        (folder / 'train' / 'red' / 'notes.txt').write_text('?')

    def nothing(folder):
        shutil.rmtree(folder / 'train')
        (folder / 'train').mkdir()

    def gone(folder):
        shutil.rmtree(folder / 'train')

    return {
        empty_class: 'train/yellow contains no images',
        lacking: r'train/blue is a class that .*/validation lacks',
        additional: r'validation/azure is a class that .*/train lacks',
        loose: r'train/0\.png is not in a class folder',
        text: r'red/notes\.txt does not have an image extension',
        nothing: "TRAIN_FOLDER = '.*train' contains no folders",
        gone: "TRAIN_FOLDER = '.*train' is not a folder",
    }


@pytest.mark.parametrize(('damage', 'message'), mistakes().items(), ids=lambda value: getattr(value, '__name__', ''))
def test_mistakes_are_one_sentence(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        config(source(folder)).batches()


def test_unbound_and_remote_folders():
    with pytest.raises(UserError, match='TRAIN_FOLDER is not set'):
        config(ImageFolder(None)).batches()
    with pytest.raises(UserError, match='is not a local folder'):
        config(ImageFolder('gs://bucket/train')).batches()
