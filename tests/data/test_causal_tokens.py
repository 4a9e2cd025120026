"""Packed documents: rows against plain Python, and the same global batches for any hosts, start and resume."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest

from tests.tokens import TEXTS
from upcycle.commands import tokenize
from upcycle.data import DataSource, Share
from upcycle.data.causal import Shards, StdlibBytes, Tokens
from upcycle.data.causal.shards import Arrays, Corpus
from upcycle.data.causal.tokenizers import ByteTokenizer, Identity
from upcycle.errors import UserError

LENGTH = 8


def documents(seed, count, longest=20):
    """Random documents, of ids that tell them apart."""
    rng = np.random.default_rng(seed)
    return [(1000 * (i + 1) + np.arange(rng.integers(1, longest))).astype(np.uint32) for i in range(count)]


def corpus_of(parts, loss=False, chat=False):
    """The corpus of shards, each a list of documents."""
    arrays = [
        Arrays(
            np.concatenate(part),
            np.cumsum([len(d) for d in part]),
            (np.concatenate(part) % 3 == 0).astype(np.uint8) if loss else None,
        )
        for part in parts
    ]
    return Corpus(arrays, 100, str(len(parts)), chat)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Corpora in memory as a source."""

    found: tuple
    weights: tuple = (1.0,)
    bos: bool = True

    @property
    def names(self):
        return ('memory',) * len(self.found)

    def identity(self):
        return Identity('bytes', None, 10**6, bos_id=1, eos_id=2, adds_bos=self.bos)

    def tokenizer(self):
        return ByteTokenizer()

    def corpora(self, split):
        return self.found


def stream_of(docs, bos, eos, loss):
    """What plain Python makes of documents: (token, target, weight, document) of each position."""
    found = []
    for number, doc in enumerate(docs):
        tokens = [1] * bos + doc.tolist()
        targets = [*tokens[1:], 2 if eos else 0]
        weights = [float(t % 3 == 0) if loss else 1.0 for t in targets[:-1]] + [float(eos)]
        found += [(*position, number) for position in zip(tokens, targets, weights, strict=True)]
    return found


def rows_of(stream, cuts):
    for first, last in itertools.pairwise(cuts):
        row = [stream[i % len(stream)] for i in range(first, last)]
        numbers, segment = [], 0
        for i, (*_, number) in enumerate(row):
            segment += i == 0 or number != row[i - 1][3]
            numbers.append(segment)
        yield row, numbers


def check_row(row, expected, numbers):
    size = len(expected)
    for name, values in zip(('tokens', 'targets', 'loss_weights'), zip(*expected, strict=True), strict=False):
        assert row[name][:size].tolist() == list(values) and not row[name][size:].any(), name
    assert row['segment_ids'].tolist() == numbers + [0] * (LENGTH - size)


@pytest.mark.parametrize('bos', [False, True])
@pytest.mark.parametrize('eos', [False, True])
@pytest.mark.parametrize('packing', ['split', 'whole'])
def test_rows_are_those_of_plain_python(packing, bos, eos):
    docs = documents(0, 30)
    source = Memory((corpus_of([docs[:7], docs[7:8], docs[8:]], loss=eos),), bos=bos)
    data = Tokens(source, LENGTH, 'train', 4, packing=packing, shuffle=False, repeat=False, add_eos=eos)
    stream = stream_of(docs, bos, eos, loss=eos)
    if packing == 'split':
        cuts = [*range(0, len(stream), LENGTH), len(stream)]
    else:
        ends, cuts = np.cumsum([len(d) + bos for d in docs]).tolist(), [0]
        while cuts[-1] < len(stream):
            fitting = [end for end in ends if cuts[-1] < end <= cuts[-1] + LENGTH]
            cuts.append(max(fitting, default=cuts[-1] + LENGTH))
    assert len(data.rows) == len(cuts) - 1
    for number, (expected, segments) in enumerate(rows_of(stream, cuts)):
        check_row(data.rows[number], expected, segments)
    batches = list(data.batches())
    assert len(batches) == -(-(len(cuts) - 1) // 4)
    weight = sum(float(batch['loss_weights'].sum()) for batch in batches)
    assert weight == sum(weight for _, _, weight, _ in stream)
    assert sum(int(batch['mask'].sum()) for batch in batches) == len(stream)


def test_every_epoch_cuts_elsewhere_and_covers_the_stream():
    docs = documents(1, 40)
    data = Tokens(Memory((corpus_of([docs]),)), LENGTH, 'train', 4, seed=5)
    stream = stream_of(docs, True, True, False)
    place = {(token, number): i for i, (token, _, _, number) in enumerate(stream)}
    count, starts = len(stream) // LENGTH, []
    for epoch in range(3):
        firsts = []
        for i in range(epoch * count, (epoch + 1) * count):
            row = data.rows[i]
            # A BOS tells its document by its target.
            doc = max(int(row['tokens'][0]), int(row['targets'][0])) // 1000 - 1
            firsts.append(place[int(row['tokens'][0]), doc])
            expected = [stream[(firsts[-1] + j) % len(stream)] for j in range(LENGTH)]
            assert row['tokens'].tolist() == [token for token, *_ in expected]
        starts.append(firsts)
        covered = np.sort([(first + j) % len(stream) for first in firsts for j in range(LENGTH)])
        assert len(set(covered.tolist())) == count * LENGTH
        assert firsts != sorted(firsts)
    assert len({tuple(np.argsort(np.array(firsts)).tolist()) for firsts in starts}) == 3
    assert len({first % LENGTH for firsts in starts for first in firsts}) > 1


def equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])
            assert batch[name].dtype == other[name].dtype


