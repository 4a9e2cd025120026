"""scripts/accelerator_check.py: on CPUs, without a network and without the libraries of training data."""

import json
import os
import subprocess
import sys

import pytest

from tests.scripts.load import SCRIPTS, script

accelerator_check = script('accelerator_check')

# Read by every Python process at its start.
BLOCKED = """
import socket, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('tensorflow', 'seqio', 'tensorflow_datasets', 't5'):
            raise ImportError(f'{name} is blocked')

def connect(*arguments):
    raise OSError('the network is blocked')

sys.meta_path.insert(0, Blocked())
socket.socket.connect = socket.create_connection = connect
"""


def run(tmp_path, *arguments, **environment):
    """Runs the script in a folder. Returns exit status, printed lines and the rows of the JSON by name."""
    (tmp_path / 'sitecustomize.py').write_text(BLOCKED)
    paths = [str(tmp_path), str(SCRIPTS.parent), os.environ.get('PYTHONPATH', '')]
    environment = {**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': os.pathsep.join(paths), **environment}
    command = [sys.executable, str(SCRIPTS / 'accelerator_check.py'), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    written = tmp_path / 'accelerator_check.json'
    rows = json.loads(written.read_text())['rows'] if written.exists() else []
    return done.returncode, done.stdout + done.stderr, {row['row']: row for row in rows}


def test_one_row(tmp_path):
    code, printed, rows = run(tmp_path, '--only=cross entropy/in parts')
    assert code == 0, printed
    row = rows['cross entropy/in parts']
    assert 0 < row['difference'] < row['bound'] and row['result'] == 'ok'
    assert 'cross entropy/in parts; ok' in printed
    assert '| cross entropy/in parts | ok |' in (tmp_path / 'accelerator_check.md').read_text()


@pytest.mark.exhaustive
def test_every_row(tmp_path):
    code, printed, rows = run(tmp_path, '--row_seconds=1500', XLA_FLAGS='--xla_force_host_platform_device_count=2')
    assert code == 0, printed
    assert {name for group in accelerator_check.ROWS.values() for name in group} == rows.keys()
    assert {row['result'] for row in rows.values()} == {'ok'}
    for name, baseline in accelerator_check.BASELINES.items():
        assert rows[name]['baseline'] == baseline
        assert rows[name]['time_over_baseline'] > 0
    # Two devices have twice the batch; a device computes what it did alone.
    assert rows['llm/expert parallel']['flops_over_baseline'] == pytest.approx(1)
    # Top-2 of experts as wide as the MLP.
    assert 1 < rows['llm/ragged']['flops_over_baseline'] < 2


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    from accelerator import device, steps

    return device, steps


def steps_on_a_gpu(family, modules, memory=None):
    device, steps = modules
    return steps.Steps(family, device.Device('gpu', 'a GPU', 1, memory, None))


@pytest.mark.parametrize('name', [name for family in ('t5', 'vit', 'llm') for name in accelerator_check.ROWS[family]])
def test_models_have_full_size_on_accelerators(name, modules):
    family, _, variant = name.partition('/')
    sizes = modules[1].Sizes(experts=8, layers=None, batch=2)
    run = steps_on_a_gpu(family, modules)._run(sizes, variant, 1)
    assert run.num_experts == (None if variant == 'dense' else 8)
    assert run.model.config.emb_dim == {'t5': 768, 'vit': 768, 'llm': 2048}[family]
    assert run.train_data.batch_size == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize('family', ['t5', 'vit', 'llm'])
def test_sizes_grow_with_the_memory(family, modules):
    found = [steps_on_a_gpu(family, modules, gigabytes * 10**9).sizes for gigabytes in (20, 40, 80, 160)]
    order = [(sizes.layers or 0, sizes.experts, sizes.batch) for sizes in found]
    assert order == sorted(order) and order[0] != order[-1]


def test_a_row_that_fails_says_why_and_the_others_run(monkeypatch, capsys):
    def measure(name, device, steps):
        if name == 'first':
            raise ArithmeticError('the result differs.\nMore follows.')
        return {'difference': 0.0}

    monkeypatch.setattr(accelerator_check, '_measure', measure)
    monkeypatch.syspath_prepend(SCRIPTS)
    accelerator_check.run_rows(['first', 'second'])
    told = [json.loads(line.removeprefix(accelerator_check.MARK)) for line in capsys.readouterr().out.splitlines()]
    first, second = (message for message in told if 'result' in message)
    assert (first['result'], first['why']) == ('failed', 'ArithmeticError: the result differs.')
    assert (second['row'], second['result']) == ('second', 'ok')


def test_a_process_that_dies_fails_its_row_only(monkeypatch, tmp_path):
    """A program that ends its process, as a fatal error of a compiler does, and one that never starts."""
    child = tmp_path / 'child.py'
    child.write_text(
        'import os, sys\n'
        'for name in sys.argv[2:]:\n'
        '    print(\'accelerator_check: {"begins": "%s"}\' % name, flush=True)\n'
        '    if name == "t5/gather":\n'
        '        print("check failed", file=sys.stderr, flush=True); os.abort()\n'
        '    print(\'accelerator_check: {"row": "%s", "seconds": 1.0, "result": "ok"}\' % name, flush=True)\n'
    )
    monkeypatch.setattr(accelerator_check, '__file__', str(child))
    rows = list(accelerator_check.check(['t5/dense', 't5/gather', 't5/einsum'], 60))
    assert [(row['row'], row['result']) for row in rows] == [
        ('t5/dense', 'ok'),
        ('t5/gather', 'failed'),
        ('t5/einsum', 'ok'),
    ]
    assert rows[1]['why'] == 'its process ended with status -6: check failed'
    child.write_text('raise SystemExit("no device")')
    rows = list(accelerator_check.check(['vit/dense', 'vit/gather'], 60))
    assert [row['why'] for row in rows] == ['its process ended with status 1: no device'] * 2
    child.write_text('import time\ntime.sleep(60)')
    (row,) = accelerator_check.check(['vit/dense'], 0.5)
    assert row['why'] == 'it took more than 0.5 seconds.'


def test_a_pattern_without_rows_is_refused(tmp_path):
    with pytest.raises(SystemExit) as refused:
        accelerator_check.chosen(['attention', 'vitt/*'])
    assert refused.value.code == 2
    assert accelerator_check.chosen(['online', 'vit']) == ['vit/dense', 'vit/gather', 'online/vit', 'online/llm']


def test_ratios_are_to_the_baseline_that_was_measured():
    dense = {'row': 'llm/dense', 'rate': 100.0, 'tflop': 2.0}
    sparse = accelerator_check.compared({'row': 'llm/ragged', 'rate': 50.0, 'tflop': 3.0}, [dense])
    assert (sparse['baseline'], sparse['time_over_baseline'], sparse['flops_over_baseline']) == ('llm/dense', 2.0, 1.5)
    assert accelerator_check.compared(dense, []) == dense
