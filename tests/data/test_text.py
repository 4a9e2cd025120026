"""Batches are a pure function of (seed, b), for any start, number of hosts and pipeline."""

import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from upcycle.data import WHOLE, DataSource, Share, tensorflow_quiet
from upcycle.data.text import DatasetConfig, TextFiles
from upcycle.errors import UserError

tf = tensorflow_quiet.tensorflow()
seqio = tensorflow_quiet.seqio()

LENGTHS = {'inputs': 32, 'targets': 9}


def words(seed, count):
    return ' '.join(str(n) for n in np.random.default_rng(seed).integers(10**6, size=count))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(12):
        (folder / f'{i}.txt').write_text(words(i, 100))
    return TextFiles(str(folder / '*.txt'))


@pytest.fixture(scope='module')
def train(files):
    return DatasetConfig('text_files_span_corruption', LENGTHS, 'train', 8, source=files)


@pytest.fixture(scope='module')
def validation(train):
    return dataclasses.replace(train, split='validation', shuffle=False, repeat=False)


def take(source, count, start=0, share=WHOLE):
    return list(itertools.islice(source.batches(start, share), count))


def assert_equal(left, right):
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def decoded_text(batch, row, vocabulary):
    """The chunk that a row was made from."""
    sentinels = vocabulary.vocab_size - vocabulary.extra_ids
    spans, sentinel = {}, None
    for token in batch['decoder_target_tokens'][row].tolist():
        if token >= sentinels:
            spans[sentinel := token] = []
        elif token > 1 or (token == 1 and sentinel is not None):
            spans[sentinel].append(token)
    ids = [t for token in batch['encoder_input_tokens'][row].tolist() for t in spans.get(token, [token])]
    return vocabulary.decode([i for i in ids if i > 1])


def test_it_is_a_data_source_with_the_shapes_it_says(train):
    assert isinstance(train, DataSource)
    (batch,) = take(train, 1)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == train.batch_spec()
    assert (batch['encoder_input_tokens'] != 0).all(), 'inputs are filled exactly'
    assert (batch['encoder_input_tokens'][:, -1] == 1).all(), 'and end in EOS'
    shifted = np.pad(batch['decoder_target_tokens'], [(0, 0), (1, 0)])[:, :-1]
    real = batch['decoder_target_tokens'] != 0
    np.testing.assert_array_equal(batch['decoder_input_tokens'], shifted * real)
    np.testing.assert_array_equal(batch['decoder_loss_weights'], real)


def test_batches_depend_on_the_seed_and_nothing_else(train):
    assert_equal(take(train, 3), take(dataclasses.replace(train), 3))
    (other,) = take(dataclasses.replace(train, seed=1), 1)
    assert (other['encoder_input_tokens'] != take(train, 1)[0]['encoder_input_tokens']).any()


def test_a_start_equals_a_skip_through_several_epochs(train):
    batches = take(train, 100)
    for start in (1, 23, 24, 57, 98):
        assert_equal(take(train, 2, start), batches[start : start + 2])


@pytest.mark.parametrize('hosts', [2, 4])
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_any_number_of_hosts_gives_the_same_global_batches(train, validation, split, hosts):
    source = {'train': train, 'validation': validation}[split]
    parts = [take(source, 40, 1, share=Share.even(i, hosts)) for i in range(hosts)]
    together = [{name: np.concatenate([p[name] for p in row]) for name in row[0]} for row in zip(*parts, strict=True)]
    assert_equal(together, take(source, 40, 1))