def global_batches(data, start, count, hosts):
    """Batches that `hosts` hosts read together."""
    shares = [Share.even(i, hosts) for i in range(hosts)]
    found = [list(itertools.islice(data.batches(start, share), count)) for share in shares]
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*found, strict=True)
    ]


MIXTURE = Memory((corpus_of([documents(2, 30)[:11], documents(3, 25)]), corpus_of([documents(4, 9)])), (3.0, 1.0))


@pytest.mark.parametrize('packing', ['split', 'whole'])
def test_hosts_and_resumes_read_the_same_global_batches(packing):
    data = Tokens(MIXTURE, LENGTH, 'train', 8, seed=3, packing=packing)
    assert isinstance(data, DataSource)
    whole = list(itertools.islice(data.batches(), 20))
    assert {name: (value.shape, value.dtype) for name, value in whole[0].items()} == data.batch_spec()
    # The epochs of both corpora end within these batches.
    assert 2 * max(len(rows) for rows in data._rows) < 8 * 20
    for start, hosts in ((0, 1), (0, 2), (7, 4), (13, 2), (19, 1)):
        equal(global_batches(dataclasses.replace(data), start, 20 - start, hosts), whole[start:])
    interleaved = next(data.batches(2, Share(0, 2, (0, 2), 4)))
    np.testing.assert_array_equal(interleaved['tokens'], whole[2]['tokens'][[0, 1, 4, 5]])
    other = next(dataclasses.replace(data, seed=4).batches())
    assert not np.array_equal(other['tokens'], whole[0]['tokens'])


def test_a_finite_pass_ends_for_all_hosts_at_once():
    data = Tokens(MIXTURE.__class__(MIXTURE.found[:1]), LENGTH, 'validation', 8, repeat=False, seed=42)
    whole = list(data.batches())
    assert len(whole) == -(-len(data.rows) // 8) and len(data.rows) % 8
    equal(global_batches(data, 0, None, 4), whole)
    assert not whole[-1]['mask'][-1].any() and not whole[-1]['loss_weights'][-1].any()
    assert len(list(dataclasses.replace(data, num_batches=2).batches(1))) == 1


def test_a_mixture_has_its_shares():
    docs = documents(5, 40), documents(6, 40)
    docs = docs[0], [doc + 10**5 for doc in docs[1]]
    source = Memory(tuple(corpus_of([part]) for part in docs), (0.7, 0.3), bos=False)
    data = Tokens(source, LENGTH, 'train', 4, seed=1)
    second = np.array([data.rows[i]['tokens'][0] >= 10**5 for i in range(1000)])
    assert abs(second.mean() - 0.3) < 0.005
    assert abs(second[:50].mean() - 0.3) < 0.03


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    (folder / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS))
    tokenize.run([str(folder / 'a.jsonl')], 'bytes', str(folder / 'a'), validation=0.2, workers=1)
    return folder


def test_shards_and_their_identity(folder, tmp_path):
    data = Tokens(Shards(str(folder / 'a')), 32, 'train', 4)
    batch = next(data.batches())
    assert bytes(batch['tokens'][0][batch['tokens'][0] < 256].tolist()).decode(errors='ignore')
    assert data.vocabulary_size == 257 and data.token_text(65) == 'A' and data.token_text(256) == '<256>'
    shutil.copytree(folder / 'a', tmp_path / 'moved')
    moved = dataclasses.replace(data, source=Shards(str(tmp_path / 'moved')))
    assert moved.fingerprint() == data.fingerprint() == json.loads(json.dumps(data.fingerprint()))
    assert str(folder) not in json.dumps(data.fingerprint())
    for change in ({'seed': 1}, {'sequence_length': 16}, {'packing': 'whole'}, {'add_eos': False}):
        assert dataclasses.replace(data, **change).fingerprint() != data.fingerprint()


