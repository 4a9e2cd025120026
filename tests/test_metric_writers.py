"""Metric writers: plug-ins by name, their libraries, and Weights & Biases offline."""

import json
import struct
import subprocess
import sys
import types

import pytest

from tests import runs
from upcycle import metric_writers
from upcycle.commands import plan, train
from upcycle.errors import Unavailable, UserError
from upcycle.metrics import MetricsLog, read_metrics
from upcycle.training import loop


class Lines(metric_writers.MetricWriter):
    """Keeps what it gets."""

    library, install = 'json', 'json'
    opened = []

    def __init__(self, place):
        self.place, self.lines, self.closed = place, [], False
        self.opened.append(self)

    def write(self, step, split, scalars):
        self.lines.append((step, split, dict(scalars)))

    def close(self):
        self.closed = True


def test_a_writer_gets_the_scalars_of_every_line(tmp_path, monkeypatch):
    monkeypatch.setitem(metric_writers.WRITERS, 'lines', Lines)
    with MetricsLog(str(tmp_path), None, ('lines',)) as log:
        log.write(2, 'train', {'loss': 1.5, 'experts/load': [0.5, 0.5], 'note': 'text'})
        log.write(2, 'validation', {'loss': 2})
    (writer,) = Lines.opened
    assert writer.lines == [(2, 'train', {'loss': 1.5}), (2, 'validation', {'loss': 2})] and writer.closed
    assert writer.place.folder == writer.place.model_dir == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']  # not TensorBoard's


def test_mistakes_name_the_writer(tmp_path, monkeypatch):
    def refusal(command, writers):
        with pytest.raises(UserError) as error:
            command(runs.FILES['dense'], runs.bindings('dense', tmp_path / 'run', 2, METRIC_WRITERS=writers))
        assert '\n' not in str(error.value) and not (tmp_path / 'run').exists()
        return str(error.value)

    said = "METRIC_WRITERS names 'wandbb', which is unknown: choose from tensorboard, wandb."
    assert refusal(plan.run, ('tensorboard', 'wandbb')) == said
    (tmp_path / 'no_library').mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for library in ('no_such_library', 'no_library'):
        monkeypatch.setattr(metric_writers.WandB, 'library', library)
        said = (
            f"METRIC_WRITERS names 'wandb', and {library} is not installed: pip install upcycle[wandb], or remove it."
        )
        assert refusal(train.run, ('wandb',)) == said


class Errors:
    """The errors of the library."""

    class Error(Exception):
        pass

    class CommError(Error):
        pass


def pretend(monkeypatch, init):
    """Puts something in the place of the library."""
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init, errors=Errors))


@pytest.mark.parametrize(
    ('error', 'kind', 'words'),
    [
        (
            Errors.Error('no\nAPI key'),
            UserError,
            'wandb cannot start (no API key): correct it, or set WANDB_MODE=offline.',
        ),
        (Errors.CommError('timeout'), Unavailable, 'Weights & Biases does not answer (timeout).'),
    ],
)
def test_a_start_that_fails_is_one_sentence(error, kind, words, tmp_path, monkeypatch):
    def init(**settings):
        raise error

    pretend(monkeypatch, init)
    with pytest.raises(kind) as caught:
        MetricsLog(str(tmp_path), None, ('wandb',))
    assert str(caught.value) == f'METRIC_WRITERS: {words}'


def test_a_library_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    class Gone:
        def define_metric(self, *names, **settings):
            pass

        def log(self, *line):
            raise ConnectionResetError('reset by peer')

        finish = log

    pretend(monkeypatch, lambda **settings: Gone())
    with MetricsLog(str(tmp_path), None, ('wandb',)) as log:
        for step in (1, 2):
            log.write(step, 'train', {'loss': 1.0})
    assert [line['step'] for line in read_metrics(tmp_path / 'metrics.jsonl')] == [1, 2]
    said = capsys.readouterr().err
    assert said == 'warning: Weights & Biases gets no more lines (reset by peer); metrics.jsonl has them all.\n'


@pytest.fixture
def offline(monkeypatch):
    """Weights & Biases, without its server."""
    wandb = pytest.importorskip('wandb', reason='Weights & Biases is not installed: pip install upcycle[wandb]')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_ERROR_REPORTING', 'false')
    return wandb


def records_of(file):
    """The records of a `.wandb` file: a header of 7 bytes, then LevelDB's log: blocks of 32 KiB with parts of records."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, record = file.read_bytes(), 7, b''
    while place + 7 <= len(content):
        if (left := -place % 32768) < 7:  # too few bytes for a part, so that they are filled
            place += left
            continue
        _, length, kind = struct.unpack('<IHB', content[place : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b''


@pytest.mark.exhaustive
def test_weights_and_biases_offline(offline, tmp_path, monkeypatch):
    """A killed and resumed run is one run there, with its bindings and all lines; those after a checkpoint are sent twice."""
    more = {'METRIC_WRITERS': ('tensorboard', 'wandb'), 'LOG_PERIOD': 1, 'WARMUP_STEPS': 2}
    add, taken = loop.Window.add, []

    def die_in_step_4(self, metrics):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        add(self, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Window, 'add', die_in_step_4)
        with pytest.raises(KeyboardInterrupt):
            runs.train('llm dense', tmp_path / 'run', 5, **more)
    # In another process, as in life: another second, and no run of the first one left open.
    files = [f'--gin_file={file}' for file in runs.FILES['llm dense']]
    bindings = runs.bindings('llm dense', tmp_path / 'run', 5, **more)
    command = [sys.executable, '-m', 'upcycle', 'train', *files, *(f'--gin.{n}={v}' for n, v in bindings.items())]
    subprocess.run(command, check=True)
    found = sorted((tmp_path / 'run' / 'wandb').glob('offline-run-*/*.wandb'))
    name = (tmp_path / 'run' / 'wandb_id.txt').read_text()
    assert [file.name for file in found] == [f'run-{name}.wandb'] * 2
    lines = []
    for file in found:
        records = list(records_of(file))
        (started,) = (record.run for record in records if record.WhichOneof('record_type') == 'run')
        config = {item.key: json.loads(item.value_json) for item in started.config.update}
        assert started.display_name == 'run' and config['upcycle.training.run.Run.total_steps'] == '5'
        history = [record.history.item for record in records if record.WhichOneof('record_type') == 'history']
        lines.append(
            [{(i.key or '/'.join(i.nested_key)): json.loads(i.value_json) for i in items} for items in history]
        )
    log = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    steps = [[line['step'] for line in part if 'train/loss' in line] for part in lines]
    assert steps == [[1, 2, 3], [3, 4, 5]]
    losses = {line['step']: line['train/loss'] for part in lines for line in part if 'train/loss' in line}
    assert losses == {line['step']: line['loss'] for line in log if line['split'] == 'train'}
    assert {line['validation/loss'] for line in lines[1] if 'validation/loss' in line} >= {log[-1]['loss']}
