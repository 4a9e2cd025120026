"""Files of a tokenizer that contradict each other or are damaged: one sentence that names the file and the field."""

import json

import pytest

from tests.test_cli import call
from tests.tokens import write_tokenizer
from upcycle.data.causal.tokenizers import chat_template_of, open_tokenizer
from upcycle.errors import UserError

CONFIG, MAP = 'tokenizer_config.json', 'special_tokens_map.json'
DAMAGE = {
    'no object': ({CONFIG: [1]}, rf'{CONFIG} is damaged .\[1\] is not a JSON object'),
    'not JSON': ({CONFIG: '{'}, f'{CONFIG} is damaged .it is not JSON from line 1, column 2 on'),
    'a number': ({CONFIG: {'bos_token': 5}}, f'{CONFIG}: bos_token is 5: it must be a token'),
    'no content': ({MAP: {'eos_token': {'id': 1}}}, rf"{MAP}: eos_token is .'id': 1.: it must be a token"),
    'unknown': ({CONFIG: {'eos_token': '<nope>'}}, "has the eos_token '<nope>', which is not one of its 300 tokens"),
    'an id in a string': (
        {CONFIG: {}, 'config.json': {'eos_token_id': '2'}},
        "config.json: eos_token_id is '2': it must",
    ),
    'an id beyond': (
        {CONFIG: {}, 'config.json': {'bos_token_id': 70000}},
        'bos_token 70000, which is not one of its 300',
    ),
}


def change(folder, files):
    write_tokenizer(folder)
    for name, content in files.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize('case', DAMAGE)
def test_damage(case, tmp_path):
    files, message = DAMAGE[case]
    change(tmp_path, files)
    with pytest.raises(UserError, match=message) as caught:
        open_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ('files', 'expected'),
    [
        ({CONFIG: {'add_bos_token': True, 'eos_token': None, 'pad_token': '<nope>'}}, (None, None)),
        ({CONFIG: {'eos_token': '<nope>'}, 'config.json': {'eos_token_id': [1, 2]}}, (None, 1)),
        ({CONFIG: {}, 'config.json': {'bos_token_id': -1, 'eos_token_id': 1}}, (None, 1)),  # early Llama folders
    ],
)
def test_what_is_fine(files, expected, tmp_path):
    change(tmp_path, files)
    identity = open_tokenizer(tmp_path).identity
    assert (identity.bos_id, identity.eos_id) == expected


@pytest.mark.parametrize('template', [[1], [{'name': 'default'}], [{'template': 'x'}], 5, {'a': 'b'}])
def test_a_chat_template_of_another_type(template, tmp_path):
    change(tmp_path, {CONFIG: {'chat_template': template}})
    with pytest.raises(
        UserError, match=f'{CONFIG}: chat_template is .*: it must be a string, or a list of named templates'
    ):
        chat_template_of(tmp_path)


def test_without_tokens_nothing_is_left(tmp_path, capsys):
    """A tokenizer that knows no character of the corpus."""
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / 'tokenizer.json').read_text())
    content['model'] |= {'vocab': {}, 'merges': []}
    (tmp_path / 'tokenizer.json').write_text(json.dumps(content))
    (tmp_path / 'corpus.txt').write_text('abc')
    before = {path.name for path in tmp_path.iterdir()}
    options = [
        f'--from={tmp_path / "corpus.txt"}',
        f'--tokenizer={tmp_path}',
        f'--to={tmp_path / "out"}',
        '--workers=1',
    ]
    code, _, error = call(['tokenize', *options], capsys)
    assert code == 2 and 'no document has a token' in error
    assert {path.name for path in tmp_path.iterdir()} == before
