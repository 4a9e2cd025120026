"""Tokenizers of GGUF files: the tokens of the original and of llama.cpp, and the commands that use them."""

import json
import os
import pathlib
import sys

import numpy as np
import pytest
from etils import epath

from tests import tokens
from tests.checkpoints import ggufs, llms, trees
from tests.checkpoints.test_damage import contents
from tests.fixtures import requires_fixtures
from tests.test_cli import call
from upcycle.checkpoints import open_checkpoint
from upcycle.checkpoints.gguf import container, reader, tokenizer
from upcycle.data.causal.tokenizers import chat_template_of, open_tokenizer, special_tokens
from upcycle.errors import UserError

TEXTS = [
    *(
        "I'LL go, don't 12345 3.14\r\n\r\n\tx  = {}  \n",
        '',
        ' a\n',
        'Ünï ½ ٣٤ 🚀👨\u200d👩 日本語',
        'aXbX' * 9,
        '-----=====  ---',
    ),
    '<|im_start|>user\nHi<|im_end|>\n<s> a</s>',
]
SPECIAL = ('<unk>', '<s>', '</s>', '<|im_start|>', '<|im_end|>')
TYPES = [2, 3, 3, 3, 3]
ENDS = {'bos_token_id': 1, 'eos_token_id': 2, 'eot_token_id': 4, 'unknown_token_id': 0}


def keys(**values):
    return {f'tokenizer.ggml.{name}': value for name, value in values.items()}


def byte_level(pre='smollm', **more):
    """The metadata of a trained tokenizer, and the tokenizer."""
    import tokenizers

    original = tokenizers.Tokenizer(tokenizers.models.BPE())
    steps = [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    original.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    original.train_from_iterator([*tokens.TEXTS, *TEXTS[:-1], 'the 2024 year of 12 and 345 aXbX'] * 3, trainer)
    model = json.loads(original.to_str())['model']
    words = sorted(model['vocab'], key=model['vocab'].get)
    merges = [' '.join(pair) for pair in model['merges']]
    types = TYPES + [1] * (len(words) - 5)
    return keys(model='gpt2', pre=pre, tokens=words, merges=merges, token_type=types, **ENDS, **more), original


def sentence_piece(folder, **more):
    """The metadata of a trained SentencePiece model, and the model."""
    import sentencepiece

    (folder / 'text.txt').write_text('\n'.join([*tokens.TEXTS, *TEXTS]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / 'text.txt'),
        model_prefix=str(folder / 'spm'),
        minloglevel=2,
        vocab_size=380,
        model_type='bpe',
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name='identity',
        remove_extra_whitespaces=False,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'spm.model'))
    ids = range(model.vocab_size())
    types = [2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i) else 1 for i in ids]
    scores = [float(model.GetScore(i)) for i in ids]
    words = [model.IdToPiece(i) for i in ids]
    return keys(model='llama', tokens=words, scores=scores, token_type=types, **ENDS, **more), model


def write(file, metadata):
    """Writes a tiny model of zeros, which llama.cpp loads, with a tokenizer."""
    sizes = {'block_count': 1, 'context_length': 64, 'embedding_length': 32, 'feed_forward_length': 32}
    sizes |= {'attention.head_count': 2, 'attention.layer_norm_rms_epsilon': 1e-5, 'rope.dimension_count': 16}
    names = [
        f'blk.0.{name}' for name in ('attn_q', 'attn_k', 'attn_v', 'attn_output', 'ffn_gate', 'ffn_up', 'ffn_down')
    ]
    shapes = dict.fromkeys(names, (32, 32)) | dict.fromkeys(('blk.0.attn_norm', 'blk.0.ffn_norm', 'output_norm'), (32,))
    shapes['token_embd'] = (len(metadata['tokenizer.ggml.tokens']), 32)
    fields = {'general.architecture': 'llama', **{f'llama.{key}': value for key, value in sizes.items()}, **metadata}
    return ggufs.write(file, fields, {f'{name}.weight': np.zeros(shape) for name, shape in shapes.items()})


def rebuilt(metadata):
    return tokenizer.rebuild(epath.Path('x.gguf'), metadata)


