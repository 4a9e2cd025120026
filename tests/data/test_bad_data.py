"""Broken, missing or short data is named, counted and limited; the order is the same on any number of hosts."""

import dataclasses
import itertools
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests import runs
from tests.data.test_tfds_images import by_place, config, numbers, prepare, streamed  # noqa: F401  fixtures
from upcycle.data import WHOLE, Share, images, tensorflow_quiet, text
from upcycle.data.synthetic import SyntheticImages
from upcycle.errors import UserError
from upcycle.metrics import read_metrics
from upcycle.training import loop
from upcycle.training.start import Start

seqio = tensorflow_quiet.seqio()


def image_files(folder, n=12, broken=()):
    """Images identified by their brightness; the broken ones are truncated."""
    for i in range(n):
        path = folder / 'train' / ('even', 'odd')[i % 2] / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (20, 20), (20 * i, 20 * i, 20 * i)).save(path)
        if i in broken:
            path.write_bytes(path.read_bytes()[:-30])
    return images.ImageFolder(str(folder / 'train'), str(folder / 'train'))


def image_data(source, **changes):
    preprocessing = images.InceptionPreprocessing(8, area_range=(0.5, 1.0))
    return images.DatasetConfig(source, preprocessing, **{'split': 'train', 'batch_size': 4, **changes})


def take(data, n, start=0):
    return list(itertools.islice(data.batches(start), n))


def test_images_that_cannot_be_decoded_are_left_out_up_to_the_bound(tmp_path, capsys):
    whole = take(image_data(image_files(tmp_path)), 6)
    source = image_files(tmp_path, broken={3, 8})
    data = image_data(source, max_bad_records=2)
    batches = take(data, 6)
    left_out = 0
    for batch, before in zip(batches, whole, strict=True):
        good = batch['weights'] > 0
        left_out += (~good).sum()
        # The other rows are unchanged, crop and flip included.
        for name in batch:
            np.testing.assert_array_equal(batch[name][good], before[name][good])
        assert (batch['image'][~good] == 0).all() and (batch['labels'][~good] == -1).all()
    # Twice in two epochs; counted once.
    assert left_out == 4
    err = capsys.readouterr().err.splitlines()
    assert [line.split(' is skipped: ')[0] for line in err] == [f'warning: bad record {i} of at most 2' for i in (1, 2)]
    assert {re.search(r'train/\w+/(\d+)\.png cannot be decoded', line)[1] for line in err} == {'03', '08'}
    with pytest.raises(
        UserError, match=r'^2 bad records are more than MAX_BAD_RECORDS = 1; the last one: .*\.png cannot'
    ):
        take(image_data(source, max_bad_records=1), 6)
    with pytest.raises(UserError, match=r'\.png cannot be decoded .*, or raise MAX_BAD_RECORDS\.$'):
        take(image_data(source), 6)


def test_a_streamed_image_that_cannot_be_decoded_is_left_out(streamed, monkeypatch):  # noqa: F811
    undecoded = images.TfdsImages._undecoded

    def cut(self, names, examples):
        undecoded_images, labels = undecoded(self, names, examples)
        return [
            image._replace(content=b'') if labels[i] == 6 else image for i, image in enumerate(undecoded_images)
        ], labels

    monkeypatch.setattr(images.TfdsImages, '_undecoded', cut)
    data = config(streamed, repeat=False, shuffle=False, max_bad_records=5)
    assert sorted(numbers(data.batches())) == [i for i in range(40) if i % 7 != 6]


def text_files(folder, broken=()):
    """Documents of numbered lines; the broken lines are Latin-1."""
    for i in range(4):
        lines = [
            f'document {i}, line {n}: café'.encode('latin-1' if (i, n) in broken else 'utf-8') for n in range(1, 40)
        ]
        (folder / f'{i}.txt').write_bytes(b'\n'.join(lines))
    return {'train_files': str(folder / '[0-2].txt'), 'validation_files': str(folder / '3.txt')}


def text_data(files, **changes):
    settings = {'split': 'train', 'batch_size': 4, 'source': text.TextFiles(**files)}
    return text.DatasetConfig('text_files_span_corruption', {'inputs': 32, 'targets': 9}, **settings | changes)


def tokens(data):
    return data.task.source.corpus.tokens


def test_lines_that_are_not_utf8_are_left_out_up_to_the_bound(tmp_path, capsys):
    files = text_files(tmp_path, broken={(1, 3), (1, 39)})
    skipped = tokens(text_data({**files, 'max_bad_records': 2}))
    err = capsys.readouterr().err.splitlines()
    assert [
        re.search(r'bad record (\d) of at most 2 .*1\.txt, line (\d+) is not UTF-8', line).groups() for line in err
    ] == [
        ('1', '3'),
        ('2', '39'),
    ]
    with pytest.raises(
        UserError, match=r'2 bad records are more than MAX_BAD_RECORDS = 1; .*1\.txt, line 39 is not UTF-8'
    ):
        tokens(text_data({**files, 'max_bad_records': 1}))
    with pytest.raises(UserError, match=r'1\.txt, line 3 is not UTF-8: .* raise MAX_BAD_RECORDS\.$'):
        tokens(text_data(files))
    # The same as without these lines in the file.
    path = tmp_path / '1.txt'
    path.write_bytes(b'\n'.join(line for line in path.read_bytes().split(b'\n') if b'\xe9' not in line))
    (tmp_path / '4.txt').write_text('')  # another glob, so that the files are read again
    np.testing.assert_array_equal(tokens(text_data({**files, 'train_files': str(tmp_path / '[0-2]*.txt')})), skipped)