def test_an_epoch_visits_every_chunk_once_and_epochs_differ(train):
    chunks = train._chunks_per_epoch()
    batches = take(train, 2 * chunks // 8 + 1)
    texts = [decoded_text(batch, row, train.vocabulary) for batch in batches for row in range(8)]
    first, second = texts[:chunks], texts[chunks : 2 * chunks]
    assert len(set(first)) == len(first)
    assert len(set(second)) == len(second)
    assert len(set(first) & set(second)) < chunks / 2, 'another phase cuts the text elsewhere'


def test_validation_is_the_corpus_in_order_and_its_last_batch_is_padded(validation):
    batches = take(validation, None)
    chunks = validation._chunks_per_epoch()
    assert len(batches) == -(-chunks // 8) and chunks % 8, 'the test wants a short last batch'
    for value in batches[-1].values():
        assert value.shape[0] == 8
        assert not value[chunks % 8 :].any()
        assert value[: chunks % 8].any(axis=1).all()
    text = ''.join(decoded_text(batch, row, validation.vocabulary) for batch in batches for row in range(8))
    tokens, splits = validation.task.source.corpus.tokens, validation.task.source.corpus.splits
    first, size = splits['validation']
    expected = validation.vocabulary.decode([t for t in tokens[first : first + size].tolist() if t > 1])
    assert expected.startswith(text) and len(expected) - len(text) < 40


def test_a_bounded_evaluation_stops_where_it_says(validation):
    bounded = dataclasses.replace(validation, num_batches=2)
    assert_equal(take(bounded, None), take(validation, 2))
    assert_equal(take(bounded, None, 1), take(validation, 2)[1:])
    assert take(bounded, None, 2) == []
    assert len(take(dataclasses.replace(validation, num_batches=2, repeat=True), None)) == 2
    unbounded = take(dataclasses.replace(validation, num_batches=1000), None)
    assert len(unbounded) == len(take(validation, None))


def test_no_text_is_in_both_splits(train, validation):
    task = train.task
    chunks = {}
    for split in ('train', 'validation'):
        first, size = task.source.corpus.splits[split]
        chunks[split] = task.source.corpus.tokens[first : first + size].tobytes()
    assert chunks['validation'] and chunks['train']
    window = chunks['validation'][100:180]
    assert window in chunks['validation'] and window not in chunks['train']


def test_writing_segments_equals_packing_with_seqio(train):
    one = dataclasses.replace(train, repeat=False)
    examples = one.task.preprocess_postcache(
        one.task.source.request('train', shuffle=True, seed=0), sequence_length=LENGTHS
    )
    packed = seqio.EncDecFeatureConverter(pack=True)(examples, LENGTHS).batch(8).take(5)
    theirs = [
        {**b, 'decoder_loss_weights': b['decoder_loss_weights'].astype(np.float32)} for b in packed.as_numpy_iterator()
    ]
    ours = take(one, 5)
    assert_equal([{name: batch[name] for name in ours[0]} for batch in theirs], ours)


def test_unpacked_has_no_segments(train):
    unpacked = dataclasses.replace(train, pack=False)
    (batch,), (packed,) = take(unpacked, 1), take(train, 1)
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == unpacked.batch_spec()
    assert_equal(
        [batch], [{name: packed[name] for name in batch} | {'decoder_input_tokens': batch['decoder_input_tokens']}]
    )


def test_fingerprint_names_what_changes_the_batches_and_only_that(train, validation, tmp_path):
    fingerprint = train.fingerprint()
    assert json.loads(json.dumps(fingerprint)) == fingerprint
    assert dataclasses.replace(train).fingerprint() == fingerprint
    for change in ({'seed': 1}, {'batch_size': 4}, {'task_feature_lengths': {'inputs': 32, 'targets': 10}}):
        assert dataclasses.replace(train, **change).fingerprint() != fingerprint
    assert validation.fingerprint() != fingerprint

    def corpus_of(folder, last):
        folder.mkdir()
        for i in range(4):
            (folder / f'{i}.txt').write_text(words(i, 100) + (last if i == 3 else ''))
        return dataclasses.replace(train, source=TextFiles(str(folder / '*.txt'))).fingerprint()

    one, moved, changed = (corpus_of(tmp_path / n, last) for n, last in (('a', '.'), ('b', '.'), ('c', '!')))
    assert one == moved
    assert one['corpus_sha256'] != changed['corpus_sha256']


def test_the_standard_library_as_an_ordinary_seqio_task():
    from upcycle.data import embedded

    task = seqio.get_mixture_or_task('stdlib_span_corruption')
    lengths = {'inputs': 114, 'targets': 30}

    def examples(split, **kwargs):
        return list(task.get_dataset(lengths, split=split, seed=0, **kwargs).take(4).as_numpy_iterator())

    for split in ('train', 'validation'):
        for example in examples(split):
            assert (len(example['inputs']), len(example['targets'])) == (114, 26)
            assert (example['inputs'][-1], example['targets'][-1]) == (1, 1)
    assert_equal(examples('train'), examples('train'))
    assert_equal(examples('train')[1::2], examples('train', shard_info=seqio.ShardInfo(1, 2))[:2])
    source = DatasetConfig(task.name, lengths, 'train', 4, module='upcycle.data.embedded')
    (batch,) = take(source, 1)
    np.testing.assert_array_equal(batch['encoder_input_tokens'], [e['inputs'] for e in examples('train')])
    assert source.vocabulary_size == 359

    splits = {}
    for document in embedded.stdlib_documents():
        splits.setdefault(document.split, {})[document.name] = document.content
    assert not splits['train'].keys() & splits['validation'].keys()
    assert sum(map(len, splits['train'].values())) > 4e6
    assert 0.01 < len(splits['validation']) / len(splits['train']) < 0.12


def test_an_epoch_of_the_seqio_task_ends_and_repeats_differ(train):
    def texts(num_epochs):
        dataset = train.task.get_dataset(LENGTHS, split='train', seed=0, num_epochs=num_epochs)
        return [example['inputs'].tobytes() for example in dataset.as_numpy_iterator()]

    once, twice = texts(1), texts(2)
    assert len(once) == train._chunks_per_epoch() and len(twice) == 2 * len(once)
    assert twice[: len(once)] == once and twice[len(once) :] != once


@pytest.fixture(scope='module')
def streamed():
    def dataset_fn(split, shuffle_files, seed=None):
        del shuffle_files, seed
        return tf.data.Dataset.range({'train': 50, 'validation': 10}[split]).map(
            lambda i: {'inputs': tf.strings.as_string(i), 'targets': tf.strings.as_string(i * i)}
        )

    name = 'upcycle_test_short_examples'
    feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=0))
    seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset_fn, splits=('train', 'validation')),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={'inputs': feature, 'targets': feature},
    )
    return DatasetConfig(name, {'inputs': 16, 'targets': 24}, 'train', 2)


