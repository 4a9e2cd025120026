"""The user's text files: SentencePiece, splits and error messages."""

import itertools

import numpy as np
import pytest

from upcycle.data import corpus, tensorflow_quiet
from upcycle.data.text import DatasetConfig, TextFiles
from upcycle.errors import UserError

seqio = tensorflow_quiet.seqio()

SENTENCES = ['The quick brown fox jumps over the lazy dog.', 'Pack my box with five dozen jugs.', 'Sphinx of quartz.']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('files')
    for i in range(6):
        lines = np.random.default_rng(i).choice(SENTENCES, 60)
        (folder / f'{i}.txt').write_text('\n'.join(lines))
    return folder


def train_sentencepiece(folder, name, **special):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / '0.txt'), model_prefix=str(folder / name), vocab_size=40, minloglevel=2, **special
    )
    return str(folder / f'{name}.model')


@pytest.fixture(scope='module')
def model(folder):
    return train_sentencepiece(folder, 't5_like', pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def config(files, split='train', **kwargs):
    return DatasetConfig('text_files_span_corruption', {'inputs': 32, 'targets': 9}, split, 4, source=files, **kwargs)


def first_batch(source):
    return next(source.batches())


def test_sentencepiece(folder, model):
    source = config(TextFiles(str(folder / '*.txt'), vocabulary=model))
    assert source.vocabulary_size == 140
    identity = source.fingerprint()['vocabulary']
    assert identity['size'] == 140 and len(identity['sha256']) == 64
    batch = first_batch(source)
    assert batch['encoder_input_tokens'].max() == 139
    text = source.vocabulary.decode(batch['encoder_input_tokens'][0][5:15].tolist())
    assert set(text) - {' ', '⁇'} <= set(''.join(SENTENCES))
    tokens = source.task.source.corpus.tokens
    assert tokens.dtype == np.uint16 and (tokens == 1).sum() == 6
    expected = [t for line in (folder / '0.txt').read_text().split('\n') for t in source.vocabulary.encode(line)]
    names = sorted(p.name for p in folder.glob('*.txt'))
    splits = corpus.split_by_hash(names)
    first, _ = source.task.source.corpus.splits[splits['0.txt']]
    np.testing.assert_array_equal(tokens[first : first + len(expected)], expected)


def test_separate_validation_files(folder):
    source = config(TextFiles([str(folder / '[0-3].txt')], str(folder / '[45].txt')), 'validation', repeat=False)
    first, size = source.task.source.corpus.splits['validation']
    tokens = source.task.source.corpus.tokens[first : first + size]
    held_out = source.vocabulary.decode(tokens[tokens != 1].tolist())
    assert held_out == ''.join((folder / name).read_text() for name in ('4.txt', '5.txt'))


def test_equal_files_share_one_task(folder):
    files = TextFiles(str(folder / '*.txt'))
    assert config(files).task is config(TextFiles([str(folder / '*.txt')]), 'validation').task


def test_splits_go_by_each_name_alone():
    names = [f'{i}/{i}.txt' for i in range(2000)]
    splits = corpus.split_by_hash(names)
    assert 60 < list(splits.values()).count('validation') < 140
    assert corpus.split_by_hash(names[500:]).items() <= splits.items()
    assert sorted(corpus.split_by_hash(['a', 'b', 'c']).values()) == ['train', 'train', 'validation']
    assert corpus.split_by_hash(['a']) == {'a': 'train'}


def test_names_are_relative_to_the_shared_folder():
    assert corpus.relative_names(['/a/b/c.txt', '/a/bb/c.txt']) == ['b/c.txt', 'bb/c.txt']
    assert corpus.relative_names(['gs://x/y.txt']) == ['y.txt']
    assert corpus.relative_names(['y.txt', 'z/y.txt']) == ['y.txt', 'z/y.txt']


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ({'train_files': '{}/no*.txt'}, "TRAIN_FILES = '{}/no*.txt' matches no file"),
        ({'train_files': None}, 'TRAIN_FILES is not set'),
        ({'train_files': []}, 'TRAIN_FILES is not set'),
        ({'train_files': '{}/*.txt', 'validation_files': '{}/no'}, "VALIDATION_FILES = '{}/no' matches no file"),
        ({'train_files': '{}/*.txt', 'validation_files': '{}/1.txt'}, '{}/1.txt is matched by TRAIN_FILES and by'),
        ({'train_files': '{}/*.txt', 'vocabulary': '{}/no.model'}, "SENTENCEPIECE_MODEL = '{}/no.model' cannot be"),
        ({'train_files': '{}/*.txt', 'vocabulary': '{}/0.txt'}, "SENTENCEPIECE_MODEL = '{}/0.txt' cannot be loaded"),
        ({'train_files': '{}/0.txt', 'validation_files': '{}/latin.bin'}, '{}/latin.bin, line 3 is not UTF-8'),
    ],
)
def test_mistakes_name_the_file(folder, files, message):
    (folder / 'latin.bin').write_bytes(b'one\ntwo\ncaf\xe9\n')
    files = {k: v.replace('{}', str(folder)) if isinstance(v, str) else v for k, v in files.items()}
    with pytest.raises(UserError) as error:
        first_batch(config(TextFiles(**files)))
    assert message.replace('{}', str(folder)) in str(error.value) and '\n' not in str(error.value)


def test_a_model_with_other_special_ids_is_refused(folder):
    model = train_sentencepiece(folder, 'other')
    with pytest.raises(UserError, match='has pad id -1 and EOS id 2 where T5 has 0 and 1'):
        config(TextFiles(str(folder / '*.txt'), vocabulary=model)).fingerprint()


def test_one_file_has_no_validation(folder):
    source = config(TextFiles(str(folder / '0.txt')))
    assert len(list(itertools.islice(source.batches(), 3))) == 3
    with pytest.raises(UserError, match="'validation' is empty .* set VALIDATION_FILES, or give TRAIN_FILES several"):
        config(TextFiles(str(folder / '0.txt')), 'validation').batches()
