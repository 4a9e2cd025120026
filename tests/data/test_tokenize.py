"""`upcycle tokenize`: sources, tokenizers, splits, figures, mistakes, and a write that was killed."""

import gzip
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.test_cli import call
from tests.tokens import TEXTS, write_tokenizer
from upcycle.data.causal import shards, workers, writing
from upcycle.data.causal.documents import Fields
from upcycle.data.causal.tokenizers import open_tokenizer
from upcycle.data.causal.workers import Job
from upcycle.errors import UserError

LINES = ''.join(json.dumps({'text': text, 'body': text.upper()}) + '\n' for text in TEXTS).encode()


def write_parquet(path):
    import pyarrow
    import pyarrow.parquet

    # From buffers: pyarrow imports pandas to convert lists.
    encoded = [text.encode() for text in TEXTS]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    array = pyarrow.StringArray.from_buffers(len(TEXTS), *map(pyarrow.py_buffer, (offsets, b''.join(encoded))))
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([array], ['text']), path, row_group_size=7)


def write_zst(path):
    import pyarrow

    with pyarrow.OSFile(str(path), 'wb') as raw, pyarrow.CompressedOutputStream(raw, 'zstd') as file:
        file.write(LINES)


SOURCES = {
    'a.jsonl': lambda path: path.write_bytes(LINES),
    'a.jsonl.gz': lambda path: path.write_bytes(gzip.compress(LINES)),
    'a.json.zst': write_zst,
    'a.parquet': write_parquet,
    'a.txt': lambda path: path.write_text('<sep>\n'.join(TEXTS), 'utf-8'),
    'a.txt.gz': lambda path: path.write_bytes(gzip.compress('<sep>\n'.join(TEXTS).encode())),
}


def documents_of(folder, split='train', tokenizer=None):
    """The texts of a split of a folder of shards."""
    opened = shards.open_folder(str(folder))
    found = []
    for shard in opened.corpora[split].shards:
        for part in np.split(shard.tokens, shard.ends[:-1]):
            found.append((tokenizer or open_tokenizer('bytes')).decode(part))
    return found


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
    """A folder with a small byte-level tokenizer.json that adds BOS."""
    folder = tmp_path_factory.mktemp('bpe')
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize('name', SOURCES)
def test_every_source_gives_the_same_shards(name, tmp_path, capsys):
    SOURCES[name](tmp_path / name)
    options = ['--separator=<sep>\\n'] if '.txt' in name else []
    to = tmp_path / 'shards'
    code, out, _ = call(
        [
            'tokenize',
            f'--from={tmp_path}/a.*',
            '--tokenizer=bytes',
            f'--to={to}',
            '--workers=1',
            '--validation=0.2',
            *options,
        ],
        capsys,
    )
    assert code == 0
    assert sorted(os.listdir(to)) == sorted(
        [f'{split}-00000.{kind}' for split in ('train', 'validation') for kind in ('tokens', 'ends')]
        + ['index.json', 'tokenizer']
    )
    train, validation = documents_of(to), documents_of(to, 'validation')
    assert 3 <= len(validation) <= 14 and sorted(train + validation) == sorted(TEXTS)
    assert [text for text in TEXTS if text in set(train)] == train
    tokens = sum(len(text.encode()) for text in train)
    assert f'{len(train)} documents, {tokens:,} tokens, 1.00 bytes per token' in out


def test_a_folder_of_text_and_the_last_document_is_held_out(tmp_path, capsys):
    (tmp_path / 'corpus' / 'deep').mkdir(parents=True)
    for i, text in enumerate(TEXTS[:4]):
        (tmp_path / 'corpus' / ('deep' if i % 2 else '') / f'{i}.md').write_text(text, 'utf-8')
    (tmp_path / 'corpus' / '.hidden').write_text('no')
    (tmp_path / 'corpus' / 'empty.txt').write_text('')
    command = ['tokenize', f'--from={tmp_path}/corpus', '--tokenizer=bytes', f'--to={tmp_path}/out', '--workers=1']
    code, out, _ = call([*command, '--validation=1e-9', '--json'], capsys)
    figures = json.loads(out)
    assert code == 0 and (figures['train']['documents'], figures['validation']['documents']) == (3, 1)
    order = [TEXTS[0], TEXTS[2], TEXTS[1], TEXTS[3]]
    assert documents_of(tmp_path / 'out') == order[:3] and documents_of(tmp_path / 'out', 'validation') == order[3:]


