"""Dockerfiles: what they copy is all that the package is built from, and the extras that they install exist."""

import pathlib
import re
import runpy
import shlex

import pytest
import setuptools

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'scripts' / 'docker').glob('*.Dockerfile'))
MODULES = {path.parent for path in (ROOT / 'upcycle').rglob('*.py')}
GIN = {path.parent for path in (ROOT / 'gin').rglob('*.gin')}


def instructions(file):
    """The instructions of a Dockerfile, as words."""
    return [shlex.split(line) for line in file.read_text().splitlines() if line and not line.startswith('#')]


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_a_package_is_built_from_what_is_copied(file, tmp_path, monkeypatch):
    for _, *sources, target in (words for words in instructions(file) if words[0] == 'COPY'):
        for source in sources:
            (tmp_path / target / (source if target == './' else '')).symlink_to(ROOT / source)
            assert (ROOT / source).exists(), source
    made = {}
    monkeypatch.setattr(setuptools, 'setup', made.update)
    monkeypatch.chdir(tmp_path)
    # A copy, since the script looks for folders next to itself.
    text = (tmp_path / 'setup.py').read_text()
    (tmp_path / 'setup.py').unlink()
    (tmp_path / 'setup.py').write_text(text)
    runpy.run_path('setup.py')
    packages = set(made['packages'])
    assert {'.'.join(path.relative_to(ROOT).parts) for path in MODULES} <= packages
    assert {'.'.join(('upcycle', *path.relative_to(ROOT).parts)) for path in GIN} <= packages
    (install,) = (words for words in instructions(file) if words[0] == 'RUN')
    extras = re.fullmatch(r'\.\[(.*)\]', install[-1])[1].split(',')
    assert set(extras) <= made['extras_require'].keys()
    assert {'tpu': 'tpu', 'cuda': 'gpu'}[file.name.split('.')[0]] in extras


@pytest.mark.parametrize('file', FILES, ids=lambda file: file.name)
def test_they_say_that_they_were_not_built(file):
    assert 'Never built by this project' in file.read_text().splitlines()[0]