def test_shards_on_disk_resume_in_mid_epoch_on_other_hosts(folder):
    data = Tokens(Shards(str(folder / 'a')), 32, 'train', 8, seed=3)
    whole = list(itertools.islice(data.batches(), 14))
    epoch = len(data._rows[0]) / 8
    assert 3 < epoch < 11 and epoch % 1
    for start, hosts in ((0, 4), (3, 2), (11, 4)):
        again = Tokens(Shards(str(folder / 'a')), 32, 'train', 8, seed=3)
        equal(global_batches(again, start, 14 - start, hosts), whole[start:])


def test_the_standard_library_as_bytes():
    data = Tokens(StdlibBytes(), 64, 'train', 4, seed=1)
    held_out = Tokens(StdlibBytes(), 64, 'validation', 4)
    assert 5 < data._rows[0].stream.corpus.num_tokens / held_out._rows[0].stream.corpus.num_tokens < 40
    batch = next(data.batches())
    np.testing.assert_array_equal(
        batch['tokens'][:, 1:][batch['segment_ids'][:, 1:] == batch['segment_ids'][:, :-1]],
        batch['targets'][:, :-1][batch['segment_ids'][:, 1:] == batch['segment_ids'][:, :-1]],
    )
    assert (batch['loss_weights'] == 1).all() and batch['tokens'].max() < 256


def damage(folder, name, content):
    (folder / name).write_bytes(content)


MISTAKES = {
    'none': (lambda f: None, {}, lambda f: f / 'none', 'none has no index.json: name a folder that'),
    'a model': (
        lambda f: damage(f, 'model.safetensors', b''),
        {},
        lambda f: f,
        'is the folder of a model or a run (it has model.safetensors): name a folder that',
    ),
    'bucket': (lambda f: None, {}, lambda f: 'gs://bucket/a', 'is in a bucket, which cannot be memory-mapped'),
    'cut off': (
        lambda f: damage(f / 'a', 'train-00000.tokens', b'12'),
        {},
        lambda f: f / 'a',
        'train-00000.tokens is damaged (it has 2 bytes instead of',
    ),
    'index': (lambda f: damage(f / 'a', 'index.json', b'{'), {}, lambda f: f / 'a', 'index.json is damaged'),
    'short': (lambda f: None, {'sequence_length': 10**6}, lambda f: f / 'a', 'fewer than SEQUENCE_LENGTH = 1000000'),
    'bos': (lambda f: None, {'add_bos': True}, lambda f: f / 'a', 'ADD_BOS = True, but the tokenizer has no BOS'),
    'split': (lambda f: None, {'split': 'test'}, lambda f: f / 'a', "Tokens.split = 'test' is unknown"),
}


@pytest.mark.parametrize('case', MISTAKES)
def test_mistakes_name_the_folder_or_binding(case, folder, tmp_path):
    shutil.copytree(folder / 'a', tmp_path / 'a')
    prepare, settings, name, message = MISTAKES[case]
    prepare(tmp_path)
    with pytest.raises(UserError) as error:
        data = Tokens(
            Shards(str(name(tmp_path))), **{'sequence_length': 32, 'split': 'train', 'batch_size': 4} | settings
        )
        next(data.batches())
    assert message in str(error.value) and '\n' not in str(error.value)


def test_mixtures_need_one_tokenizer_and_a_share_each(folder, tmp_path):
    index = json.loads((folder / 'a' / 'index.json').read_text())
    index['tokenizer']['vocabulary_size'] = 300
    shutil.copytree(folder / 'a', tmp_path / 'b')
    (tmp_path / 'b' / 'index.json').write_text(json.dumps(index))
    both = [str(folder / 'a'), str(tmp_path / 'b')]
    with pytest.raises(UserError, match='were tokenised by different tokenizers: tokenise one of them again'):
        Shards(both).identity()
    with pytest.raises(UserError, match='TOKENS_MIXTURE has 1 shares and TOKENS_DIR 2 folders'):
        Shards(both, (1.0,))
    with pytest.raises(UserError, match='TOKENS_DIR names no folder'):
        Shards([])
    assert Shards([both[0]] * 2, [1.0, 2.0]).weights == (1.0, 2.0)
    empty = Memory((corpus_of([]),))
    with pytest.raises(UserError, match="memory has no document in the split 'validation': tokenise it with a larger"):
        len(Tokens(empty, 8, 'validation', 4).rows)
