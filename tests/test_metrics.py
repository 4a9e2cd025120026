"""The log of a run, in metrics.jsonl and TensorBoard."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from upcycle.errors import UserError
from upcycle.metrics import SET_ASIDE, MetricsLog, read_metrics


def line(step, split='train', **more):
    return json.dumps({'step': step, 'split': split, **more}).encode()


# Damage between the whole lines of a log up to step 8.
DAMAGES = {
    'its end is missing': b'{"step": 2, "split": "tr',
    'no UTF-8': line(2)[:-1] + b', "note": "\xff"}',
    'zeros': b'\0' * 64,
    'a list': b'[2, "train"]',
    'a number': b'17',
    'no step': b'{"split": "train", "loss": 1.0}',
    'no split': b'{"step": 2, "loss": 1.0}',
    'the step is a text': b'{"step": "2", "split": "train"}',
    'the step is nothing': b'{"step": null, "split": "train"}',
    'the step is no number': b'{"step": NaN, "split": "train"}',
    'another program has written there': b'Traceback (most recent call last):',
    'deeper than the parser goes': b'[' * 100_000,
    'a number beyond what Python reads': b'{"step": ' + b'1' * 10_000 + b', "split": "train"}',
}


@pytest.mark.parametrize('damage', DAMAGES)
@pytest.mark.parametrize('number', [0, 2, 4])
def test_no_line_is_lost_when_a_run_resumes(damage, number, tmp_path, capsys):
    """Whole lines up to the step of the resumption stay in the log, byte for byte; all others are set aside."""
    whole = [line(2), line(4), line(4, 'validation'), line(6)]
    lines = [*whole[:number], DAMAGES[damage], *whole[number:]]
    log = tmp_path / 'metrics.jsonl'
    log.write_bytes(b'\n'.join(lines) + b'\n')
    MetricsLog(str(tmp_path), 4).close()
    assert log.read_bytes().splitlines() == whole[:3]
    aside = (tmp_path / SET_ASIDE).read_bytes()
    assert sorted(aside.removesuffix(b'\n').split(b'\n')) == sorted([DAMAGES[damage], line(6)])
    said = capsys.readouterr().err
    if number < len(whole):
        assert f'metrics.jsonl, line {number + 1}: not a line' in said and SET_ASIDE in said and said.count('\n') == 1
    else:
        assert not said  # a kill in the middle of a line


def test_removed_lines_accumulate(tmp_path):
    written = 0
    for last in (None, 4, 2):
        log = MetricsLog(str(tmp_path), last)
        for step in range((last or 0) + 2, 8, 2):
            written += 2
            log.write(step, 'train', {'leg': str(last)})
            log.write(step, 'validation', {'leg': str(last)})
        log.close()
    log = MetricsLog(str(tmp_path), 6, only_training_at_it=True)
    log.close()
    kept = [(record['step'], record['leg']) for record in read_metrics(tmp_path / 'metrics.jsonl')]
    assert kept == [(2, 'None'), (2, 'None'), (4, '2'), (4, '2'), (6, '2')]
    aside = [(record['step'], record['split'], record['leg']) for record in read_metrics(tmp_path / SET_ASIDE)]
    assert len(kept) + len(aside) == written
    assert aside[:2] == [(6, 'train', 'None'), (6, 'validation', 'None')] and aside[-1] == (6, 'validation', '2')


@pytest.mark.parametrize(
    ('change', 'what'),
    [
        (lambda text: text.removesuffix(b'\n'), 'no end of its last line'),
        (lambda text: b'\xef\xbb\xbf' + text.replace(b'\n', b'\r\n'), "a Windows editor's"),
        (lambda text: text.replace(b'\n', b'\n\n'), 'empty lines'),
        (lambda text: b'\0' * 8 + text, 'zeros before a line'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_lines_are_whole_however_they_are_separated(change, what, tmp_path):
    whole = [line(2, loss=float('nan')), line(4, note='\u00e9\u2028')]
    (tmp_path / 'metrics.jsonl').write_bytes(change(b''.join(text + b'\n' for text in whole)))
    MetricsLog(str(tmp_path), 4).close()
    assert (tmp_path / 'metrics.jsonl').read_bytes().splitlines() == whole, what
    assert not (tmp_path / SET_ASIDE).exists()


def test_a_log_that_is_missing_on_resuming_is_a_warning(tmp_path, capsys):
    MetricsLog(str(tmp_path), None).close()
    assert capsys.readouterr().err == ''
    (tmp_path / 'metrics.jsonl').unlink()
    MetricsLog(str(tmp_path), 4).close()
    assert f'{tmp_path}/metrics.jsonl is missing: the log begins after step 4.' in capsys.readouterr().err


def test_a_folder_in_place_of_the_log_is_refused(tmp_path):
    (tmp_path / 'metrics.jsonl').mkdir()
    with pytest.raises(UserError, match=r'metrics.jsonl is not a file'):
        MetricsLog(str(tmp_path), 4)


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


def test_all_files_are_closed_even_if_one_cannot_be_written(tmp_path, monkeypatch):
    log = MetricsLog(str(tmp_path), None)
    log.write(1, 'train', {'loss': 1.0})
    closed = []
    monkeypatch.setattr(log._mirror, 'close', lambda: closed.append('mirror'))
    monkeypatch.setattr(log._writers[0], 'close', lambda: closed.append('events'))

    class Full:
        def close(self):
            raise OSError('No space left on device')

    monkeypatch.setattr(log, '_file', Full())
    with pytest.raises(OSError, match='No space'):
        log.close()
    assert closed == ['events', 'mirror']


def test_rows_of_different_lengths_are_written(tmp_path):
    """Experts with few tokens have fewer typical ones."""
    log = MetricsLog(str(tmp_path), None)
    log.write(1, 'train', {'typical': [['1'], ['2', '3']], 'load': np.array([0.5, 0.25], np.float32)})
    log.close()
    (record,) = read_metrics(str(tmp_path / 'metrics.jsonl'))
    assert (record['typical'], record['load']) == ([['1'], ['2', '3']], [0.5, 0.25])


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
