"""Prompts as tokens, and generated tokens as text: BOS, chat templates, ends, parts of characters, spaces between tokens."""

import json

import pytest
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from upcycle.data.causal.prompts import Prompts, Text, stop_tokens
from upcycle.data.causal.tokenizers import ByteTokenizer, open_tokenizer
from upcycle.errors import UserError

WORDS = {'<s>': 0, '</s>': 1, '?': 2, '▁hello': 3, '▁world': 4, '▁user': 5, '▁assistant': 6}
TEMPLATE = (
    '{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}'
    '{% if add_generation_prompt %} assistant{% endif %}'
)


def folder(path, *, bos=True, **config):
    """A model's folder with a tokenizer of words."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token='?'))
    tokenizer.add_special_tokens(['<s>', '</s>'])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
    path.mkdir(exist_ok=True)
    tokenizer.save(str(path / 'tokenizer.json'))
    tokens = {'bos_token': '<s>', 'eos_token': '</s>'}
    (path / 'tokenizer_config.json').write_text(json.dumps(tokens | config))
    return path


def test_prompts_begin_and_end_as_the_model_reads_them(tmp_path):
    place = folder(tmp_path / 'bos', chat_template=TEMPLATE)
    assert Prompts(place).encode('hello world') == [0, 3, 4]
    assert Prompts(place, chat=True).encode('hello') == [0, 5, 3, 1, 6]
    assert Prompts(place, ended=True).encode('hello') == [0, 3, 1]
    assert Prompts(folder(tmp_path / 'plain', bos=False)).encode('hello') == [3]
    assert Prompts('bytes').encode('aé') == [97, 0xC3, 0xA9]


@pytest.mark.parametrize(('options', 'message'), [({'chat': True}, 'chat template'), ({'ended': True}, 'end token')])
def test_refuses_what_bytes_lack(options, message):
    with pytest.raises(UserError, match=message):
        Prompts('bytes', **options)


def test_a_character_appears_when_its_last_byte_comes():
    text = Text(ByteTokenizer(), [])
    said = [text.add(byte) for byte in 'a☃b'.encode()]
    assert said == ['a', '', '', '☃', 'b'] and text.text == 'a☃b' and text.end() == ''
    # A broken character is shown by what follows it, or by the end.
    assert [text.add(byte) for byte in b'\xe2z\xc3'] == ['', '\ufffdz', ''] and text.end() == '\ufffd'
    assert text.tokens == [*'a☃b'.encode(), *b'\xe2z\xc3']


def test_spaces_between_tokens_stay(tmp_path):
    text = Text(open_tokenizer(folder(tmp_path)), [0, 3])
    assert [text.add(token) for token in (4, 3, 4)] == [' world', ' hello', ' world']
    assert text.text == ' world hello world'


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({}, (256,)),
        ({'config.json': {'eos_token_id': 5}}, (5, 256)),
        ({'config.json': {'eos_token_id': 5}, 'generation_config.json': {'eos_token_id': [7, 6]}}, (6, 7, 256)),
        ({'config.json': {'eos_token_id': 5}, 'generation_config.json': {'top_k': 3}}, (5, 256)),
    ],
)
def test_stop_tokens(files, expected, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert stop_tokens([epath.Path(tmp_path)], ByteTokenizer()) == expected
