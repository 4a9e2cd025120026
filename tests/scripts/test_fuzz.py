"""scripts/fuzz.py with few cases, and with bugs that it must find."""

import importlib.util
import json
import pathlib
import sys

import pytest

from upcycle import configuration
from upcycle.checkpoints import arrays

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'fuzz.py'


@pytest.fixture(scope='module')
def fuzz():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location('fuzz', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


CASES = [
    ('configurations', 50),
    ('checkpoints', 50),
    ('inputs', 50),
    pytest.param('processes', 6, marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(('what', 'cases'), CASES)
def test_some_cases(what, cases, fuzz, tmp_path, capsys):
    assert fuzz.main(['--what', what, '--cases', str(cases), '--out', str(tmp_path / 'failed')]) == 0, (
        capsys.readouterr().out
    )
    total = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('| all'))
    assert total.endswith(f'| 0 | 0 | 0 | 0 | 0 | {cases} |')
    assert not (tmp_path / 'failed').exists()


def test_a_traceback_is_seen_and_replayed(fuzz, tmp_path, monkeypatch, capsys):
    from fuzzing import configurations

    healthy, sabotaged = configuration.load, []

    def load(files, bindings):
        sabotaged.append(files)
        if len(sabotaged) > len(configurations.RUNS):
            raise KeyError('a bug')
        return healthy(files, bindings)

    monkeypatch.setattr(configuration, 'load', load)
    out = tmp_path / 'failed'
    assert fuzz.main(['--cases', '8', '--out', str(out)]) == 1
    cases = [json.loads(line) for line in out.read_text().splitlines()]
    assert cases and {case['outcome'] for case in cases} == {'TRACEBACK'} and 'a bug' in cases[0]['detail']
    monkeypatch.setattr(configuration, 'load', healthy)
    capsys.readouterr()
    assert fuzz.main(['--replay', str(out)]) == 0
    assert f'{len(cases)} cases in' in capsys.readouterr().out


def test_wrong_weights_are_seen(fuzz, tmp_path, monkeypatch, capsys):
    honest_read, honest_outcome, under_way = arrays.ArrayReader.read, fuzz._outcome, []

    def read(self, name, *more):
        value = honest_read(self, name, *more)
        return value + 1 if under_way and name.endswith('_norm/scale') else value

    def outcome(case):
        under_way.append(case)
        return honest_outcome(case)

    # The first reading of each checkpoint, before any case, is what the others are compared with.
    monkeypatch.setattr(arrays.ArrayReader, 'read', read)
    monkeypatch.setattr(fuzz, '_outcome', outcome)
    assert fuzz.main(['--what', 'checkpoints', '--cases', '30', '--out', str(tmp_path / 'failed')]) == 1
    assert 'SILENT SUCCESS' in capsys.readouterr().out