@pytest.mark.parametrize(
    ('documents', 'option', 'warned'),
    [(1, '--validation=0.5', True), (1, '--validation=0', False), (2, '--validation=1e-9', False)],
)
def test_a_split_without_documents_is_warned_of(documents, option, warned, tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text(
        json.dumps({'text': TEXTS[1]}) + '\n' + json.dumps({'text': TEXTS[2]}) * (documents - 1)
    )
    command = ['tokenize', f'--from={tmp_path}/a.jsonl', '--tokenizer=bytes', f'--to={tmp_path}/out', '--workers=1']
    code, _, error = call([*command, option], capsys)
    assert code == 0 and ('no document is held out for validation: name files' in error) == warned, error
    assert ('--validation_from' in error and '--separator' in error) == warned
    code, _, error = call(['eval', f'--from={tmp_path}/out'], capsys)
    assert code == 2 and 'out holds token shards of `upcycle tokenize` and no model' in error


def test_a_tokenizer_json(bpe, tmp_path, capsys):
    import tokenizers

    (tmp_path / 'a.jsonl').write_bytes(LINES)
    to = tmp_path / 'out'
    options = ['--text_field=body', '--validation=0', '--workers=1']
    code, _, _ = call(['tokenize', f'--from={tmp_path}/a.jsonl', f'--tokenizer={bpe}', f'--to={to}', *options], capsys)
    folder = shards.open_folder(str(to))
    identity = folder.tokenizer
    assert code == 0 and identity == open_tokenizer(to / 'tokenizer').identity
    assert (identity.bos_id, identity.eos_id, identity.adds_bos, identity.vocabulary_size) == (0, 1, True, 300)
    library = tokenizers.Tokenizer.from_file(str(bpe / 'tokenizer.json'))
    library.no_truncation()
    expected = [library.encode(text.upper(), add_special_tokens=False).ids for text in TEXTS]
    (shard,) = folder.corpora['train'].shards
    assert shard.tokens.tolist() == sum(expected, []) and shard.tokens.dtype == np.uint16
    assert documents_of(to, tokenizer=open_tokenizer(bpe)) == [text.upper() for text in TEXTS]
    assert not folder.corpora['validation'].shards


def test_a_sentencepiece_model(tmp_path):
    import sentencepiece

    (tmp_path / 'text').write_text('\n'.join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / 'text'), model_prefix=str(tmp_path / 'tokenizer'), vocab_size=40, minloglevel=2
    )
    tokenizer = open_tokenizer(tmp_path)
    identity = tokenizer.identity
    assert (identity.kind, identity.bos_id, identity.eos_id, identity.vocabulary_size) == ('tokenizer.model', 1, 2, 40)
    assert tokenizer.decode(tokenizer.encode(['Document 3'])[0]) == 'Document 3'
    with pytest.raises(UserError, match='a chat template needs a tokenizer.json'):
        tokenizer.encode_with_spans('a')


def test_bytes_beyond_uint16_are_uint32():
    from upcycle.data.causal.tokenizers import Identity

    assert [Identity('bytes', None, size).dtype.itemsize for size in (2**16, 2**16 + 1)] == [2, 4]


BAD = {
    'not json\n': 'a.jsonl, line 1 is not JSON',
    '{"text": "a"}\n[1]\n': 'a.jsonl, line 2 is not a JSON object',
    '{"txt": "a"}\n': "a.jsonl, line 1 has no text 'text'",
    '{"text": null}\n': "a.jsonl, line 1 has no text 'text'",
    '{"messages": []}\n': 'or set --chat',
    '{"text": "\\ud800"}\n': 'a.jsonl, line 1 has half of a surrogate pair',
}


