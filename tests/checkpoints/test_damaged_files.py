"""What is wrong with a file of a folder is said in plain words, and nothing but a file is opened."""

import json
import os

import pytest
from etils import epath

from tests.checkpoints import llms
from tests.fixtures import requires_fixtures
from tests.tokens import write_tokenizer
from upcycle import cli
from upcycle.checkpoints import open_checkpoint, safetensors
from upcycle.data.causal.tokenizers import open_tokenizer
from upcycle.errors import UserError


def written(path, header):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, 'little') + encoded + bytes(8))
    return epath.Path(path)


def entry(**changes):
    return {'x': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]} | changes}


NOT_DESCRIBED = 'its header does not describe x by dtype, shape and data_offsets'
HEADERS = {
    'not JSON': (b'{"x": ]', 'its header is not JSON from line 1, column 7 on'),
    'not text': (b'{"\xff": 1}', 'its header is not UTF-8 text'),
    'a list': ([], 'its header is not a JSON object'),
    'nested': (b'[' * 100_000, 'its header is nested too deeply'),
    'a long number': (b'{"x": ' + b'9' * 5000 + b'}', 'its header holds a number of too many digits'),
    'twice': (b'{"x": 1, "x": 2}', 'x is there twice'),
    'no shape': ({'x': {'dtype': 'F32', 'data_offsets': [0, 8]}}, NOT_DESCRIBED),
    'a list as entry': ({'x': [1]}, NOT_DESCRIBED),
    'a list as type': (entry(dtype=['F32']), NOT_DESCRIBED),
    'a word as shape': (entry(shape='two'), NOT_DESCRIBED),
    'three offsets': (entry(data_offsets=[0, 8, 8]), NOT_DESCRIBED),
    'half an offset': (entry(data_offsets=[0, 8.0]), NOT_DESCRIBED),
    'a negative shape': (entry(shape=[-2]), r'float32\[-2\] does not fit into its 8 bytes'),
    'notes': ({'__metadata__': [1]}, 'its metadata is not a dictionary of strings'),
}


@pytest.mark.parametrize('case', HEADERS)
def test_a_header(case, tmp_path):
    header, words = HEADERS[case]
    with pytest.raises(UserError, match=f'x.safetensors .*{words}.*: copy'):
        safetensors.read_files(written(tmp_path / 'x.safetensors', header))


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (b'', 'it has 0 bytes, too few for a header'),
        (b'\xff' * 40, 'its header would be 18446744073709551615 bytes long'),
        ((1).to_bytes(8, 'little') + b'{', 'its header would be 1 bytes long'),
        (b'version https', 'is a pointer of Git LFS'),
    ],
)
def test_no_header(content, words, tmp_path):
    (tmp_path / 'x.safetensors').write_bytes(content)
    with pytest.raises(UserError, match=words):
        safetensors.read_files(epath.Path(tmp_path / 'x.safetensors'))


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('{"weight_map"', 'it is not JSON from line 1, column 14 on'),
        ('{}', 'it has no weight_map of names and files'),
        ('{"weight_map": ["x"]}', 'it has no weight_map of names and files'),
        ('{"weight_map": {"x": 1}}', 'it has no weight_map of names and files'),
        ('[1]', r'\[1\] is not a JSON object'),
    ],
)
def test_an_index(content, words, tmp_path):
    (tmp_path / safetensors.INDEX).write_text(content)
    with pytest.raises(UserError, match=rf'{safetensors.INDEX} is damaged \({words}\): copy the checkpoint again'):
        safetensors.read_files(epath.Path(tmp_path / safetensors.INDEX))


@requires_fixtures
@pytest.mark.parametrize(
    'name',
    ['config.json', 'model.safetensors', 'model.safetensors.index.json', 'tokenizer.json', 'tokenizer_config.json']
    + ['generation_config.json', 'chat_template.jinja', 'LICENSE', 'upcycle_receipt.json'],
)
def test_a_pipe_is_not_opened(name, tmp_path):
    folder = llms.copy('llama', tmp_path / 'x')
    for old in (name, safetensors.SINGLE if name == safetensors.INDEX else name):
        (folder / old).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match=f'{folder / name} is not a file'):
        cli.run(['export', f'--from={folder}', f'--to={tmp_path / "y"}', '--format=huggingface'])
    assert [path.name for path in tmp_path.iterdir()] == ['x']


@requires_fixtures
def test_a_device_is_not_opened(tmp_path):
    folder = llms.copy('llama', tmp_path / 'x')
    (folder / 'config.json').unlink()
    (folder / 'config.json').symlink_to('/dev/zero')
    with pytest.raises(UserError, match='config.json is not a file'):
        open_checkpoint(folder)


@pytest.mark.parametrize('name', ['checkpoint_4/checkpoint', 'x.npz'])
def test_a_pipe_of_another_format(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f'{tmp_path / name} is not a file'):
        open_checkpoint(tmp_path / name.removesuffix('/checkpoint'))


@pytest.mark.parametrize('name', ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'])
@pytest.mark.parametrize('as_folder', [True, False])
def test_a_pipe_of_a_tokenizer(name, as_folder, tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f'{tmp_path / name} is not a file'):
        open_tokenizer(tmp_path if as_folder else tmp_path / 'tokenizer.json')