def test_a_byte_level_tokenizer_gives_the_originals_tokens(tmp_path):
    metadata, original = byte_level(add_bos_token=True, padding_token_id=4)
    words = metadata['tokenizer.ggml.tokens']
    metadata |= {'tokenizer.chat_template': tokens.CHATML}
    file = write(tmp_path / 'x.gguf', metadata)
    ours = open_tokenizer(file)
    for text, ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert ids.tolist() == original.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    digits = ours.encode(['2024'])[0]
    assert len(digits) == 4 and digits[0] == digits[2]
    identity = ours.identity
    assert (identity.bos_id, identity.eos_id, identity.adds_bos, identity.vocabulary_size) == (1, 2, True, len(words))
    folder = reader.unpacked(str(file))
    assert json.loads((folder / 'generation_config.json').read_text()) == {
        'bos_token_id': 1,
        'eos_token_id': [2, 4],
        'pad_token_id': 4,
    }
    assert chat_template_of(folder) == tokens.CHATML
    assert special_tokens(folder) == {
        'bos_token': '<s>',
        'eos_token': '</s>',
        'unk_token': '<unk>',
        'pad_token': '<|im_end|>',
    }


@pytest.mark.parametrize(
    ('pre', 'words'),
    [
        ('gpt-2', ['I', "'", 'LL', ' 12345', '\n\n', ' aB', '..']),
        ('smollm', ['I', "'", 'LL', ' ', *'12345', '\n\n', ' aB', '..']),
        ('llama-bpe', ['I', "'LL", ' ', '123', '45', '\n\n', ' aB', '..']),
        ('qwen2', ['I', "'LL", ' ', *'12345', '\n\n', ' aB', '..']),
        ('tekken', ['I', "'LL", ' ', *'12345', '\n\n', ' a', 'B', '..']),
    ],
)
def test_words(pre, words):
    import tokenizers

    made = tokenizers.Tokenizer.from_str(rebuilt(byte_level(pre)[0])['tokenizer.json'])
    found = made.pre_tokenizer.pre_tokenize_str("I'LL 12345\n\n aB..")
    assert [word.replace('Ġ', ' ').replace('Ċ', '\n') for word, _ in found] == words
    adds_bos = json.loads(rebuilt(byte_level(pre)[0])['tokenizer_config.json'])['add_bos_token']
    assert adds_bos == (pre in ('llama-bpe', 'tekken'))
    assert made.encode('a').ids[:1] == ([1] if adds_bos else made.encode('a', add_special_tokens=False).ids)


@pytest.mark.parametrize('prefix', [True, False])
def test_a_sentence_piece_model(prefix, tmp_path):
    """Without the prefix, the tokens are those after a token that the prefix belongs to."""
    metadata, model = sentence_piece(tmp_path, add_space_prefix=prefix)
    ours = open_tokenizer(write(tmp_path / 'x.gguf', metadata))
    assert ours.identity.adds_bos
    for text in TEXTS[:-1]:
        expected = model.encode(text if prefix else f'\n{text}')
        ids = ours.encode([text if prefix else f'\n{text}'])[0].tolist()
        assert ids == expected if prefix else ids == expected[1:]
        assert ours.decode(ours.encode([text])[0]) == text
    assert ours.encode(['<s> a</s>'])[0].tolist()[0] == 1


def test_unused_tokens_and_named_templates():
    metadata, _ = byte_level()
    metadata['tokenizer.ggml.tokens'] += ['[PAD345]']
    metadata['tokenizer.ggml.token_type'] += [5]
    metadata |= {
        'tokenizer.chat_template': 'a',
        'tokenizer.chat_templates': ['tool'],
        'tokenizer.chat_template.tool': 'b',
    }
    files = rebuilt(metadata)
    assert '[PAD345]' not in json.loads(files['tokenizer.json'])['model']['vocab']
    assert json.loads(files['tokenizer_config.json'])['chat_template'] == [
        *({'name': 'default', 'template': 'a'}, {'name': 'tool', 'template': 'b'})
    ]
    assert rebuilt({'general.architecture': 'llama'}) == {}


WRONG = {
    "the pre-tokenizer 'jais-2' .tokenizer.ggml.pre., whose rules are not known": {'pre': 'jais-2'},
    'the pre-tokenizer None': {'pre': None},
    "the tokenizer.ggml.model 'bert': only gpt2 and llama": {'model': 'bert'},
    'has no list tokenizer.ggml.tokens': {'tokens': None},
    'has no list tokenizer.ggml.merges': {'merges': None},
    'has no list tokenizer.ggml.scores': {'model': 'llama'},
    'tokens have 3 types': {'token_type': [1, 1, 1]},
    'tokenizer.ggml.bos_token_id is 400': {'bos_token_id': 400},
    'the tokenizer of x.gguf cannot be built .*: copy the file again': {'merges': ['nowhere a']},
}


@pytest.mark.parametrize('message', WRONG)
def test_what_is_refused(message):
    metadata = byte_level()[0] | keys(**WRONG[message])
    with pytest.raises(UserError, match=message) as caught:
        rebuilt({name: value for name, value in metadata.items() if value is not None})
    assert '\n' not in str(caught.value)