def test_a_streamed_task_is_packed_and_replayed(streamed):
    batches = take(streamed, 12)
    assert {name: (value.shape, value.dtype) for name, value in batches[0].items()} == streamed.batch_spec()
    assert batches[0]['encoder_segment_ids'].max() > 1
    assert_equal(take(streamed, 2, 9), batches[9:11])
    assert 'replays' in streamed.promise()
    assert 'corpus_sha256' not in streamed.fingerprint()


def test_a_streamed_evaluation_ends_and_hosts_end_together(streamed):
    evaluation = dataclasses.replace(
        streamed, split='validation', shuffle=False, repeat=False, pack=False, batch_size=4
    )
    batches = take(evaluation, None)
    assert [int((b['decoder_loss_weights'].sum(axis=1) > 0).sum()) for b in batches] == [4, 4, 2]
    with pytest.raises(UserError, match='set EVAL_STEPS'):
        evaluation.batches(share=Share.even(0, 4))
    bounded = dataclasses.replace(evaluation, num_batches=5)
    parts = [take(bounded, None, share=Share.even(i, 4)) for i in range(4)]
    assert [len(part) for part in parts] == [5] * 4
    assert sum((b['decoder_loss_weights'].sum(axis=1) > 0).sum() for part in parts for b in part) == 10
    assert len(take(bounded, None)) == 3
    # A stream is dealt out to readers, independently of their rows, and one reader may be several hosts.
    assert_equal(take(bounded, None, share=Share(0, 2, (0, 3), 4)), take(bounded, None, share=Share.even(0, 2)))
    assert_equal(take(evaluation, None, share=Share(0, 1, (0, 1), 2)), batches)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'source': None, 'mixture_or_task_name': 'stdlib_span_coruption'},
            "'stdlib_span_coruption' is not registered",
        ),
        ({'source': None, 'module': 'no.such.module'}, "MIXTURE_OR_TASK_MODULE = 'no.such.module' cannot be imported"),
        ({'source': None, 'task_feature_lengths': {'inputs': 32}}, "both 'inputs' and 'targets'"),
        ({'split': 'test'}, "no split 'test'"),
        ({'task_feature_lengths': {'inputs': 32, 'targets': 7}}, "set 'targets' to 8 or more"),
        ({'task_feature_lengths': {'inputs': 400, 'targets': 400}, 'split': 'validation'}, 'give it more text'),
    ],
)
def test_mistakes_are_one_sentence(train, change, message):
    with pytest.raises(UserError) as error:
        dataclasses.replace(train, **change).batches()
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_batch_must_divide_among_the_hosts(train):
    with pytest.raises(UserError, match='BATCH_SIZE = 8 is not divisible by the 3 parts'):
        train.batches(share=Share.even(0, 3))


def test_silence_and_cheap_import():
    program = """
import sys
import upcycle.data, upcycle.data.text
assert not {'tensorflow', 'seqio', 'jax'} & set(sys.modules), 'importing upcycle.data.text must be cheap'
source = upcycle.data.text.DatasetConfig(
    'stdlib_span_corruption', {'inputs': 32, 'targets': 9}, 'train', 4, module='upcycle.data.embedded')
evaluation = upcycle.data.text.DatasetConfig(
    'stdlib_span_corruption', {'inputs': 32, 'targets': 9}, 'validation', 4, module='upcycle.data.embedded',
    repeat=False, num_batches=3)
next(source.batches()), list(evaluation.batches()), source.fingerprint()
"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, '', '')
