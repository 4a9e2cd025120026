"""Sentinels match the vocabulary of the model: T5's, mT5's, ByT5's or explicit ones."""

import dataclasses
import json
import re

import pytest

from tests.checkpoints import trees
from tests.data.test_text_files import config, first_batch, folder, model, train_sentencepiece  # noqa: F401
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint
from upcycle.data.text import TextFiles
from upcycle.errors import UserError
from upcycle.transfer import transfer


@pytest.fixture(scope='module')
def holds_sentinels(folder):  # noqa: F811
    """A model file like mT5's, with sentinel pieces last, counting down."""
    from sentencepiece import sentencepiece_model_pb2

    path = train_sentencepiece(folder, 'before', pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    proto = sentencepiece_model_pb2.ModelProto()
    with open(path, 'rb') as file:
        proto.ParseFromString(file.read())
    for number in reversed(range(10)):
        proto.pieces.add(piece=f'▁<extra_id_{number}>', score=0.0)
    (folder / 'mt5_like.model').write_bytes(proto.SerializeToString())
    return str(folder / 'mt5_like.model')


@pytest.fixture(scope='module')
def in_front(folder):  # noqa: F811
    """A model file whose sentinels are user-defined symbols, counting up."""
    symbols = ['<extra_id_0>', '<extra_id_1>', '<extra_id_2>']
    return train_sentencepiece(
        folder, 'in_front', pad_id=0, eos_id=1, unk_id=2, bos_id=-1, user_defined_symbols=symbols
    )


# Model file, bindings, sentinels in order, vocabulary size.
CASES = {
    'bytes': (None, {}, range(358, 258, -1), 359),
    'bytes, as T5': (None, {'sentinels': 't5'}, range(358, 258, -1), 359),
    'ByT5': (None, {'sentinels': 'byt5'}, range(258, 130, -1), 259),
    'a file without': ('model', {}, range(139, 39, -1), 140),
    'umT5': ('model', {'sentinels': 'umt5'}, range(339, 39, -1), 340),
    'fewer on top': ('model', {'extra_ids': 20}, range(59, 39, -1), 60),
    'mT5': ('holds_sentinels', {}, range(49, 39, -1), 50),
    'mT5 by name': ('holds_sentinels', {'sentinels': 'mt5'}, range(49, 39, -1), 50),
    'mT5, none on top': ('holds_sentinels', {'extra_ids': 0}, range(49, 39, -1), 50),
    'in another order': ('in_front', {}, range(3, 6), 40),
    'given': ('model', {'sentinels': (60, 50, 51)}, (60, 50, 51), 61),
    'the first given': ('model', {'sentinels': 250}, range(250, 150, -1), 251),
    'given for bytes': (None, {'sentinels': [383, 382]}, (383, 382), 384),
}


@pytest.mark.parametrize('case', CASES)
def test_sentinels(case, folder, request):  # noqa: F811
    file, bindings, expected, size = CASES[case]
    path = None if file is None else request.getfixturevalue(file)
    source = config(TextFiles(str(folder / '*.txt'), vocabulary=path, **bindings))
    ids = source.task.source.sentinels
    assert ids == tuple(expected) and source.vocabulary_size == size
    batch = first_batch(source)
    # Inputs of 32 come from 36 tokens with 5 noise tokens in 2 spans.
    for row, target in zip(batch['encoder_input_tokens'], batch['decoder_target_tokens'], strict=True):
        assert [i for i in row.tolist() if i in ids] == list(ids[:2])
        assert [i for i in target.tolist() if i in ids] == list(ids[:2])
        assert target[0] == ids[0] or row[0] == ids[0]
    identity = source.fingerprint()['vocabulary']
    is_t5 = list(ids) == list(range(size - 1, size - 1 - source.vocabulary.extra_ids, -1))
    assert identity.get('sentinels') == (None if is_t5 else list(ids))
    assert all(isinstance(source.token_text(i), str) for i in ids)


REFUSED = {
    "a file's sentinels without a file": (None, {'sentinels': 'mt5'}, "SENTINELS = 'mt5'.*set SENTENCEPIECE_MODEL"),
    'a file that has none': ('model', {'sentinels': 'mt5'}, 'has no piece <extra_id_0>'),
    'others on top': ('holds_sentinels', {'sentinels': 't5'}, '<extra_id_0> is id 49'),
    'umT5 without a file': (None, {'sentinels': 'umt5'}, "SENTINELS = 'umt5'.*set SENTENCEPIECE_MODEL"),
    'umT5 on top of others': (
        'holds_sentinels',
        {'sentinels': 'umt5'},
        "SENTINELS = 'umt5' adds.*<extra_id_0> is id 49",
    ),
    'bytes and a file': ('model', {'sentinels': 'byt5'}, "SENTINELS = 'byt5' are bytes, and SENTENCEPIECE_MODEL"),
    'twice the same': (None, {'sentinels': (300, 300)}, r'SENTINELS = \(300, 300\) must be distinct ids'),
    'padding': (None, {'sentinels': (300, 0)}, r'SENTINELS = \(300, 0\) must be'),
    'none': (None, {'sentinels': ()}, r'SENTINELS = \(\) must be'),
    'too few': (None, {'sentinels': (300,)}, 'needs 2 sentinels and the vocabulary has 1: .*SENTINELS'),
    'none at all': ('model', {'extra_ids': 0}, 'needs 2 sentinels and the vocabulary has 0: .*SENTINELS'),
    'in the text': (None, {'sentinels': (300, ord('o') + 3)}, 'the text contains the id 114, which is sentinel 1'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_refused(case, folder, request):  # noqa: F811
    file, bindings, words = REFUSED[case]
    path = None if file is None else request.getfixturevalue(file)
    with pytest.raises(UserError, match=words):
        first_batch(config(TextFiles(str(folder / '*.txt'), vocabulary=path, **bindings)))


def test_byt5_does_not_take_bytes_that_the_text_holds(tmp_path):
    """UTF-8 never uses the last eleven bytes; the bytes below start rarer letters."""
    (tmp_path / 'a.txt').write_text('Αυτό είναι κείμενο. ' * 200)
    files = TextFiles(str(tmp_path / 'a.txt'), sentinels='byt5')
    assert first_batch(config(files))['encoder_input_tokens'].max() == 258
    # 57 spans: 258 down to 202, and Greek letters begin with the bytes 206 and 207.
    with pytest.raises(UserError, match='the text contains the id 210, which is sentinel 48'):
        first_batch(dataclasses.replace(config(files), task_feature_lengths={'inputs': 1024, 'targets': 229}))


@pytest.mark.parametrize('command', ['plan', 'train'])
def test_what_training_refuses_a_plan_refuses(command, folder, dense, tmp_path, capsys):  # noqa: F811
    """Checks of lengths and sentinels before data is read."""
    files = ['models/t5_1_1_tiny.gin', 'tasks/text_files_span_corruption.gin', 'runs/continue_dense.gin']
    named = {
        'TRAIN_FILES': f'{folder}/*.txt',
        'SENTINELS': '(300,)',
        'TASK_FEATURE_LENGTHS': "{'inputs': 32, 'targets': 9}",
        'MODEL_DIR': str(tmp_path / 'run'),
        'INITIAL_CHECKPOINT_PATH': str(dense),
        'TRAIN_STEPS': '20',
    }
    arguments = [command, *(f'--gin_file={file}' for file in files), *(f'--gin.{k}={v}' for k, v in named.items())]
    code, _, error = call(arguments, capsys)
    assert code == 2 and 'needs 2 sentinels and the vocabulary has 1' in error, error
    code, _, error = call([*arguments, '--gin.SENTINELS=(400, 399)'], capsys)
    assert code == 2 and re.search('NUM_EMBEDDINGS = 384 is smaller than .* vocabulary of 401 tokens', error), error
    code, _, error = call([*arguments, '--gin.SENTINELS=t6'], capsys)
    assert code == 2 and 'SENTINELS' in error and 'one of t5, umt5, mt5, byt5' in error, error


@pytest.mark.parametrize('tokenizer', ['ByT5Tokenizer', 'T5Tokenizer'])
def test_a_byt5_asks_for_its_sentinels(tokenizer, folder, tmp_path, capsys):  # noqa: F811
    """Its configuration names its tokenizer; its sizes equal ours."""
    tree = trees.t5(False, state=False, vocab_size=384)
    source = trees.write(tmp_path / 'in', 'huggingface', {k: v for k, v in tree.items() if k != 'step'})
    config_file = tmp_path / 'in' / 'config.json'
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {'tokenizer_class': tokenizer}))
    transfer(source, str(tmp_path / 'ours'), 'upcycle')
    sizes = {'EMBED_DIM': 16, 'NUM_HEADS': 2, 'HEAD_DIM': 6, 'MLP_DIM': 24, 'DENSE_STEP': 5, 'TRAIN_STEPS': 10}
    lengths = {'TASK_FEATURE_LENGTHS': {'inputs': 32, 'targets': 9}, 'NUM_ENCODER_LAYERS': 2, 'NUM_DECODER_LAYERS': 2}
    named = sizes | lengths | {'TRAIN_FILES': f'{folder}/*.txt', 'MODEL_DIR': 'unused', 'OPTIMIZER_STATE': 'fresh'}
    files = ['models/t5_1_1_tiny.gin', 'tasks/text_files_span_corruption.gin', 'runs/continue_dense.gin']
    options = [*(f'--gin_file={file}' for file in files), *(f'--gin.{k}={v}' for k, v in named.items())]
    for path in (source, tmp_path / 'ours'):
        code, _, error = call(['plan', f'--from={path}', *options], capsys)
        if tokenizer == 'T5Tokenizer':
            assert code == 0, error
        else:
            assert code == 2 and 'sentinels 258, 257, ..., and text_files_span_corruption uses 358, 357' in error, error
            assert call(['plan', f'--from={path}', *options, '--gin.SENTINELS=byt5'], capsys)[0] == 0


@pytest.mark.parametrize(
    ('command', 'sentinels'),
    [
        ('convert', "'byt5'"),
        pytest.param('train', "'byt5'", marks=pytest.mark.exhaustive),
        ('train', '(383, 382)'),
    ],
)
def test_what_is_made_of_a_checkpoint_keeps_its_sentinels(command, sentinels, folder, tmp_path, capsys):  # noqa: F811
    """Otherwise the next run would silently use sentinels that the model has never seen."""
    tree = trees.t5(False, state=False, vocab_size=384)
    source = trees.write(tmp_path / 'in', 'huggingface', {k: v for k, v in tree.items() if k != 'step'})
    config_file = tmp_path / 'in' / 'config.json'
    if command == 'convert':
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {'tokenizer_class': 'ByT5Tokenizer'}))
    sizes = {'EMBED_DIM': 16, 'NUM_HEADS': 2, 'HEAD_DIM': 6, 'MLP_DIM': 24, 'DENSE_STEP': 5, 'NUM_EMBEDDINGS': 384}
    depth = {'NUM_ENCODER_LAYERS': 2, 'NUM_DECODER_LAYERS': 2}
    data = {'TASK_FEATURE_LENGTHS': {'inputs': 32, 'targets': 9}, 'TRAIN_FILES': f'{folder}/*.txt', 'BATCH_SIZE': 2}
    run = {'MODEL_DIR': tmp_path / 'run', 'TRAIN_STEPS': 6, 'OPTIMIZER_STATE': 'fresh', 'EVAL_DATASET': 'None'}

    def options(*files, **named):
        return [*(f'--gin_file={file}' for file in files), *(f'--gin.{k}={v}' for k, v in named.items())]

    files = ['models/t5_1_1_tiny.gin', 'tasks/text_files_span_corruption.gin', 'runs/continue_dense.gin']
    if command == 'convert':
        moe = {'NUM_EXPERTS': 2, 'DECODER_MOE_LAYERS': '(1,)', 'ENCODER_MOE_LAYERS': '(1,)'}
        made = options('models/t5_1_1_tiny.gin', 'moe/t5.gin', **sizes, **depth, **moe)
        code, _, error = call(['convert', f'--from={source}', f'--to={tmp_path / "run"}', *made], capsys)
        files, sizes = [files[0], 'moe/t5.gin', *files[1:]], sizes | moe
    else:
        named = sizes | depth | data | run | {'SENTINELS': sentinels}
        code, _, error = call(['train', *options(*files, INITIAL_CHECKPOINT_PATH=source, **named)], capsys)
    assert code == 0, error
    assert 'sentinels' in open_checkpoint(tmp_path / 'run').metadata
    later = sizes | depth | data | run | {'MODEL_DIR': tmp_path / 'later', 'TRAIN_STEPS': 9}
    later.pop('DENSE_STEP')
    code, _, error = call(['plan', f'--from={tmp_path / "run"}', *options(*files, **later)], capsys)
    assert code == 2 and 'was trained with the sentinels' in error and 'uses 358, 357, ...: set SENTINELS =' in error
    code, _, error = call(
        ['plan', f'--from={tmp_path / "run"}', *options(*files, **later, SENTINELS=sentinels)], capsys
    )
    assert code == 0, error


@pytest.mark.parametrize(
    'model_type, rows, first',
    [('umt5', 256_384, '256299, 256298'), ('mt5', 250_112, '250099, 250098'), ('umt5', 384, None)],
)
def test_checkpoints_with_the_vocabularies_of_mt5_and_umt5(model_type, rows, first, folder, tmp_path):  # noqa: F811
    """A task on another file does not default to the sentinels of the checkpoint."""
    biases = 'every_layer' if model_type == 'umt5' else 'shared'
    tree = trees.t5(False, state=False, vocab_size=rows, emb_dim=2, position_biases=biases)
    source = trees.write(tmp_path / 'in', 'huggingface', tree, {'model_type': model_type})
    kind = open_checkpoint(source).metadata.get('sentinels')
    data = config(TextFiles(str(folder / '*.txt')))
    if first is None:
        assert kind is None
        data.check_sentinels(source, kind)
        return
    with pytest.raises(UserError, match=f"sentinels {first}, .* uses 358, 357, .*SENTINELS = '{model_type}'"):
        data.check_sentinels(source, kind)