@requires_fixtures
def test_values_of_other_kinds(file, monkeypatch):
    """Each value of the metadata as a string, a number or a list is refused, or changes no weight."""
    metadata, tensors = container.read_file(epath.Path(file))
    expected = contents(file)
    for name in metadata:
        for value in ('x', 3, -1, 0.5, True, [1, 2, 3], ['a', 'b']):
            changed = metadata | {name: np.array(value) if isinstance(value, list) and value[0] == 1 else value}
            try:
                monkeypatch.setattr(container, 'read_file', lambda path, changed=changed: (changed, tensors))
                opened = reader.GgufReader(epath.Path(file))
                tokenizer.rebuild(epath.Path(file), changed)
            except UserError as error:
                assert '\n' not in str(error) and str(file) in str(error), (name, value)
                continue
            shapes = {leaf: (each.shape, each.dtype) for leaf, each in opened.leaves().items()}
            assert shapes == {leaf: (x.shape, x.dtype) for leaf, x in expected.items()}, (name, value)


@pytest.fixture
def file(tmp_path):
    """A model whose tokenizer has a token for each of some characters, since the fixture's vocabulary is small."""
    letters = [*SPECIAL, '▁', *(chr(i) for i in range(33, 127))]
    types = TYPES + [1] * (len(letters) - 5)
    metadata = keys(model='llama', tokens=letters, scores=[0.0] * len(letters), token_type=types, **ENDS)
    metadata |= {
        'tokenizer.chat_template': "{% for m in messages %}{{ '<|im_start|>' + m.content + '<|im_end|>' }}{% endfor %}"
    }
    return ggufs.from_folder(llms.copy('llama', tmp_path / 'hub'), tmp_path / 'x.gguf', **metadata)


@pytest.fixture
def run(capsys):
    def command(*arguments):
        code, out, err = call(list(map(str, arguments)), capsys)
        assert code == 0, err
        return out

    return command


@requires_fixtures
@pytest.mark.exhaustive
def test_commands_with_a_file_and_its_folder(file, tmp_path, run):
    folder, moe = tmp_path / 'folder', tmp_path / 'moe'
    run('export', f'--from={file}', f'--to={folder}', '--format=huggingface')
    run('convert', f'--from={file}', f'--to={moe}', '--format=huggingface', '--gin_file=moe/llm.gin')
    assert open_checkpoint(moe).metadata['model_type'] == 'mixtral'
    texts = [
        run('generate', f'--from={each}', '--prompt=Hi', '--max_new_tokens=6', '--json') for each in (file, folder, moe)
    ]
    assert texts[0] == texts[1] == texts[2] and len(json.loads(texts[0])['tokens']) == 6


@requires_fixtures
def test_commands_that_write(file, tmp_path, run, capsys):
    folder = tmp_path / 'folder'
    run('export', f'--from={file}', f'--to={folder}', '--format=huggingface')
    trees.assert_same(open_checkpoint(folder), contents(file))
    assert {each.name for each in folder.iterdir()} == {
        *('config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json')
    }
    (tmp_path / 'chat.jsonl').write_text((json.dumps({'messages': tokens.MESSAGES}) + '\n') * 4)
    for number, source in enumerate((file, folder)):
        options = ('--chat', '--workers=1', f'--tokenizer={source}', f'--to={tmp_path / str(number)}')
        out = run('tokenize', f'--from={tmp_path / "chat.jsonl"}', *options)
    assert 'wrote' in out
    index = [json.loads((tmp_path / name / 'index.json').read_text()) for name in '01']
    assert index[0] == index[1]
    code, _, err = call(['import', '--format=huggingface', f'--from={file}', f'--to={tmp_path / "ours"}'], capsys)
    assert code == 2 and 'has the format gguf, not huggingface' in err
    run('import', '--format=gguf', f'--from={file}', f'--to={tmp_path / "ours"}')
    code, _, err = call(['export', '--format=gguf', f'--from={folder}', f'--to={tmp_path / "back"}'], capsys)
    assert code == 2 and '--format=gguf is not one of' in err


@pytest.mark.exhaustive
@pytest.mark.parametrize('pre', [*tokenizer.PRE_TOKENIZERS, 'llama'])
def test_the_tokens_of_llama_cpp(pre, tmp_path):
    pytest.importorskip('xllamacpp')
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / 'scripts'))
    from serving import llama_cpp

    metadata = sentence_piece(tmp_path)[0] if pre == 'llama' else byte_level(pre)[0]
    file = write(tmp_path / 'x.gguf', metadata)
    texts = [*TEXTS, *tokens.TEXTS, pathlib.Path(os.__file__).read_text()]
    theirs, _ = llama_cpp.ask(file, texts=texts)
    assert [ids.tolist() for ids in open_tokenizer(file).encode(texts)] == theirs