@pytest.mark.parametrize('content', BAD)
def test_bad_records_are_named_and_counted(content, tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text(content + '{"text": "good"}\n')
    command = ['tokenize', f'--from={tmp_path}/a.jsonl', '--tokenizer=bytes', f'--to={tmp_path}/out', '--workers=1']
    code, _, err = call(command, capsys)
    assert code == 2 and BAD[content] in err and '--max_bad_records' in err and err.count('\n') == 1
    assert not (tmp_path / 'out').exists()
    code, _, err = call([*command, '--max_bad_records=1', '--validation=0'], capsys)
    assert code == 0 and BAD[content] in err and documents_of(tmp_path / 'out')[-1] == 'good'


def test_lines_that_are_not_utf8_are_left_out(tmp_path, capsys):
    (tmp_path / 'a.txt').write_bytes(b'one\ncaf\xe9\nthree')
    command = ['tokenize', f'--from={tmp_path}/a.txt', '--tokenizer=bytes', f'--to={tmp_path}/out', '--workers=1']
    code, _, err = call([*command, '--max_bad_records=1'], capsys)
    assert code == 0 and 'a.txt, line 2 is not UTF-8' in err and documents_of(tmp_path / 'out') == ['one\nthree']


MISTAKES = {
    ('--from={}/none*', '--tokenizer=bytes'): '--from={}/none* names no file',
    ('--from={}/a.jsonl', '--tokenizer={}/none'): '--tokenizer={}/none does not exist',
    ('--from={}/a.jsonl', '--tokenizer={}'): '--tokenizer={} has neither tokenizer.json nor tokenizer.model',
    ('--from={}/a.jsonl', '--tokenizer={}/bad.json'): '{}/bad.json cannot be read as a tokenizer',
    ('--from={}/a.jsonl', '--tokenizer=bytes', '--validation=1'): '--validation=1 must lie in [0, 1)',
    ('--from={}/a.jsonl', '--tokenizer=bytes', '--workers=0'): '--workers=0 must be at least 1',
    ('--from={}/a.jsonl', '--tokenizer=bytes', '--validation_from={}/a.jsonl'): '{}/a.jsonl is named by --from and by',
    ('--from={}/cut.jsonl.gz', '--tokenizer=bytes'): '{}/cut.jsonl.gz cannot be read',
    ('--from={}/bad.parquet', '--tokenizer=bytes'): '{}/bad.parquet cannot be read',
    ('--from={}/empty.txt', '--tokenizer=bytes'): 'no document has a token',
    ('--from={}/a.jsonl', '--tokenizer=bytes', '--chat'): '--tokenizer=bytes has no chat template',
    ('--from={}/a.jsonl', '--tokenizer=bytes', '--chat_template=x'): '--chat_template is for conversations',
    ('--from={}/model', '--tokenizer=bytes'): '--from={}/model is the folder of a model or a run (it has config.gin)',
    ('--from={}/tokens', '--tokenizer=bytes'): '--from={}/tokens holds token shards already',
    ('--from={}/a.parquet', '--tokenizer=bytes', '--text_field=x'): "{}/a.parquet has no column 'x' (it has text)",
}


@pytest.mark.parametrize('options', MISTAKES)
def test_mistakes_are_one_sentence(options, tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_bytes(LINES)
    (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(LINES)[:-9])
    (tmp_path / 'bad.parquet').write_bytes(LINES)
    write_parquet(tmp_path / 'a.parquet')
    (tmp_path / 'bad.json').write_text('{}')
    (tmp_path / 'empty.txt').write_text('')
    for folder, file, text in (
        ('model', 'config.gin', ''),
        ('tokens', 'index.json', '{\n "format": "upcycle tokens"}'),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text(text)
    options = [option.replace('{}', str(tmp_path)) for option in options]
    more = [] if any('--workers' in option for option in options) else ['--workers=1']
    code, _, err = call(['tokenize', *options, f'--to={tmp_path}/out', *more], capsys)
    expected = MISTAKES[tuple(option.replace(str(tmp_path), '{}') for option in options)]
    assert code == 2 and expected.replace('{}', str(tmp_path)) in err.splitlines()[-1], err
    assert not (tmp_path / 'out').exists()


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch, capsys):
    write_zst(tmp_path / 'a.jsonl.zst')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    command = ['tokenize', f'--from={tmp_path}/a.jsonl.zst', '--tokenizer=bytes', f'--to={tmp_path}/out', '--workers=1']
    code, _, err = call(command, capsys)
    assert code == 2 and 'needs pyarrow: pip install upcycle[data].' in err


class Stop(Exception):  # noqa: N818
    pass


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize('at', [0, 3, 6, 'end'])
def test_an_interrupted_write_continues(at, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, 'CHUNK_BYTES', 500)
    monkeypatch.setattr(shards, 'SHARD_TOKENS', 700)
    (tmp_path / 'a.jsonl').write_bytes(LINES)
    inputs, job = writing.Inputs.find([str(tmp_path / 'a.jsonl')], []), Job('bytes', Fields(), 1e-9)
    whole = writing.write(inputs, job, str(tmp_path / 'whole'))
    assert len(whole['splits']['train']['shards']) > 2 and whole['splits']['validation']['documents'] == 1

    def stop(*_, **__):
        raise Stop

    append, appended = writing._Folder.append, []

    def stop_later(folder, tokenised):
        if len(appended) == at:
            raise Stop
        appended.append(append(folder, tokenised))
        if len(appended) % 2:
            folder._sync()  # what follows is on disk, and not recorded

    with monkeypatch.context() as patched:
        if at == 'end':
            patched.setattr(shards, 'write_index', stop)
        else:
            patched.setattr(writing._Folder, 'append', stop_later)
        with pytest.raises(Stop):
            writing.write(inputs, job, str(tmp_path / 'out'))
    with pytest.raises(UserError, match='holds an interrupted write of other files or settings'):
        writing.write(inputs, Job('bytes', Fields(), 0.5), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()
    again = []
    monkeypatch.setattr(writing._Folder, 'append', lambda folder, t: again.append(append(folder, t)))
    assert writing.write(inputs, job, str(tmp_path / 'out')) == whole
    assert content_of(tmp_path / 'out') == content_of(tmp_path / 'whole')
    assert at != 'end' or not again
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.jsonl', 'out', 'whole']


def kill_itself(chunk):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.exhaustive
def test_a_killed_process_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / 'a.jsonl').write_bytes(LINES)
    monkeypatch.setattr(workers, '_work', kill_itself)
    inputs = writing.Inputs.find([str(tmp_path / 'a.jsonl')], [])
    with pytest.raises(UserError, match='a process of `upcycle tokenize` was killed.* fewer --workers'):
        writing.write(inputs, Job('bytes', Fields(), 0.1), str(tmp_path / 'out'), workers=2)


@pytest.mark.exhaustive
def test_processes_give_the_same_shards_and_end_with_a_killed_parent(tmp_path):
    for i in range(3):
        (tmp_path / f'{i}.jsonl').write_bytes(LINES * 4000)
    command = [sys.executable, '-m', 'upcycle', 'tokenize', f'--from={tmp_path}/*.jsonl', '--tokenizer=bytes']
    process = subprocess.Popen([*command, f'--to={tmp_path}/out', '--workers=2'], stderr=subprocess.PIPE, text=True)
    assert 'tokenize' in process.stderr.readline()
    process.send_signal(signal.SIGKILL)
    process.stderr.read()  # ends when the workers, which have inherited it, end
    assert not (tmp_path / 'out').exists()
    subprocess.run([*command, f'--to={tmp_path}/out', '--workers=2'], check=True)
    subprocess.run([*command, f'--to={tmp_path}/alone', '--workers=1'], check=True)
    assert content_of(tmp_path / 'out') == content_of(tmp_path / 'alone')
