"""A run is warned of tokens that were made by another tokenizer than that of the checkpoint it starts from."""

import json
import types

import pytest

from tests import runs
from tests.test_cli import call
from tests.tokens import write_tokenizer
from upcycle import warning
from upcycle.data.causal import same_tokenizer
from upcycle.gin_files import FROM_CHECKPOINT
from upcycle.transfer import transfer


def other_vocabulary(folder):
    content = json.loads((folder / 'tokenizer.json').read_text())
    vocabulary = content['model']['vocab']
    vocabulary['a'], vocabulary['b'] = vocabulary['b'], vocabulary['a']
    (folder / 'tokenizer.json').write_text(json.dumps(content))


def other_padding(folder):
    content = json.loads((folder / 'tokenizer.json').read_text())
    (folder / 'tokenizer.json').write_text(json.dumps(content | {'truncation': None}, indent=1))


@pytest.mark.parametrize(
    ('change', 'tokens', 'words'),
    [
        (other_padding, 'tokenizer', None),
        (other_vocabulary, 'tokenizer', 'model.vocab of tokenizer.json'),
        (other_padding, 'bytes', 'one reads bytes'),
        (lambda folder: (folder / 'tokenizer.json').unlink(), 'bytes', None),
    ],
)
def test_what_differs_is_named(change, tokens, words, tmp_path, capsys):
    for name in ('model', 'tokenizer'):
        (tmp_path / name).mkdir()
        write_tokenizer(tmp_path / name)
    change(tmp_path / 'model')
    path = 'bytes' if tokens == 'bytes' else str(tmp_path / tokens)
    reader = types.SimpleNamespace(path=str(tmp_path / 'model'), format='huggingface')
    warning.forget()
    same_tokenizer.warn(reader, types.SimpleNamespace(source=types.SimpleNamespace(tokenizer_path=path)))
    said = capsys.readouterr().err
    assert (f'made by another tokenizer than that of {reader.path} ({words})' in said) if words else not said, said
    same_tokenizer.warn(reader, types.SimpleNamespace())
    assert not capsys.readouterr().err


def test_a_run_is_warned(dense_llm, tmp_path, capsys):
    folder = tmp_path / 'llm'
    transfer(dense_llm, str(folder), 'huggingface', optimizer_state='none')
    write_tokenizer(folder)
    small = runs.bindings('llm continue', tmp_path / 'run', 5, INITIAL_CHECKPOINT_PATH=folder, OPTIMIZER_STATE='fresh')
    files = [f'--gin_file={file}' for file in (FROM_CHECKPOINT, runs.LLM_TEXT, 'runs/continue_dense.gin')]
    code, _, error = call(['plan', *files, *(f'--gin.{name}={value}' for name, value in small.items())], capsys)
    assert code == 0 and f'another tokenizer than that of {folder} (one reads bytes)' in error, error
