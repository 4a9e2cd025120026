"""What a run logs: TensorBoard reads the same numbers as metrics.jsonl holds."""

import json
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from upcycle.metrics import MetricsLog


def test_tensorboard_reads_what_was_logged(tmp_path):
    for leg, last in enumerate((None, 20)):
        log = MetricsLog(str(tmp_path), last)
        for step in (10 + 20 * leg, 20 + 20 * leg):
            log.write(step, 'train', {'loss': 1.5 / step, 'experts/load': [0.5, 0.5], 'flops': 10**17})
        # On disk before it is closed.
        events = EventAccumulator(str(tmp_path / 'train')).Reload()
        assert events.Scalars('loss')[-1].step == step
        log.close()
    events = EventAccumulator(str(tmp_path / 'train')).Reload()
    assert set(events.Tags()['scalars']) == {'loss', 'flops'}
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert [event.step for event in events.Scalars('loss')] == [10, 20, 30, 40] == [line['step'] for line in lines]
    for event, line in zip(events.Scalars('loss'), lines, strict=True):
        assert event.value == pytest.approx(line['loss'], rel=1e-6)
    assert events.Scalars('flops')[0].value == pytest.approx(1e17)


def test_everything_is_closed_where_a_file_cannot_be_written(tmp_path, monkeypatch):
    log = MetricsLog(str(tmp_path), None)
    log.write(1, 'train', {'loss': 1.0})
    closed = []
    monkeypatch.setattr(log._mirror, 'close', lambda: closed.append('mirror'))
    monkeypatch.setattr(log._events['train'], 'close', lambda: closed.append('events'))

    class Full:
        def close(self):
            raise OSError('No space left on device')

    monkeypatch.setattr(log, '_file', Full())
    with pytest.raises(OSError, match='No space'):
        log.close()
    assert closed == ['events', 'mirror']


def test_logging_imports_no_tensorflow(tmp_path):
    script = f"""
import sys
from upcycle.metrics import MetricsLog
log = MetricsLog({str(tmp_path)!r}, None)
log.write(1, 'train', {{'loss': 1.0}})
log.close()
assert 'tensorflow' not in sys.modules
"""
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