@pytest.mark.parametrize('damage', ['empty', 'cut off', 'flipped', 'missing'])
@pytest.mark.parametrize('file_format', ['tfrecord', 'array_record'])
def test_a_damaged_shard_is_one_sentence_and_never_a_shorter_epoch(file_format, damage, request, tmp_path):
    prepared = request.getfixturevalue('streamed' if file_format == 'tfrecord' else 'by_place')
    shutil.copytree(prepared, tmp_path / 'data')
    file = next((tmp_path / 'data').rglob(f'*train.{file_format}-00001*'))
    content = file.read_bytes()
    middle = len(content) // 2
    file.unlink()
    if damage != 'missing':
        file.write_bytes(
            {'empty': b'', 'cut off': content[:middle], 'flipped': content[:middle] + bytes(8) + content[middle + 8 :]}[
                damage
            ]
        )
    for repeat in (False, True):
        with pytest.raises(UserError, match=r'^bright(, train,)? cannot be read \(') as error:
            take(config(str(tmp_path / 'data'), repeat=repeat, shuffle=False), 6)
        assert '\n' not in str(error.value) and '{{' not in str(error.value)


def test_a_host_without_examples_is_told(streamed):  # noqa: F811
    data = config(streamed, split='train[:2]', batch_size=4)
    with pytest.raises(UserError, match='no examples for reader 3 of 4'):
        next(data.batches(share=Share.even(3, 4)))
    one_pass = dataclasses.replace(data, repeat=False)
    assert [len(numbers(one_pass.batches(share=Share.even(i, 4)))) for i in range(4)] == [1, 1, 0, 0]


def test_a_training_source_that_ends_stops_the_run(tmp_path):
    run = runs.build('vit dense', tmp_path, 6, EVAL_PERIOD=100, **{'train/images.DatasetConfig.num_batches': 3})
    run = dataclasses.replace(run, checkpoint_period=3, log_period=3)
    with pytest.raises(UserError, match='TRAIN_DATASET ends after 3 batches, and TRAIN_STEPS = 6 needs more'):
        loop.train(Start.of(run))
    # The batch that is missing is looked for during step 3, which is logged and saved all the same.
    assert read_metrics(tmp_path / 'metrics.jsonl')[-1]['step'] == 3
    assert (tmp_path / 'checkpoints' / '3').is_dir()


def test_a_missing_file_of_a_seqio_task_is_one_sentence(tmp_path):
    name = 'upcycle_test_missing_file'
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=0))
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.TextLineDataSource({'train': str(tmp_path / 'gone.txt')}),
        preprocessors=[
            lambda dataset: dataset.map(lambda line: {'inputs': line, 'targets': line}),
            seqio.preprocessors.tokenize,
        ],
        output_features={'inputs': feature, 'targets': feature},
    )
    with pytest.raises(UserError, match=rf'{name} cannot be read \(.*gone\.txt'):
        next(text.DatasetConfig(name, {'inputs': 16, 'targets': 16}, 'train', 2).batches())


def sources(tmp_path, array_record):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'text').mkdir()
    return {
        'text files': text_data(text_files(tmp_path / 'text'), batch_size=12),
        'image files': image_data(image_files(tmp_path / 'images', 18), batch_size=12),
        'array_record': config(array_record, batch_size=12),
        'mnist5k': images.DatasetConfig(images.Mnist5k(), images.ScanAugmentation(), 'train', 12),
        'synthetic': SyntheticImages(8, 3, 5, batch_size=12),
    }


# Three hosts, one, four, two that each read two parts of a batch, and four in groups, one of them in the middle.
LEGS = (
    [Share.even(i, 3) for i in range(3)],
    [WHOLE],
    [Share(0, 2, (0, 2), 4), Share(1, 2, (1, 3), 4)],
    [Share(0, 2, (0, 3), 4), Share(1, 2, (1, 2), 4)],
)


def test_the_order_is_the_same_when_the_number_of_hosts_changes(tmp_path, by_place):  # noqa: F811
    """Batches 0 to 11 of a run that changes its hosts after every third batch, across epochs."""
    for name, data in sources(tmp_path, by_place).items():
        assert 'is a pure function of' in data.promise()
        whole = take(data, 12)
        for leg, shares in enumerate(LEGS):
            for share in shares:
                own = np.concatenate([np.arange(run.start, run.stop) for run in share.rows(12)])
                read = itertools.islice(data.batches(3 * leg, share), 3)
                for number, (batch, expected) in enumerate(zip(read, whole[3 * leg : 3 * leg + 3], strict=True)):
                    for feature, rows in expected.items():
                        message = f'{name}, batch {3 * leg + number}, {share}'
                        np.testing.assert_array_equal(batch[feature], rows[own], err_msg=message)


def test_a_stream_says_what_it_can_promise(streamed):  # noqa: F811
    assert 'the same number of readers' in config(streamed).promise()
